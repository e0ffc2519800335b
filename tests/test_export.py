"""Exports, read back by who will read them."""

import csv
import json
import os
import tarfile

import numpy as np
import pytest
from indexing import DIM, Workshop, a_model, write_images

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.sources import open_sources
from dinosearch.index.contents import read_vectors
from dinosearch.index.export import export_index


@pytest.fixture
def index(tmp_path):
    """12 images of a folder, and a table that names 3 of another."""
    write_images(tmp_path / "folder", 12)
    write_images(tmp_path / "named", 4, seed=50)
    rows = ["named/0000.png,red,3,true", "named/0001.png,,4.5,false", "named/0002.png,1,5,true"]
    (tmp_path / "table.csv").write_text("path,colour,price,sold\n" + "\n".join(rows))
    workshop = Workshop(tmp_path / "folder", tmp_path / "index", a_model(), None, [])
    workshop.sync(roots=open_sources([str(tmp_path / "folder"), str(tmp_path / "table.csv")]))
    return workshop.index


def test_npy_holds_the_vectors_and_a_table_their_images(index, tmp_path):
    array_path, table_path = export_index(index, form="npy", out=tmp_path / "out" / "catalog")
    files, vectors = read_vectors(index)
    assert np.array_equal(np.load(array_path, allow_pickle=False), vectors)
    with table_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(file.path) for file in files]
    assert [row["colour"] for row in rows[-3:]] == ["red", "", "1"]
    assert len(rows) == len(vectors) == 15


def test_csv_holds_both_to_the_last_digit(index, tmp_path):
    [path] = export_index(index, form="csv", out=tmp_path / "catalog.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    vectors = np.array([[row[f"v{i}"] for i in range(DIM)] for row in rows], dtype=np.float32)
    assert np.array_equal(vectors, read_vectors(index)[1])


def test_parquet_keeps_the_types_of_columns(index, tmp_path):
    import pyarrow.parquet as pq

    [path] = export_index(index, form="parquet", out=tmp_path / "catalog")
    table = pq.read_table(path)
    assert {name: str(table.schema.field(name).type) for name in ("frame", "colour", "price", "sold", "vector")} == {
        "frame": "int64",
        "colour": "string",
        "price": "double",
        "sold": "bool",
        "vector": f"fixed_size_list<element: float>[{DIM}]",
    }
    assert table["price"].to_pylist()[-3:] == [3, 4.5, 5]
    assert table["sold"].to_pylist()[-4:] == [None, True, False, True]
    assert np.array_equal(np.stack(table["vector"].to_numpy()), read_vectors(index)[1])


def test_any_number_and_name_of_a_table_passes_into_parquet(tmp_path):
    import pyarrow.parquet as pq

    paths = write_images(tmp_path / "named", 2)
    said = [
        {"vast": 2**70, "price": 2**53 + 1, "vector": "a", "v0": "b"},
        {"vast": 2, "price": 0.5, "vector": "c", "v0": "d"},
    ]
    with tarfile.open(tmp_path / "told.tar", "w") as archive:
        for path, facts in zip(paths, said, strict=True):
            path.with_suffix(".json").write_text(json.dumps(facts))
            archive.add(path, path.name)
            archive.add(path.with_suffix(".json"), path.with_suffix(".json").name)
    workshop = Workshop(tmp_path, tmp_path / "index", a_model(), None, [])
    workshop.sync(roots=open_sources([str(tmp_path / "told.tar")]))
    [path] = export_index(workshop.index, form="parquet", out=tmp_path / os.fsdecode(b"caf\xe9"))
    with path.open("rb") as file:
        table = pq.read_table(file)
    assert table["price"].to_pylist() == [float(2**53 + 1), 0.5]
    assert table["vast"].to_pylist() == [str(2**70), "2"]
    assert table["vector (table)"].to_pylist() == ["a", "c"]
    assert np.array_equal(np.stack(table["vector"].to_numpy()), read_vectors(workshop.index)[1])
    [path] = export_index(workshop.index, form="csv", out=tmp_path / "again")
    with path.open(newline="") as file:
        assert [row["v0 (table)"] for row in csv.DictReader(file)] == ["b", "d"]


@pytest.mark.parametrize("form", ["npy", "csv", "parquet"])
def test_what_a_table_says_stands_beside_the_columns_whose_names_it_uses(tmp_path, form):
    import pyarrow.parquet as pq

    [path] = write_images(tmp_path / "named", 1)
    said = {"frame": "oak", "path": "aisle 7", "size": {"cm": [3, 4]}, "source": "shop", "source (table)": "mill"}
    path.with_suffix(".json").write_text(json.dumps(said))
    with tarfile.open(tmp_path / "told.tar", "w") as archive:
        for each in (path, path.with_suffix(".json")):
            archive.add(each, each.name)
    workshop = Workshop(tmp_path, tmp_path / "index", a_model(), None, [])
    workshop.sync(roots=open_sources([str(tmp_path / "told.tar")]))
    written = export_index(workshop.index, form=form, out=tmp_path / "catalog")[-1]
    if form == "parquet":
        [row] = pq.read_table(written).to_pylist()
    else:
        with written.open(newline="") as file:
            [row] = csv.DictReader(file)
    assert {name: value for name, value in row.items() if not name.startswith("v")} == {
        "path": f"{tmp_path}/told.tar/0000.png",
        "source": f"{tmp_path}/told.tar",
        "relative": "",
        "member": "0000.png",
        "frame": 0 if form == "parquet" else "0",
        "frame (table)": "oak",
        "path (table)": "aisle 7",
        "size": '{"cm": [3, 4]}',
        "source (table)": "shop",
        "source (table) (table)": "mill",
    }


def test_an_unknown_form_is_refused_and_nothing_half_is_left(index, tmp_path):
    with pytest.raises(UsageError, match="npy, csv, parquet"):
        export_index(index, form="xlsx")
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    with pytest.raises(DinosearchError, match="--out"):
        export_index(index, form="npy", out=blocked / "catalog")
    assert not list(tmp_path.rglob("*.part"))


def test_the_same_row_holds_what_a_table_says(index, tmp_path):
    _, table_path = export_index(index, form="npy", out=tmp_path / "catalog")
    with table_path.open(newline="") as file:
        said = {row["relative"]: row["price"] for row in csv.DictReader(file) if row["price"]}
    assert said == {"named/0000.png": "3.0", "named/0001.png": "4.5", "named/0002.png": "5.0"}


@pytest.mark.parametrize("form", ["npy", "csv"])
def test_a_source_is_never_replaced_by_an_export(index, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.csv").symlink_to("table.csv")
    index = index.rename(tmp_path / "table")  # as `index table.csv` names it
    before = (tmp_path / "table.csv").read_bytes()
    for out in (None, tmp_path / "table", tmp_path / "named" / ".." / "table", tmp_path / "linked"):
        with pytest.raises(UsageError, match=r"\.csv is a source of the index; .* --out"):
            export_index(index, form=form, out=out)
    assert (tmp_path / "table.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.npy"))


def test_what_is_there_is_replaced_only_where_it_was_named(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index.csv").write_text("mine")
    for form in ("npy", "csv"):
        with pytest.raises(UsageError, match=r"index\.csv exists\. .* --out"):
            export_index(index, form=form)
    assert (tmp_path / "index.csv").read_text() == "mine"
    [path] = export_index(index, form="csv", out=tmp_path / "index")
    assert path.read_text().startswith("path,")
