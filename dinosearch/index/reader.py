"""Reading a catalog: every question that is asked of it. Knows nothing of how it is opened or written."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from dinosearch.images.source import UNTRUSTED_TIME
from dinosearch.index.conditions import BUILT_IN, Condition
from dinosearch.index.database import ImmutableConnection, damaged, explained, stamp_of
from dinosearch.index.rows import (
    OK,
    UNREADABLE,
    Content,
    CopiedFile,
    DecoderKeys,
    FailedFile,
    FileRow,
    Generation,
    LiveFile,
    Root,
    RootOptions,
    StoredFile,
)

_BLOCK = 4096  # rows fetched at a time: bounds memory whatever the size of the index
# Files that a search can return: readable ones whose content has a vector of the answering model.
_LIVE = """files AS f JOIN vectors AS v
    ON v.content_hash = f.content_hash AND v.frame = f.frame AND v.fingerprint = ? AND f.status = 'ok'"""

_LIVE_FIELDS = "f.root, f.path, f.member, f.frame, v.id, coalesce(f.metadata, '')"

# Below the source; of a member with the path of its archive, if that has one there.
_PATH = """(CAST(f.path AS TEXT) || CASE WHEN f.path != '' AND f.member != '' THEN '/' ELSE '' END
    || CAST(f.member AS TEXT))"""

# Every file with its vector of one model, or NULL, by content: the search trees of both are walked side by side.
_BY_CONTENT = """files AS f INDEXED BY files_by_content LEFT JOIN vectors AS v
    ON v.content_hash = f.content_hash AND v.frame = f.frame AND v.fingerprint = ?"""


_PASSES_REPAY = 8
"""Of all files; a root with fewer is looked up by itself, since passes are some five times as fast as a join."""


class CatalogReader:
    """An open catalog, to be read. Methods raise IndexUnusable when the file is damaged."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._connection = connection
        # The sync's reader threads look contents up while its main thread writes.
        self._lock = threading.RLock()

    def close(self) -> None:
        """Undo what was not committed and close."""
        with self._lock, explained(self.path):
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the index is

    def meta(self, key: str) -> str:
        """A fact of the whole index: created, fingerprint, model, dim, content_hash."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        if not rows:
            raise damaged(self.path, f"it does not say its {key}")
        return str(rows[0][0])

    def recall(self) -> float | None:
        """Share of the 10 nearest that searches should find; None where nobody asked for another than the usual."""
        rows = self._rows("SELECT value FROM meta WHERE key = 'recall'")
        return float(rows[0][0]) if rows else None

    def precision(self) -> str | None:
        """What the encoder is to compute in; None where nobody asked for another than the usual."""
        rows = self._rows("SELECT value FROM meta WHERE key = 'precision'")
        return str(rows[0][0]) if rows else None

    def shard(self) -> str | None:
        """i/n, if the index is one of n parts."""
        rows = self._rows("SELECT value FROM meta WHERE key = 'shard'")
        return str(rows[0][0]) if rows else None

    @property
    def fingerprint(self) -> str:
        """The model whose vectors answer."""
        return self.meta("fingerprint")

    def roots(self) -> dict[int, Root]:
        """Sources this index follows, by number."""
        rows = self._rows("SELECT id, kind, path, options, stamp FROM roots ORDER BY id")
        try:
            return {
                number: Root(number, kind, self._path_of(location), _options_of(options), stamp)
                for number, kind, location, options, stamp in rows
            }
        except (ValueError, TypeError) as error:
            raise damaged(self.path, str(error)) from error

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read all inside as of one moment, whatever is committed meanwhile."""
        self._rows("BEGIN")
        try:
            yield
        finally:
            self.rollback()

    def check(self) -> None:
        """Look through the whole catalog. Raises IndexUnusable if any of it is damaged."""
        [(found,)] = self._rows("PRAGMA integrity_check(1)")
        if found != "ok":
            raise damaged(self.path, found)

    def data_version(self) -> int:
        """A number that changes when another connection has committed, unless this one is `outdated` by that."""
        return int(self._rows("PRAGMA data_version")[0][0])

    def outdated(self) -> bool:
        """Whether others committed what this connection cannot see: it may show half of it, and is to be made anew."""
        connection = self._connection
        return isinstance(connection, ImmutableConnection) and connection.stamp != stamp_of(self.path)

    # -- reading

    def stored_files(self, root: int, *, fingerprint: str, keys: DecoderKeys | None = None) -> Iterator[StoredFile]:
        """All files of a root, in passes, each in the order of its B-tree: five times as fast as one join.

        The passes are over all files; one root of many is looked up by itself. keys: with them, a good file counts as
        not embedded if they were not tried on a bad further frame of it.
        """
        lacking = set()
        alone = self.n_files(root) < self._n_rows_at_most() // _PASSES_REPAY
        joined = _BY_CONTENT.replace(" INDEXED BY files_by_content", "") if alone else _BY_CONTENT
        of_root, this_root = ("root = ? AND ", (root,)) if alone else ("", ())
        for number, frame in self._stream(
            f"SELECT f.id, f.frame FROM {joined} WHERE {of_root}f.status = 'ok' AND v.id IS NULL",
            (fingerprint, *this_root),
        ):
            lacking.add(self._first_frame(number) if frame else number)
        if keys is not None:
            retried = self._stream(
                f"""SELECT id FROM files WHERE {of_root}frame > 0 AND status != 'ok' AND (status = 'unreadable'
                OR decoders IS NOT CASE status WHEN 'too-large' THEN ? ELSE ? END)""",
                (*this_root, keys.large, keys.decoders),
            )
            lacking.update(self._first_frame(number) for (number,) in retried)
        rows = self._stream(
            f"""SELECT id, path, member, size, mtime_ns, content_hash, status, decoders, coalesce(metadata, ''), frames
            FROM files {"" if alone else "NOT INDEXED"} WHERE root = ? AND frame = 0 ORDER BY id""",
            (root,),
        )
        for number, path, member, size, mtime_ns, content_hash, status, tried, metadata, frames in rows:
            yield StoredFile(
                number, self._path_of(path), self._path_of(member), size, mtime_ns, content_hash, status, tried,
                metadata, frames, status == OK and number not in lacking,
            )  # fmt: skip

    def _first_frame(self, number: int) -> int | None:
        found = self._rows(
            """SELECT first.id FROM files AS f JOIN files AS first ON first.root = f.root AND first.path = f.path
            AND first.member = f.member AND first.frame = 0 WHERE f.id = ?""",
            (number,),
        )
        return int(found[0][0]) if found else None

    def known_content(self, content_hash: str, *, fingerprint: str, decoders: str, large: str) -> Content | None:
        """What needs no work: a content whose first frame has a vector, or could not be read by these decoders.

        `large` stands for decoders and pixel budget together, for what was refused for its size. Safe in any thread.
        """
        found = self._rows(
            "SELECT 'ok', '', width, height FROM vectors WHERE fingerprint = ? AND content_hash = ? AND frame = 0",
            (fingerprint, content_hash),
        ) or self._rows(
            """SELECT status, reason, width, height FROM files
            WHERE content_hash = ? AND frame = 0 AND status NOT IN ('ok', 'unreadable')
            AND decoders = CASE status WHEN 'too-large' THEN ? ELSE ? END LIMIT 1""",
            (content_hash, large, decoders),
        )
        return Content(*found[0]) if found else None

    def known_frames(self, content_hash: str, *, fingerprint: str, keys: DecoderKeys) -> list[Content] | None:
        """All frames of a content, in order, if the good ones have vectors and `keys` were tried on the bad ones."""
        rows = self._rows(
            """SELECT f.frame, f.status, f.reason, f.width, f.height, f.decoders, v.id FROM files AS one
            JOIN files AS f ON f.root = one.root AND f.path = one.path AND f.member = one.member
            LEFT JOIN vectors AS v ON v.content_hash = f.content_hash AND v.frame = f.frame AND v.fingerprint = ?
            WHERE one.id = (SELECT id FROM files WHERE content_hash = ? AND frame = 0 AND frames NOT NULL
            AND status != 'unreadable' LIMIT 1)
            ORDER BY f.frame""",
            (fingerprint, content_hash),
        )
        if not rows or not all(
            vector is not None if status == OK else status != UNREADABLE and tried == keys.of(status)
            for _, status, *_, tried, vector in rows
        ):
            return None
        return [Content(status, reason, width, height) for _, status, reason, width, height, *_ in rows]

    def live_files(
        self, *, vector_ids: Sequence[int] | None = None, where: Sequence[Condition] = ()
    ) -> Iterator[LiveFile]:
        """What a search can return, by root, path, member and frame; only with one of `vector_ids` where given.

        `where` leaves those that fulfil all of some conditions.
        """
        fingerprint = self.fingerprint
        if vector_ids is None:
            columns = self.metadata_columns() if where else {}
            tests = [_test_of(condition, columns) for condition in where]
            query = " AND ".join([f"SELECT {_LIVE_FIELDS} FROM {_LIVE}", *(sql for sql, _ in tests)])
            values = [value for _, each in tests for value in each]
            rows = self._stream(f"{query} ORDER BY f.root, f.path, f.member, f.frame", (fingerprint, *values))
            yield from (self._live_file(*row) for row in rows)
            return
        assert not where
        for start in range(0, len(vector_ids), 500):  # SQLite bounds the number of parameters
            some = [int(number) for number in vector_ids[start : start + 500]]
            marks = ",".join("?" * len(some))
            # CROSS JOIN fixes the order: the few vectors first, then the files of each.
            rows = self._stream(
                f"""SELECT {_LIVE_FIELDS} FROM vectors AS v CROSS JOIN files AS f
                ON v.content_hash = f.content_hash AND v.frame = f.frame
                WHERE v.id IN ({marks}) AND v.fingerprint = ? AND f.status = 'ok'""",
                (*some, fingerprint),
            )
            yield from (self._live_file(*row) for row in rows)

    def n_images(self) -> int:
        """Files that a search can return."""
        query = f"SELECT count(v.id) FROM {_BY_CONTENT} WHERE f.status = 'ok' AND f.frame = 0"
        return int(self._rows(query, (self.fingerprint,))[0][0])

    def n_orphans(self) -> int:
        """Vectors of any model whose content no file has."""
        there = "SELECT 1 FROM files WHERE files.content_hash = vectors.content_hash"
        return int(self._rows(f"SELECT count(*) FROM vectors WHERE NOT EXISTS ({there})")[0][0])

    def n_live(self) -> int:
        """What a search can return: files, and further frames of files."""
        query = f"SELECT count(v.id) FROM {_BY_CONTENT} WHERE f.status = 'ok'"
        return int(self._rows(query, (self.fingerprint,))[0][0])

    def n_files(self, root: int) -> int:
        """Files known of a root, good and bad."""
        return int(self._rows("SELECT count(*) FROM files WHERE root = ? AND frame = 0", (root,))[0][0])

    def _n_rows_at_most(self) -> int:
        """Files and further frames of all roots, and those that are gone: quick, where counting looks at all."""
        return int(self._rows("SELECT coalesce(max(id), 0) FROM files")[0][0])

    def has_untrusted_times(self, root: int) -> bool:
        """Whether some file may change without its time telling."""
        query = "SELECT 1 FROM files WHERE root = ? AND mtime_ns = ? LIMIT 1"
        return bool(self._rows(query, (root, UNTRUSTED_TIME)))

    def n_failed(self) -> int:
        """Files without a vector; one of which only a further frame is bad is a good file."""
        return int(self._rows("SELECT count(*) FROM files WHERE status != 'ok' AND frame = 0")[0][0])

    def failures(self) -> Iterator[FailedFile]:
        """Files without a vector, and why, by root and path."""
        rows = self._stream(
            """SELECT root, path, member, frame, status, reason FROM files WHERE status != 'ok'
            ORDER BY root, path, member, frame"""
        )
        yield from (
            FailedFile(root, self._path_of(path), self._path_of(member), *rest) for root, path, member, *rest in rows
        )

    def metadata_columns(self) -> dict[str, set[str]]:
        """Names of what tables say of their images, in order, and the JSON types of their values."""
        rows = self._rows(
            """SELECT DISTINCT key, type FROM files, json_each(files.metadata)
            WHERE files.metadata NOT NULL AND frame = 0 ORDER BY key"""
        )
        columns: dict[str, set[str]] = {}
        for name, kind in rows:
            columns.setdefault(name, set()).add(kind)
        return columns

    def files_to_copy(self, root: int) -> Iterator[CopiedFile]:
        """Files of a root with all that is known of them and their vectors, by path, member and frame."""
        rows = self._stream(
            """SELECT f.path, f.member, f.frame, f.size, f.mtime_ns, f.content_hash, f.status, f.reason, f.width,
            f.height, f.decoders, f.frames, coalesce(f.metadata, ''), v.vector FROM files AS f LEFT JOIN vectors AS v
            ON v.content_hash = f.content_hash AND v.frame = f.frame AND v.fingerprint = ? AND f.status = 'ok'
            WHERE f.root = ? ORDER BY f.path, f.member, f.frame""",
            (self.fingerprint, root),
        )
        for path, member, frame, size, mtime_ns, hashed, status, reason, w, h, tried, frames, metadata, vector in rows:
            member = self._path_of(member)
            known = (size, mtime_ns, hashed, status, reason, w, h, tried, member, frame, frames, metadata)
            yield CopiedFile(FileRow(root, self._path_of(path), *known), vector)

    def n_vectors(self, *, fingerprint: str, after: int = 0) -> int:
        """Vectors of a model with an id above `after`."""
        fingerprint_is = "+fingerprint = ?" if after else "fingerprint = ?"  # few rows by id, or all by their index
        query = f"SELECT count(*) FROM vectors WHERE {fingerprint_is} AND id > ?"
        return int(self._rows(query, (fingerprint, after))[0][0])

    def vector_blocks(self, *, fingerprint: str, after: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids int64 [n], rising, and unit vectors float32 [n, dim] of a model, a block at a time."""
        for ids, halves in self.half_blocks(fingerprint=fingerprint, after=after):
            yield ids, unit(halves)

    def half_blocks(self, *, fingerprint: str, after: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `vector_blocks`, with the vectors as they are stored: float16, of which `unit` makes what is given out."""
        # The + keeps SQLite from gathering by fingerprint and sorting for every block.
        query = "SELECT id, vector FROM vectors WHERE +fingerprint = ? AND id > ? ORDER BY id LIMIT ?"
        while rows := self._rows(query, (fingerprint, after, _BLOCK)):
            ids = np.array([number for number, _ in rows], dtype=np.int64)
            yield ids, self._halves([vector for _, vector in rows])
            after = int(ids[-1])

    def live_vectors(self) -> Iterator[tuple[list[LiveFile], np.ndarray]]:
        """What a search can return and its unit vectors float32 [n, dim], in the order of `live_files`, in blocks."""
        files: list[LiveFile] = []
        blobs: list[bytes] = []
        query = f"SELECT {_LIVE_FIELDS}, v.vector FROM {_LIVE} ORDER BY f.root, f.path, f.member, f.frame"
        for *row, blob in self._stream(query, (self.fingerprint,)):
            files.append(self._live_file(*row))
            blobs.append(blob)
            if len(files) == _BLOCK:
                yield files, unit(self._halves(blobs))
                files, blobs = [], []
        if files:
            yield files, unit(self._halves(blobs))

    def generation(self) -> Generation | None:
        """The newest FAISS file of the answering model."""
        rows = self._rows(
            """SELECT number, fingerprint, file, kind, size, checksum, stamp, n, max_id, recall_at_10, details
            FROM generations WHERE fingerprint = ? ORDER BY number DESC LIMIT 1""",
            (self.fingerprint,),
        )
        return Generation(*rows[0]) if rows else None

    def generation_files(self) -> list[str]:
        """Names of the FAISS files that a reader may still hold, newest first."""
        return [file for (file,) in self._rows("SELECT file FROM generations ORDER BY number DESC LIMIT 2")]

    def next_generation(self) -> int:
        return int(self._rows("SELECT coalesce(max(number), 0) + 1 FROM generations")[0][0])

    def rollback(self) -> None:
        """Undo what was written since the last commit."""
        with self._lock, explained(self.path):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _rows(self, query: str, arguments: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, explained(self.path):
            return self._connection.execute(query, arguments).fetchall()

    def _stream(self, query: str, arguments: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        with self._lock, explained(self.path):
            cursor = self._connection.execute(query, arguments)
        try:
            while True:
                with self._lock, explained(self.path):
                    rows = cursor.fetchmany(_BLOCK)
                if not rows:
                    return
                yield from rows
        finally:
            cursor.close()

    def _halves(self, blobs: list[bytes]) -> np.ndarray:
        try:
            return np.frombuffer(b"".join(blobs), dtype=np.float16).reshape(len(blobs), -1)
        except ValueError as error:
            raise damaged(self.path, "a vector has another length than the others") from error

    def _live_file(
        self, root: int, path: str | bytes, member: str | bytes, frame: int, vector_id: int, metadata: str
    ) -> LiveFile:
        return LiveFile(root, self._path_of(path), self._path_of(member), frame, vector_id, metadata)

    def _path_of(self, stored: str | bytes) -> str:
        if isinstance(stored, str):
            return stored
        if isinstance(stored, bytes):
            return os.fsdecode(stored)
        raise damaged(self.path, "a path is no text")


def _test_of(condition: Condition, metadata_columns: Mapping[str, set[str]]) -> tuple[str, list[bytes | float]]:
    """A condition in SQL, and the values of its parameters. metadata_columns: as of `CatalogReader`."""
    # As bytes: text that is not UTF-8, as names may be, cannot be given to SQLite otherwise.
    name, number, text = os.fsencode(condition.column), condition.number, os.fsencode(condition.value)
    # json_each takes any name; a path of json_extract none with quotes in it.
    column, own = "(SELECT value FROM json_each(f.metadata) WHERE key = CAST(? AS TEXT))", [name]
    if condition.column in BUILT_IN and condition.column not in metadata_columns:
        column, own = (_PATH if condition.column == "path" else f"f.{condition.column}"), []
    kinds = metadata_columns.get(condition.column, {"text"} if condition.column == "path" else {"integer"})
    if condition.comparison == "~":
        return f"instr(lower({column}), lower(CAST(? AS TEXT))) > 0", [*own, text]
    if condition.comparison in ("=", "!="):
        equal = f"{column} = CAST(? AS TEXT)"
        equal = f"({equal} OR {column} = ?)" if number is not None else equal
        values: list[bytes | float] = [*own, text, *own, number] if number is not None else [*own, text]
        if condition.comparison == "=":
            return equal, values
        return f"{column} NOT NULL AND NOT {equal}", [*own, *values]
    if number is None or kinds <= {"text", "null"}:  # among dates, 2024 is text
        return f"{column} {condition.comparison} CAST(? AS TEXT) AND typeof({column}) = 'text'", [*own, text, *own]
    return f"{column} {condition.comparison} ? AND typeof({column}) != 'text'", [*own, number, *own]


def unit(halves: np.ndarray) -> np.ndarray:
    """Stored float16 vectors as float32 [n, dim] of unit length, which rounding had changed by up to 5e-4."""
    vectors = halves.astype(np.float32)
    vectors /= norms(vectors)[:, None]
    return vectors


def norms(vectors: np.ndarray) -> np.ndarray:
    """Lengths float32 [n], none of them zero, of float32 [n, dim]."""
    return np.maximum(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), np.finfo(np.float32).tiny)


def _options_of(stored: str) -> RootOptions:
    options = json.loads(stored)
    forgotten = tuple((path, member) for path, member in options.get("forgotten", ()))
    return RootOptions(**(options | {"exclude": tuple(options.get("exclude", ())), "forgotten": forgotten}))
