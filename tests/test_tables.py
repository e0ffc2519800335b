"""Tables that name images: which column has the paths, what becomes of the others."""

import datetime
import decimal
import json
import os
from pathlib import Path

import pytest

from dinosearch.errors import DinosearchError
from dinosearch.images.source import UNTRUSTED_TIME, ScanOptions
from dinosearch.images.sources import open_source


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg", "ü,x.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())


def rows(name):
    """Path and metadata of each image."""
    [source] = open_source(name)
    scan = source.scan(ScanOptions(), note=lambda _: None)
    return {image.path: json.loads(image.metadata) if image.metadata else {} for image in scan.images}


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_columns_beside_the_path_become_metadata_of_the_columns_type():
    table = '''path,width,price,is_new,code,title,empty
a.jpg,640,1.5,true,007,A dog,
b.jpg,320,2,FALSE,12,"two, ""three""",
sub/c.jpg,,1e3,,x,,
"ü,x.jpg",5,-.5,True,1,ü,
'''
    assert rows(write("t.csv", table)) == {
        "a.jpg": {"width": 640, "price": 1.5, "is_new": True, "code": "007", "title": "A dog"},
        "b.jpg": {"width": 320, "price": 2.0, "is_new": False, "code": "12", "title": 'two, "three"'},
        "sub/c.jpg": {"price": 1000.0, "code": "x"},
        "ü,x.jpg": {"width": 5, "price": -0.5, "is_new": True, "code": "1", "title": "ü"},
    }
    assert type(rows("t.csv")["a.jpg"]["width"]) is int
    assert type(rows("t.csv")["b.jpg"]["price"]) is float


@pytest.mark.parametrize("cell", ["nan", "inf", "1e999", "1_000", "0x1F", "12345678901234567890", "٣", "--1", "1."])
def test_what_is_not_plainly_a_number_stays_text(cell):
    assert rows(write("t.csv", f"path,x\na.jpg,{cell}\n")) == {"a.jpg": {"x": cell}}


def test_tabs_byte_order_marks_and_windows_line_ends():
    assert rows(write("t.tsv", "\ufeffPath\tlabel, long\r\na.jpg\tx,y\r\n\r\nb.jpg\t\r\n")) == {
        "a.jpg": {"label, long": "x,y"},
        "b.jpg": {},
    }


@pytest.mark.parametrize("column", ["path", "image", "File", "filename", "image_path", "url"])
def test_the_column_of_paths_may_have_other_names(column):
    assert rows(write("t.csv", f"x,{column}\n1,a.jpg\n")) == {"a.jpg": {"x": 1}}


def test_of_several_columns_that_may_have_the_paths_path_comes_first():
    assert rows(write("t.csv", "url,image,path\nhttp://x/a.jpg,b.jpg,a.jpg\n")) == {
        "a.jpg": {"url": "http://x/a.jpg", "image": "b.jpg"}
    }


def test_equal_lines_count_once_and_contradicting_ones_are_named():
    assert rows(write("t.csv", "path,x\na.jpg,1\n./a.jpg,1\n")) == {"a.jpg": {"x": 1}}
    with pytest.raises(DinosearchError, match=r"lines 2 and 4 say different things of 'a.jpg'"):
        rows(write("t.csv", "path,x\na.jpg,1\nb.jpg,1\na.jpg,2\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "one column named path"),
        ("a.jpg,1\n", "its header is 'a.jpg,1'"),
        ("path,Path\na.jpg,b.jpg\n", "one column named path"),
        ("path,x\n,1\n", "line 2 has no path"),
        ('path,x\na.jpg,"' + "x" * 200_000, "is no CSV"),
    ],
)
def test_a_csv_that_names_no_images_says_what_is_wrong(text, says):
    with pytest.raises(DinosearchError, match=says) as caught:
        rows(write("t.csv", text))
    assert "\n" not in str(caught.value)


def test_a_row_whose_file_is_missing_is_an_image_that_cannot_be_read():
    [source] = open_source(write("t.csv", "path\ngone.jpg\na.jpg\n"))
    _, image = source.scan(ScanOptions(), note=lambda _: None).images
    assert (image.path, image.size, image.mtime_ns) == ("gone.jpg", 0, UNTRUSTED_TIME)


def test_metadata_of_another_encoding_becomes_text_and_paths_keep_their_bytes():
    Path(os.fsdecode(b"\xe9.jpg")).write_bytes(b"x")
    Path("t.csv").write_bytes(b"path,gr\xf6\xdfe,\xfc\n\xe9.jpg,5\x80,a\x81\na.jpg,,\n")
    [source] = open_source("t.csv")
    images = source.scan(ScanOptions(), note=lambda _: None).images
    assert [image.path for image in images] == ["a.jpg", "\udce9.jpg"]
    assert json.loads(images[1].metadata) == {"größe": "5€", "ü": "a\ufffd"}


def test_parquet_columns_keep_their_types(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)
    columns = {
        "image": ["a.jpg", "b.jpg"],
        "n": arrow.array([2**40, None], arrow.int64()),
        "x": [0.5, float("nan")],
        "ok": [True, None],
        "day": [when.date(), None],
        "time": arrow.array([1_714_979_289_123_456_789, None], arrow.timestamp("ns")),
        "cost": [decimal.Decimal("1.25"), None],
        "kind": arrow.array(["cat", "dog"]).dictionary_encode(),
        "vector": [[1.0, 2.0], [3.0]],
        "bytes": [b"\x00", b"\xff"],
    }
    parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    assert rows("t.parquet") == {
        "a.jpg": {
            **{"n": 2**40, "x": 0.5, "ok": True, "day": "2024-05-06", "time": when.isoformat(), "cost": 1.25},
            **{"kind": "cat"},
        },
        "b.jpg": {"kind": "dog"},
    }


def test_a_parquet_file_that_is_none_or_has_no_paths_says_so(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(DinosearchError, match="is no Parquet file"):
        rows(write("t.parquet", "path\na.jpg\n"))
    parquet.write_table(arrow.table({"path": [{"bytes": b"", "path": "a.jpg"}]}), tmp_path / "t.parquet")
    with pytest.raises(DinosearchError, match="row 1: path is no path"):
        rows("t.parquet")
    parquet.write_table(arrow.table({"x": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DinosearchError, match="its header is 'x'"):
        rows("t.parquet")


def test_without_pyarrow_parquet_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DinosearchError, match=r"pip install 'dinosearch\[tables\]'"):
        rows(write("t.parquet", "PAR1"))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_quote_that_nobody_closes_swallows_no_images(name):
    between = "\t" if name == "t.tsv" else ","
    for lines in (
        ["path,title", 'a.jpg,"Hello', "b.jpg,x", "sub/c.jpg,y"],
        ["path,title", 'a.jpg,"Hello', 'b.jpg,"x"'],
    ):
        with pytest.raises(DinosearchError, match=f"{name} is no CSV .line 2: .* Close its quotes"):
            rows(write(name, "\n".join(lines).replace(",", between)))
    text = 'path,title\na.jpg,"two\nlines"\nb.jpg,"so" she said\n'.replace(",", between)
    assert rows(write(name, text)) == {"a.jpg": {"title": "two\nlines"}, "b.jpg": {"title": "so she said"}}
