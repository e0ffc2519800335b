import os
from pathlib import Path

import pytest

from dinosearch.errors import DinosearchError
from dinosearch.index.contents import IndexedFile
from dinosearch.query.labels import load_labels


@pytest.fixture
def files(tmp_path):
    """Three indexed files below tmp_path/catalog."""
    root = tmp_path / "catalog"
    names = ["a.jpg", "b.jpg", "sub/c.jpg"]
    return [IndexedFile(root / name, name, root) for name in names]


def write(tmp_path, text, *, encoding="utf-8", folder="."):
    path = tmp_path / folder / "labels.csv"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(text.encode(encoding, "surrogateescape"))
    return path


@pytest.mark.parametrize(
    ("folder", "name"),
    [(".", "catalog/a.jpg"), ("catalog", "a.jpg"), ("elsewhere", "a.jpg"), ("elsewhere", "../catalog/./a.jpg")],
)
def test_paths_are_relative_to_the_csv_or_to_the_root(tmp_path, files, folder, name):
    found = load_labels(write(tmp_path, f"path,label\n{name},cat\n", folder=folder), files)
    assert (found.rows, found.labels, found.splits, found.unmatched) == ([0], ["cat"], None, [])


def test_paths_may_be_absolute_and_through_a_link(tmp_path, files):
    (tmp_path / "catalog/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "catalog")
    text = f"path,label\n{tmp_path}/catalog/b.jpg,cat\n{tmp_path}/link/sub/c.jpg,dog\n"
    found = load_labels(write(tmp_path, text), files)
    assert (found.rows, found.labels) == ([1, 2], ["cat", "dog"])


def test_beside_the_csv_comes_before_below_a_root(tmp_path, files):
    beside = IndexedFile(tmp_path / "other/a.jpg", "a.jpg", tmp_path / "other")
    found = load_labels(write(tmp_path, "path,label\na.jpg,cat\n", folder="other"), [*files, beside])
    assert found.rows == [3]


def test_of_a_file_with_pages_the_first_counts(tmp_path, files):
    root = tmp_path / "catalog"
    pages = [IndexedFile(root / "p.tif", "p.tif", root, frame=frame) for frame in range(3)]
    found = load_labels(write(tmp_path, "path,label\np.tif,cat\na.jpg,dog\n"), [*files, *pages])
    assert (found.rows, found.labels) == ([0, 3], ["dog", "cat"])


@pytest.mark.parametrize("name", ["https://host/pictures/sub/b.jpg?size=1", "sub/b.jpg?size=1", "s3://bucket/c.jpg"])
def test_images_in_the_network_are_found_by_url_and_below_their_root(tmp_path, files, name):
    root, named = "https://host/pictures", "s3://bucket/c.jpg"
    remote = [IndexedFile(f"{root}/{each}", each, root) for each in ("a.jpg", "sub/b.jpg?size=1")]
    listed = IndexedFile(named, named, tmp_path / "list.txt")
    found = load_labels(write(tmp_path, f"path,label\n{name},cat\n"), [*files, *remote, listed])
    assert found.rows == [5 if name == named else 4]


def test_a_path_below_two_roots_is_refused(tmp_path, files):
    other = IndexedFile(tmp_path / "other/a.jpg", "a.jpg", tmp_path / "other")
    with pytest.raises(DinosearchError, match=r"line 2: 'a\.jpg' lies below several"):
        load_labels(write(tmp_path, "path,label\na.jpg,cat\n"), [*files, other])


def test_what_a_spreadsheet_writes_is_read(tmp_path, files):
    text = '\ufeffid, Path ,LABEL,Split\r\n1,"a.jpg",tabby cat,Train\r\n\r\n2,b.jpg,"dog, wet",TEST\r\n'
    found = load_labels(write(tmp_path, text, encoding="utf-8"), files)
    assert found.labels == ["tabby cat", "dog, wet"]
    assert found.splits == ["train", "test"]


def test_names_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    file = IndexedFile(tmp_path / name, name, tmp_path)
    assert load_labels(write(tmp_path, f"path,label\n{name},cat\n"), [file]).rows == [0]


def test_the_order_of_lines_does_not_matter(tmp_path, files):
    found = load_labels(write(tmp_path, "path,label\nsub/c.jpg,z\nb.jpg,y\na.jpg,x\n"), files)
    assert (found.rows, found.labels) == ([0, 1, 2], ["x", "y", "z"])


def test_lines_without_an_indexed_file_are_reported(tmp_path, files):
    found = load_labels(write(tmp_path, "path,label\na.jpg,cat\ngone.jpg,cat\n"), files)
    assert [(row.line, row.path) for row in found.unmatched] == [(3, "gone.jpg")]


def test_a_repeated_line_counts_once(tmp_path, files):
    found = load_labels(write(tmp_path, "path,label\na.jpg,cat\n./a.jpg,cat\n"), files)
    assert (found.rows, found.n_repeated) == ([0], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with 'nothing'"),
        ("file,label\na.jpg,cat\n", "begins with 'file,label'"),
        ("path;label\na.jpg;cat\n", "commas"),
        ("a.jpg,cat\nb.jpg,dog\n", "header"),
        ("path,label,label\na.jpg,cat,dog\n", "header"),
        ("path,label\na.jpg\n", "line 2 has no label"),
        ("path,label\n,cat\n", "line 2 has no path"),
        ("path,label\ngone.jpg,cat\n", "line 2 names 'gone.jpg'"),
        ("path,label\n", "no line"),
        ("path,label\na.jpg,cat\na.jpg,dog\n", "lines 2 and 3 give 'a.jpg' two labels, 'cat' and 'dog'"),
        ("path,label,split\na.jpg,cat,train\na.jpg,cat,test\n", "two splits"),
        ("path,label,split\na.jpg,cat,val\n", "line 2: split is 'val'"),
        ("path,label,split\na.jpg,cat,train\nb.jpg,cat,\n", "split of 1 lines open"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, files, text, message):
    with pytest.raises(DinosearchError, match=message) as caught:
        load_labels(write(tmp_path, text), files)
    assert "\n" not in str(caught.value)


def test_an_empty_split_column_is_none(tmp_path, files):
    assert load_labels(write(tmp_path, "path,label,split\na.jpg,cat,\n"), files).splits is None


def test_what_is_no_text_is_refused(tmp_path, files):
    with pytest.raises(DinosearchError, match="header"):
        load_labels(write(tmp_path, "path,label\na.jpg,cat\n", encoding="utf-16"), files)


def test_a_missing_csv_is_an_error(tmp_path, files):
    with pytest.raises(DinosearchError, match="--labels"):
        load_labels(Path(tmp_path / "none.csv"), files)
