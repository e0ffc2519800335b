import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from indexing import Workshop, a_model, write_images

from dinosearch.errors import IndexLocked, IndexUnusable
from dinosearch.images.decode import content_hash
from dinosearch.index import schema
from dinosearch.index.catalog import Catalog
from dinosearch.index.contents import index_info, read_vectors
from dinosearch.index.lock import writer_lock
from dinosearch.query.search import open_index

FORMAT_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (id INTEGER PRIMARY KEY, path NOT NULL UNIQUE);
CREATE TABLE vectors (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    fingerprint TEXT NOT NULL,
    content_hash TEXT NOT NULL,
    frame INTEGER NOT NULL DEFAULT 0,
    width INTEGER,
    height INTEGER,
    vector BLOB NOT NULL,
    UNIQUE (fingerprint, content_hash, frame)
);
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    root INTEGER NOT NULL REFERENCES roots (id),
    path NOT NULL,
    member TEXT NOT NULL DEFAULT '',
    frame INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    content_hash TEXT,
    status TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    width INTEGER,
    height INTEGER,
    decoders TEXT,
    UNIQUE (root, path, member, frame)
);
CREATE INDEX files_by_content ON files (content_hash, frame, status);
CREATE TABLE generations (
    number INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    file TEXT NOT NULL,
    kind TEXT NOT NULL,
    size INTEGER NOT NULL,
    checksum TEXT NOT NULL,
    stamp TEXT NOT NULL,
    n INTEGER NOT NULL,
    max_id INTEGER NOT NULL,
    recall_at_10 REAL
);
"""
"""The tables of format 1, word for word."""


@pytest.fixture
def shop(tmp_path):
    """An index as a program of format 1 leaves it: its tables, its content hashes, its FAISS file."""
    write_images(tmp_path / "images", 6)
    shop = Workshop(tmp_path / "images", tmp_path / "indexes" / "images", a_model(), None, [])
    shop.sync()
    to_format_1(shop.index / "catalog.sqlite")
    return shop


def to_format_1(path):

    new = sqlite3.connect(path)
    path.with_suffix(".old").unlink(missing_ok=True)
    old = sqlite3.connect(path.with_suffix(".old"))
    for statement in FORMAT_1.split(";\n"):
        old.execute(statement)
    old.execute("PRAGMA application_id = 0x44494E4F")
    old.execute("PRAGMA user_version = 1")
    [(root,)] = new.execute("SELECT path FROM roots")
    hashes = {
        name: content_hash((Path(root) / name).read_bytes(), "blake2b")
        for (name,) in new.execute("SELECT path FROM files")
    }
    of_new = dict(new.execute("SELECT content_hash, path FROM files"))
    for table, hashed in (("meta", None), ("roots", None), ("vectors", 2), ("files", 7), ("generations", None)):
        columns = [row[1] for row in old.execute(f"PRAGMA table_info({table})")]
        for row in new.execute(f"SELECT {', '.join(columns)} FROM {table}"):
            if hashed is not None:
                row = (*row[:hashed], hashes[of_new[row[hashed]]], *row[hashed + 1 :])
            if row[0] != "content_hash":
                old.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(row))})", row)
    old.commit()
    old.execute("PRAGMA journal_mode = WAL")
    old.close()
    new.close()
    path.with_suffix(".old").replace(path)


def test_a_catalog_of_format_1_goes_on_without_embedding_anything(shop):

    summary = shop.sync()
    assert (summary.unchanged, summary.embedded, summary.images) == (6, 0, 6)
    with Catalog.open(shop.index) as catalog:
        assert catalog.meta("content_hash") == "blake2b"
        [root] = catalog.roots().values()
        assert (root.kind, root.options, root.stamp) == ("folder", type(root.options)(), None)
    (shop.root / "0000.png").rename(shop.root / "moved.png")
    (shop.root / "copy.png").write_bytes((shop.root / "0001.png").read_bytes())
    summary = shop.sync()
    assert (summary.moved, summary.new, summary.embedded, summary.images) == (1, 1, 0, 7)
    names, vectors = read_vectors(shop.index)
    assert len(names) == len(vectors) == 7


def test_a_reader_brings_a_catalog_of_format_1_forward(shop):
    with open_index(shop.index) as index:
        [matches] = index.search(read_vectors(shop.index)[1][:1], top=6)
    assert [len(matches), matches[0].path.name] == [6, "0000.png"]
    with sqlite3.connect(shop.index / "catalog.sqlite") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (schema.FORMAT,)


def test_a_catalog_that_grew_has_the_tables_of_a_new_one(shop, tmp_path):
    with Catalog.open(shop.index) as grown:
        Catalog.create(tmp_path, fingerprint="f", model="m", dim=1).close()
        with Catalog.open(tmp_path) as new:
            for table in ("meta", "roots", "vectors", "files", "generations"):
                assert grown._rows(f"PRAGMA table_info({table})") == new._rows(f"PRAGMA table_info({table})")


def test_a_migration_killed_anywhere_leaves_the_earlier_format_whole(shop, monkeypatch):
    path = shop.index / "catalog.sqlite"
    steps = schema._STEPS[1].split(";\n")
    for killed_after in range(1, len(steps)):
        monkeypatch.setitem(schema._STEPS, 1, ";\n".join([*steps[:killed_after], "SELECT no_such_function()"]))
        with pytest.raises(Exception, match="no_such_function"), Catalog.open(shop.index, writable=True):
            pass
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (1,)
            assert len(connection.execute("PRAGMA table_info(roots)").fetchall()) == 2
    monkeypatch.undo()
    assert index_info(shop.index).images == 6


def test_a_reader_says_who_holds_an_index_that_is_yet_to_be_brought_forward(shop):
    with writer_lock(shop.index), pytest.raises(IndexLocked, match=f"process {os.getpid()}"), Catalog.open(shop.index):
        pass


READ_ONLY = """
import os, sys
from pathlib import Path
from dinosearch.index.catalog import Catalog
if os.geteuid() == 0:
    os.setuid(65534)
try:
    Catalog.open(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_an_earlier_format_in_a_read_only_folder_is_said_with_what_to_do():

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        write_images(Path(folder) / "images", 2)
        shop = Workshop(Path(folder) / "images", Path(folder) / "index", a_model(), None, [])
        shop.sync()
        to_format_1(shop.index / "catalog.sqlite")
        shop.index.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(shop.index)], capture_output=True, text=True, check=True
        )
        shop.index.chmod(0o755)
    assert done.stdout.startswith("IndexUnusable the index in")
    assert "earlier format" in done.stdout
    assert "dinosearch info --index index" in done.stdout


def test_a_newer_format_is_refused(tmp_path):
    Catalog.create(tmp_path, fingerprint="f", model="m", dim=1).close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.execute(f"PRAGMA user_version = {schema.FORMAT + 1}")
    for writable in (False, True):
        with pytest.raises(IndexUnusable, match="Update dinosearch") as caught:
            Catalog.open(tmp_path, writable=writable)
        assert caught.value.exit_code == 4
