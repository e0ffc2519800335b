"""The tables of a catalog, and how one of an earlier format becomes one of today's. Knows no rows but `meta`."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from dinosearch.errors import IndexNotFound, IndexUnusable

FORMAT = 2

_APPLICATION_ID = 0x44494E4F  # "DINO": a foreign SQLite file is told apart before anything is read from it
# Columns that came with a later format stand last, where ALTER TABLE puts them: catalogs that grew equal new ones.
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (
    id INTEGER PRIMARY KEY,
    path NOT NULL UNIQUE,
    kind TEXT NOT NULL DEFAULT 'folder',
    options TEXT NOT NULL DEFAULT '{}',
    stamp TEXT
);
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
    metadata TEXT,
    frames INTEGER,
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
    recall_at_10 REAL,
    details TEXT
);
"""
_STEPS = {
    1: """
ALTER TABLE roots ADD COLUMN kind TEXT NOT NULL DEFAULT 'folder';
ALTER TABLE roots ADD COLUMN options TEXT NOT NULL DEFAULT '{}';
ALTER TABLE roots ADD COLUMN stamp TEXT;
ALTER TABLE files ADD COLUMN metadata TEXT;
ALTER TABLE files ADD COLUMN frames INTEGER;
ALTER TABLE generations ADD COLUMN details TEXT;
INSERT OR IGNORE INTO meta VALUES ('content_hash', 'blake2b');
"""
}
"""By format: what makes the next one of it."""


def make_tables(connection: sqlite3.Connection, meta: Mapping[str, str]) -> None:
    """All tables and what the index is, in one transaction: a catalog is whole or not there."""
    connection.execute("BEGIN IMMEDIATE")
    _execute_all(connection, _TABLES)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    connection.execute("COMMIT")


def check_format(connection: sqlite3.Connection, index_path: Path) -> int:
    """The format of a catalog. Raises IndexNotFound if it was only begun, IndexUnusable if it is foreign or newer."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if application == 0 and version == 0 and not connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
        if any(index_path.glob("vectors-*")):
            raise IndexUnusable(
                f"the catalog in {index_path} is damaged (it is empty, and was not). "
                f"Put a copy back, or delete {index_path} and index again"
            )
        raise IndexNotFound(
            f"the index in {index_path} is not made yet. Run: dinosearch index IMAGES --name {index_path.name}"
        )
    if application != _APPLICATION_ID:
        raise IndexUnusable(f"the catalog in {index_path} is no catalog of dinosearch. Name another --index")
    if version > FORMAT:
        raise IndexUnusable(
            f"the index in {index_path} has format {version}, this dinosearch reads up to {FORMAT}. "
            "Update dinosearch, or index again under another name."
        )
    return version


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a catalog to today's format in one transaction: killed anywhere, it is still the earlier one."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have done it since the format was looked at.
        for version in range(int(connection.execute("PRAGMA user_version").fetchone()[0]), FORMAT):
            _execute_all(connection, _STEPS[version])
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _execute_all(connection: sqlite3.Connection, statements: str) -> None:
    """One by one: `executescript` would commit first."""
    for statement in statements.split(";\n"):
        connection.execute(statement)
