"""The catalog: which files there are, what they hold and the vector of each content. SQLite, the truth of an index.

Knows nothing of sources, of decoding or of FAISS. It is the only module that writes rows; `reader` is the only one that
reads them.

Identity is the hash of a file's content: equal files share one vector, a moved file keeps it. Vectors are stored as
float16 and given out as float32 of unit length, so that a vector is the same number wherever it is read from.
Vector ids are never used twice; a FAISS file that names a pruned id can therefore never point at another image.
Paths and names of members that are not UTF-8 are stored as BLOB, all others as TEXT.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dinosearch.errors import IndexNotFound, IndexUnusable
from dinosearch.index import database
from dinosearch.index.database import explained
from dinosearch.index.lock import writer_lock
from dinosearch.index.reader import CatalogReader
from dinosearch.index.rows import (
    FileRow,
    Generation,
    RootOptions,
)
from dinosearch.index.schema import FORMAT, check_format, make_tables, migrate

FILE_NAME = "catalog.sqlite"
CONTENT_HASH = "blake3"
"""What new catalogs know contents by; one that grew from format 1 goes on with its own."""
ERASURE_WAITS = (
    "the last traces on the disk go with the next run of index or forget: another program reads the index now, or the "
    "disk has no room for a copy of its catalog"
)
"""Where `Catalog.finish_erasure` cannot."""


class Catalog(CatalogReader):
    """One open catalog. One writer (the caller holds the index's lock), any number of readers.

    Writes gather in one transaction until `commit()`; leaving without it undoes them. Methods raise DinosearchError
    when the disk is full and IndexUnusable when the file is damaged.
    """

    # -- opening

    @classmethod
    def create(
        cls,
        index_path: Path,
        *,
        fingerprint: str,
        model: str,
        dim: int,
        shard: str | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> Catalog:
        """Make the catalog of a new index. What one killed attempt left behind is finished, never taken as an index."""
        path = index_path / FILE_NAME
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        meta = {"created": created, "fingerprint": fingerprint, "model": model, "dim": str(dim)}
        meta |= {"content_hash": CONTENT_HASH} | ({"shard": shard} if shard else {})
        with explained(path):
            connection = database.create(path)
            try:
                database.set_journal(connection, path, note)
                make_tables(connection, meta)
            except BaseException:
                connection.close()
                raise
        return cls(connection, path)

    @classmethod
    def open(cls, index_path: Path, *, writable: bool = False, note: Callable[[str], None] = lambda _: None) -> Catalog:
        """Open the catalog of an index; one of an earlier format is first brought to today's.

        Who opens it writable holds the index's lock. Raises IndexNotFound, or IndexUnusable: damaged, of a newer
        format, or of an earlier one where it may not be written.
        """
        path = index_path / FILE_NAME
        if not path.exists():
            raise IndexNotFound(
                f"no index in {index_path}. Build one: dinosearch index IMAGES --name {index_path.name}"
            )
        with explained(path):
            connection = database.connect(path, writable=writable)
            try:
                earlier = check_format(connection, index_path) < FORMAT
                if writable:
                    database.set_journal(connection, path, note)
                    if earlier:
                        migrate(connection)
            except BaseException:
                connection.close()
                raise
        if not earlier or writable:
            return cls(connection, path)
        connection.close()
        _bring_forward(index_path, note)
        return cls.open(index_path)

    # -- writing

    def add_root(self, kind: str, location: str) -> int:
        """Number of a root, added if it is new."""
        self._write("INSERT OR IGNORE INTO roots (path, kind) VALUES (?, ?)", [(_stored(location), kind)])
        return int(self._rows("SELECT id FROM roots WHERE path = ?", (_stored(location),))[0][0])

    def set_options(self, root: int, options: RootOptions) -> None:
        """Remember how a root is to be seen; what was known of it by another view is to be scanned again."""
        self._write("UPDATE roots SET options = ?2, stamp = NULL WHERE id = ?1", [(root, json.dumps(asdict(options)))])

    def set_stamp(self, root: int, stamp: str | None) -> None:
        """Remember the state of a root in which all of it is known."""
        self._write("UPDATE roots SET stamp = ?2 WHERE id = ?1", [(root, stamp)])

    def put_vectors(
        self, contents: Iterable[tuple[str, int, int, int]], vectors: np.ndarray, *, fingerprint: str
    ) -> None:
        """Add vectors float [n, dim] of (content hash, frame, width, height); those that are there stay as they are."""
        halves = vectors.astype(np.float16)
        self._write(
            """INSERT OR IGNORE INTO vectors (fingerprint, content_hash, frame, width, height, vector)
            VALUES (?, ?, ?, ?, ?, ?)""",
            (
                (fingerprint, content_hash, frame, width, height, half.tobytes())
                for (content_hash, frame, width, height), half in zip(contents, halves, strict=True)
            ),
        )

    def put_files(self, rows: Iterable[FileRow]) -> None:
        """Write what was found, all or nothing. A file that cannot be read keeps the hash it had: it may come back."""
        with self._whole():
            self._put_files(list(rows))

    def _put_files(self, rows: list[FileRow]) -> None:
        self._write(
            """INSERT INTO files (root, path, member, frame, size, mtime_ns, content_hash, status, reason, width,
            height, decoders, frames, metadata) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, nullif(?, ''))
            ON CONFLICT (root, path, member, frame) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns,
            content_hash = CASE excluded.status WHEN 'unreadable' THEN coalesce(excluded.content_hash, content_hash)
            ELSE excluded.content_hash END, status = excluded.status,
            reason = excluded.reason, width = excluded.width, height = excluded.height, decoders = excluded.decoders,
            frames = excluded.frames, metadata = excluded.metadata""",
            (
                (row.root, _stored(row.path), _stored(row.member), row.frame, row.size, row.mtime_ns, row.content_hash,
                 row.status, row.reason, row.width, row.height, row.decoders, row.frames, row.metadata)
                for row in rows
            ),
        )  # fmt: skip
        self._write(
            "DELETE FROM files WHERE root = ? AND path = ? AND member = ? AND frame >= ?",
            ((row.root, _stored(row.path), _stored(row.member), row.frames or 1) for row in rows if row.frame == 0),
        )

    def forget_frames(self, root: int) -> None:
        """Of a root's files, only the first frames are looked at from now on."""
        self._write("DELETE FROM files WHERE root = ? AND frame > 0", [(root,)])
        self._write("UPDATE files SET frames = NULL WHERE root = ?", [(root,)])

    def set_metadata(self, metadata: Iterable[tuple[int, str]]) -> None:
        """What a table now says of files (their id), with all their frames, that are as they were."""
        self._write(
            """UPDATE files SET metadata = nullif(?2, '')
            WHERE (root, path, member) = (SELECT root, path, member FROM files WHERE id = ?1)""",
            metadata,
        )

    def move_files(self, moves: Iterable[tuple[int, FileRow]]) -> None:
        """Give files (their id) another root, path, member, size, mtime_ns and metadata; what they hold stays."""
        self._write(
            """UPDATE files SET root = ?2, path = ?3, member = ?4, size = ?5, mtime_ns = ?6, metadata = nullif(?7, '')
            WHERE (root, path, member) = (SELECT root, path, member FROM files WHERE id = ?1)""",
            (
                (number, row.root, _stored(row.path), _stored(row.member), row.size, row.mtime_ns, row.metadata)
                for number, row in moves
            ),
        )

    def remove_files(self, ids: Iterable[int]) -> None:
        """Take files, with all their frames, out of the results. Their vectors stay until `prune`."""
        self._write(
            """DELETE FROM files
            WHERE (root, path, member) = (SELECT root, path, member FROM files WHERE id = ?)""",
            ((number,) for number in ids),
        )

    def prune(self) -> int:
        """Forget vectors that no file has, and those of other models than the answering one. Returns how many.

        Their traces, and the space they took, go with `finish_erasure` after the commit.
        """
        with self._transaction():
            self._connection.execute("PRAGMA secure_delete = ON")
            cursor = self._connection.execute(
                """DELETE FROM vectors WHERE fingerprint != ? OR NOT EXISTS (SELECT 1 FROM files AS f
                WHERE f.content_hash = vectors.content_hash AND f.frame = vectors.frame)""",
                (self.fingerprint,),
            )
            if cursor.rowcount:
                self._write("INSERT OR REPLACE INTO meta VALUES ('erasing', ?)", [("1",)])
            return cursor.rowcount

    def put_generation(self, generation: Generation) -> None:
        """Name a FAISS file that is complete on the disk; the ones before the last two are forgotten."""
        # The fields are named and ordered as the columns are.
        self._write("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [astuple(generation)])
        self._write("DELETE FROM generations WHERE number <= ? - 2", [(generation.number,)])

    def restamp(self, generation: Generation) -> None:
        """Believe the inodes and times that a generation's files have now."""
        self._write(
            "UPDATE generations SET stamp = ?, details = ? WHERE number = ?",
            [(generation.stamp, generation.details, generation.number)],
        )

    def set_content_hash(self, algorithm: str) -> None:
        """Know contents by another hash; the catalog has none yet."""
        self._write("UPDATE meta SET value = ? WHERE key = 'content_hash'", [(algorithm,)])

    def set_recall(self, recall: float) -> None:
        """Want so many of the 10 nearest found, from the next generation on."""
        self._write("INSERT OR REPLACE INTO meta VALUES ('recall', ?)", [(str(recall),)])

    def set_precision(self, precision: str) -> None:
        """Have images embedded, and the index asked, in this precision from now on, for all encoders that have it."""
        self._write("INSERT OR REPLACE INTO meta VALUES ('precision', ?)", [(precision,)])

    def set_model(self, *, fingerprint: str, model: str, dim: int) -> None:
        """Let the vectors of another model answer from the next commit on."""
        meta = {"fingerprint": fingerprint, "model": model, "dim": str(dim)}
        self._write("UPDATE meta SET value = ?2 WHERE key = ?1", meta.items())

    def commit(self) -> None:
        """Make what was written durable and visible to readers, all at once."""
        with self._lock, explained(self.path):
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")

    def erase_files(self, ids: Sequence[int]) -> int:
        """Forget files with all their frames and the vectors of any model that no other file needs: how many?

        Freed space is overwritten. What remains of them in the write-ahead log and between the rows, `finish_erasure`
        removes after the commit, or the next writer if this one is killed.
        """
        with self._transaction():
            self._connection.execute("PRAGMA secure_delete = ON")
            query = "SELECT content_hash FROM files WHERE id = ?"
            contents = dict.fromkeys(row for number in ids for row in self._rows(query, (number,)))
            self.remove_files(ids)
            self._write("INSERT OR REPLACE INTO meta VALUES ('erasing', ?)", [("1",)])
            before = self._connection.total_changes
            self._write(
                """DELETE FROM vectors WHERE content_hash = ?1
                AND NOT EXISTS (SELECT 1 FROM files WHERE content_hash = ?1)""",
                contents,
            )
            return self._connection.total_changes - before

    def finish_erasure(self) -> bool:
        """Remove the last traces of what was erased from the catalog's files; False if that has to wait.

        A reader still needs them then, or there is no room for the second copy that it takes.
        """
        if not self._rows("SELECT 1 FROM meta WHERE key = 'erasing'"):
            return True
        with self._lock, explained(self.path):
            self._connection.execute("PRAGMA secure_delete = ON")
            try:
                self._connection.execute("VACUUM")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY):
                    return False
                raise
            busy = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            if not busy:
                self._connection.execute("DELETE FROM meta WHERE key = 'erasing'")
        return not busy

    def remove_root(self, root: int) -> None:
        """Stop following a source all of whose files are gone from the catalog."""
        self._write("DELETE FROM roots WHERE id = ?", [(root,)])

    def forget_generations(self, *, but: int) -> None:
        """Let no FAISS file be named but one."""
        self._write("DELETE FROM generations WHERE number != ?", [(but,)])

    def relocate(self, root: int, location: str, paths: Iterable[tuple[int, str]]) -> None:
        """Give a root another location, and some of its files (their id) another path."""
        self._write("UPDATE roots SET path = ?2 WHERE id = ?1", [(root, _stored(location))])
        new = dict(paths)
        # In two steps: one file may come to where another, which moves too, still is.
        for mark in ("\0", ""):
            self._write(
                """UPDATE files SET path = ?2
                WHERE (root, path, member) = (SELECT root, path, member FROM files WHERE id = ?1)""",
                ((number, _stored(mark + path)) for number, path in new.items()),
            )

    def _write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        with self._transaction():
            self._connection.executemany(statement, rows)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is written here is undone by an error, or a signal, in the middle of it; what was before stays."""
        with self._transaction():
            self._connection.execute("SAVEPOINT whole")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # on a full disk SQLite may have ended it
                    self._connection.execute("ROLLBACK TO whole")
                    self._connection.execute("RELEASE whole")
                raise
            self._connection.execute("RELEASE whole")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, explained(self.path):
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            yield


def is_index(index_path: Path) -> bool:
    """Whether a folder holds a catalog, be it one that was only begun."""
    return os.path.isfile(index_path / FILE_NAME)  # noqa: PTH113 - Path's raises where it may not look


def _bring_forward(index_path: Path, note: Callable[[str], None]) -> None:
    """Migrate the catalog for a reader: it is a matter of milliseconds, once."""
    if not os.access(index_path, os.W_OK):
        raise IndexUnusable(
            f"the index in {index_path} has an earlier format and may not be written here. "
            f"Let its owner run once: dinosearch info --index {index_path.name}"
        )
    with writer_lock(index_path), Catalog.open(index_path, writable=True, note=note):
        pass


def _stored(path: str) -> str | bytes:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path
