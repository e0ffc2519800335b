import os
from pathlib import Path

import pytest

from dinosearch.errors import DinosearchError, UsageError
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


def test_a_quote_that_nobody_closes_swallows_no_lines(tmp_path, files):
    with pytest.raises(DinosearchError, match=r"is no CSV .line 2: .* Close its quotes"):
        load_labels(write(tmp_path, 'path,label\ncatalog/a.jpg,"cat\ncatalog/b.jpg,dog\n'), files)


def test_a_missing_csv_is_an_error(tmp_path, files):
    with pytest.raises(DinosearchError, match="--labels"):
        load_labels(Path(tmp_path / "none.csv"), files)


def indexed(tmp_path, *names, root="catalog"):
    return [IndexedFile(tmp_path / root / name, name, tmp_path / root) for name in names]


def test_the_first_folder_below_a_root_is_a_label(tmp_path):
    files = indexed(tmp_path, "dog/b.jpg", "x.jpg", "cat/old/a.jpg", "dog/a.jpg")
    found = load_labels("folders", [*files, *indexed(tmp_path, "cat/z.jpg", root="more")])
    assert (found.rows, found.labels) == ([2, 3, 0, 4], ["cat", "dog", "dog", "cat"])
    assert (found.splits, found.unmatched, found.n_outside) == (None, [], 1)


def test_by_folder_the_first_of_several_pages_counts(tmp_path):
    root = tmp_path / "catalog"
    pages = [IndexedFile(root / "cat/p.tif", "cat/p.tif", root, frame=frame) for frame in range(3)]
    found = load_labels("folders", [*pages, *indexed(tmp_path, "dog/a.jpg")])
    assert (found.rows, found.labels) == ([0, 3], ["cat", "dog"])


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_of_a_split_are_no_labels(tmp_path, held_out):
    files = indexed(tmp_path, "train/cat/a.jpg", f"{held_out}/cat/b.jpg", "train/dog/far/c.jpg", "train/stray.jpg")
    found = load_labels("folders", files)
    splits = {files[row].relative: split for row, split in zip(found.rows, found.splits, strict=True)}
    assert splits == {"train/cat/a.jpg": "train", f"{held_out}/cat/b.jpg": "test", "train/dog/far/c.jpg": "train"}
    assert sorted(found.labels) == ["cat", "cat", "dog"]
    assert found.n_outside == 1
    both = load_labels("folders", [*files, *indexed(tmp_path, "val/dog/d.jpg", "test/dog/e.jpg")])
    assert (sorted(both.labels), sorted(both.splits)) == (["cat"] * 2 + ["dog"] * 3, ["test"] * 3 + ["train"] * 2)


def test_a_split_without_labels_on_one_side_is_none(tmp_path):
    found = load_labels("folders", indexed(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "test/1.jpg", "test/2.jpg"))
    assert (found.labels, found.splits, found.n_outside) == (["cat", "dog"], None, 2)


@pytest.mark.parametrize("names", [["train/a.jpg", "test/b.jpg"], ["train/cat/a.jpg", "bus/red/b.jpg"]])
def test_folders_called_train_may_be_labels(tmp_path, names):
    found = load_labels("folders", indexed(tmp_path, *names))
    assert sorted(found.labels) == sorted(name.split("/")[0] for name in names)
    assert found.splits is None


@pytest.mark.parametrize("named", ["https://host/cat/a.jpg", "/far/cat/a.jpg", "../cat/a.jpg", "a.jpg"])
def test_what_a_list_names_from_elsewhere_lies_in_no_folder(tmp_path, named):
    listed = IndexedFile(named, named, tmp_path / "list.txt")
    with pytest.raises(UsageError, match="subfolders"):
        load_labels("folders", [listed])
    found = load_labels("folders", [listed, *indexed(tmp_path, "cat/a.jpg")])
    assert (found.labels, found.n_outside) == (["cat"], 1)


def test_a_file_called_folders_is_a_csv_when_named_as_a_path(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folders").write_text("path,label\ncatalog/a.jpg,cat\n")
    assert load_labels("./folders", files).labels == ["cat"]


def test_folders_in_archives_are_labels_too(tmp_path):
    root = tmp_path / "pets.zip"
    members = ["cat/a.jpg", "dog/b.jpg", "c.jpg", "../d.jpg"]
    files = [IndexedFile(root / member, "", root, member=member) for member in members]
    found = load_labels("folders", files)
    assert [(files[row].member, label) for row, label in zip(found.rows, found.labels, strict=True)] == [
        ("cat/a.jpg", "cat"),
        ("dog/b.jpg", "dog"),
    ]
    assert found.n_outside == 2
