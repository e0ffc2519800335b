"""The catalog: which files there are, what they hold and the vector of each content. SQLite, the truth of an index.

Knows nothing of folders on disk, of decoding or of FAISS. It is the only module that speaks SQL.

Identity is the hash of a file's content: equal files share one vector, a moved file keeps it. Vectors are stored as
float16 and given out as float32 of unit length, so that a vector is the same number wherever it is read from.
Vector ids are never used twice; a FAISS file that names a pruned id can therefore never point at another image.
Paths that are not UTF-8 are stored as BLOB, all others as TEXT.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinosearch.errors import DinosearchError, IndexNotFound, IndexUnusable

FILE_NAME = "catalog.sqlite"
FORMAT = 1
OK = "ok"
UNREADABLE = "unreadable"
TOO_LARGE = "too-large"

_APPLICATION_ID = 0x44494E4F  # "DINO": a foreign SQLite file is told apart before anything is read from it
_BLOCK = 4096  # rows fetched at a time: bounds memory whatever the size of the index
_SCHEMA = """
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
    recall_at_10 REAL,
    details TEXT
);
"""
# Files that a search can return: readable ones whose content has a vector of the answering model.
_LIVE = """files AS f JOIN vectors AS v
    ON v.content_hash = f.content_hash AND v.frame = f.frame AND v.fingerprint = ? AND f.status = 'ok'"""

# Every file with its vector of one model, or NULL, by content: the search trees of both are walked side by side.
_BY_CONTENT = """files AS f INDEXED BY files_by_content LEFT JOIN vectors AS v
    ON v.content_hash = f.content_hash AND v.frame = f.frame AND v.fingerprint = ?"""


class StoredFile(NamedTuple):
    """A file as the catalog knows it before a sync."""

    id: int
    path: str
    size: int
    mtime_ns: int
    content_hash: str | None
    status: str
    decoders: str | None
    embedded: bool
    """Its content has a vector of the model asked about."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file as a sync found it; written over what was known of the same root and path."""

    root: int
    path: str
    size: int
    mtime_ns: int
    content_hash: str | None
    status: str
    reason: str = ""
    width: int | None = None
    height: int | None = None
    decoders: str | None = None


class Content(NamedTuple):
    """What is known of a content (the bytes of a file), whatever the files that hold it."""

    status: str
    reason: str
    width: int | None
    height: int | None


class LiveFile(NamedTuple):
    """A file that a search can return."""

    root: Path
    path: str
    vector_id: int


class Failure(NamedTuple):
    """A file without a vector, and why."""

    path: Path
    status: str
    reason: str


@dataclass(frozen=True)
class Generation:
    """A FAISS file, as named in the catalog."""

    number: int
    fingerprint: str
    file: str
    kind: str
    size: int
    checksum: str
    stamp: str
    """Inode and times of the file when its checksum was taken: while they are the same, so are the bytes."""
    n: int
    max_id: int
    recall_at_10: float | None
    details: str | None = None
    """JSON: what else was written and measured; see generation.Details."""


class Catalog:
    """One open catalog. One writer (the caller holds the index's lock), any number of readers.

    Writes gather in one transaction until `commit()`; leaving without it undoes them. Methods raise DinosearchError
    when the disk is full and IndexUnusable when the file is damaged.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._connection = connection
        # The sync's reader threads look contents up while its main thread writes.
        self._lock = threading.RLock()

    # -- opening

    @classmethod
    def create(
        cls, index_path: Path, *, fingerprint: str, model: str, dim: int, note: Callable[[str], None] = lambda _: None
    ) -> Catalog:
        """Make the catalog of a new index. What one killed attempt left behind is finished, never taken as an index."""
        path = index_path / FILE_NAME
        with _explained(path):
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            _set_journal(connection, path, note)
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            created = datetime.now(UTC).isoformat(timespec="microseconds")
            meta = {"created": created, "fingerprint": fingerprint, "model": model, "dim": str(dim)}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            connection.execute("COMMIT")
        return cls(connection, path)

    @classmethod
    def open(cls, index_path: Path, *, writable: bool = False, note: Callable[[str], None] = lambda _: None) -> Catalog:
        """Open the catalog of an index. Raises IndexNotFound, or IndexUnusable: damaged, or of a newer format."""
        path = index_path / FILE_NAME
        if not path.exists():
            raise IndexNotFound(
                f"no index in {index_path}. Build one: dinosearch index IMAGES --name {index_path.name}"
            )
        with _explained(path):
            connection = sqlite3.connect(
                _address(path, writable=writable), uri=True, isolation_level=None, check_same_thread=False, timeout=30
            )
            try:
                _check_format(connection, index_path)
                if writable:
                    _set_journal(connection, path, note)
            except BaseException:
                connection.close()
                raise
        return cls(connection, path)

    def close(self) -> None:
        """Undo what was not committed and close."""
        with self._lock, _explained(self.path):
            self._connection.close()

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the index is

    def meta(self, key: str) -> str:
        """A fact of the whole index: created, fingerprint, model, dim."""
        return str(self._rows("SELECT value FROM meta WHERE key = ?", (key,))[0][0])

    @property
    def fingerprint(self) -> str:
        """The model whose vectors answer."""
        return self.meta("fingerprint")

    def roots(self) -> dict[int, Path]:
        """Folders this index follows, by number."""
        return {
            number: Path(_path_of(stored)) for number, stored in self._rows("SELECT id, path FROM roots ORDER BY id")
        }

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read all inside as of one moment, whatever is committed meanwhile."""
        self._rows("BEGIN")
        try:
            yield
        finally:
            self.rollback()

    def data_version(self) -> int:
        """A number that changes when another connection has committed."""
        return int(self._rows("PRAGMA data_version")[0][0])

    # -- reading

    def stored_files(self, root: int, *, fingerprint: str) -> Iterator[StoredFile]:
        """All files of a root, in two passes, each in the order of its B-tree: five times as fast as one join."""
        lacking = {
            number
            for (number,) in self._stream(
                f"SELECT f.id FROM {_BY_CONTENT} WHERE f.status = 'ok' AND v.id IS NULL", (fingerprint,)
            )
        }
        rows = self._stream(
            "SELECT id, path, size, mtime_ns, content_hash, status, decoders FROM files NOT INDEXED WHERE root = ?",
            (root,),
        )
        for number, path, size, mtime_ns, content_hash, status, tried in rows:
            embedded = status == OK and number not in lacking
            yield StoredFile(number, _path_of(path), size, mtime_ns, content_hash, status, tried, embedded)

    def known_content(self, content_hash: str, *, fingerprint: str, decoders: str, large: str) -> Content | None:
        """What needs no work: a content with a vector, or one that these decoders could not read.

        `large` stands for decoders and pixel budget together, for what was refused for its size. Safe in any thread.
        """
        found = self._rows(
            "SELECT 'ok', '', width, height FROM vectors WHERE fingerprint = ? AND content_hash = ? AND frame = 0",
            (fingerprint, content_hash),
        ) or self._rows(
            """SELECT status, reason, width, height FROM files
            WHERE content_hash = ? AND status NOT IN ('ok', 'unreadable')
            AND decoders = CASE status WHEN 'too-large' THEN ? ELSE ? END LIMIT 1""",
            (content_hash, large, decoders),
        )
        return Content(*found[0]) if found else None

    def live_files(self, *, vector_ids: Sequence[int] | None = None) -> Iterator[LiveFile]:
        """Files that a search can return, by root and path; only those with one of `vector_ids` where given."""
        fingerprint, roots = self.fingerprint, self.roots()
        select = f"SELECT f.root, f.path, v.id FROM {_LIVE}"
        if vector_ids is None:
            rows = self._stream(f"{select} ORDER BY f.root, f.path", (fingerprint,))
            yield from (LiveFile(roots[root], _path_of(path), number) for root, path, number in rows)
            return
        for start in range(0, len(vector_ids), 500):  # SQLite bounds the number of parameters
            some = [int(number) for number in vector_ids[start : start + 500]]
            marks = ",".join("?" * len(some))
            # CROSS JOIN fixes the order: the few vectors first, then the files of each.
            rows = self._stream(
                f"""SELECT f.root, f.path, v.id FROM vectors AS v CROSS JOIN files AS f
                ON v.content_hash = f.content_hash AND v.frame = f.frame
                WHERE v.id IN ({marks}) AND v.fingerprint = ? AND f.status = 'ok'""",
                (*some, fingerprint),
            )
            yield from (LiveFile(roots[root], _path_of(path), number) for root, path, number in rows)

    def n_images(self) -> int:
        """Files that a search can return."""
        query = f"SELECT count(v.id) FROM {_BY_CONTENT} WHERE f.status = 'ok'"
        return int(self._rows(query, (self.fingerprint,))[0][0])

    def n_failed(self) -> int:
        return int(self._rows("SELECT count(*) FROM files WHERE status != 'ok'")[0][0])

    def failures(self) -> Iterator[Failure]:
        """Files without a vector, and why, by path."""
        roots = self.roots()
        rows = self._stream("SELECT root, path, status, reason FROM files WHERE status != 'ok' ORDER BY root, path")
        for root, path, status, reason in rows:
            yield Failure(roots[root] / _path_of(path), status, reason)

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
            yield ids, _halves([vector for _, vector in rows])
            after = int(ids[-1])

    def live_vectors(self) -> Iterator[tuple[list[LiveFile], np.ndarray]]:
        """Files and their unit vectors float32 [n, dim], by root and path, a block at a time."""
        roots = self.roots()
        files: list[LiveFile] = []
        blobs: list[bytes] = []
        query = f"SELECT f.root, f.path, v.id, v.vector FROM {_LIVE} ORDER BY f.root, f.path"
        for root, path, number, blob in self._stream(query, (self.fingerprint,)):
            files.append(LiveFile(roots[root], _path_of(path), number))
            blobs.append(blob)
            if len(files) == _BLOCK:
                yield files, unit(_halves(blobs))
                files, blobs = [], []
        if files:
            yield files, unit(_halves(blobs))

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

    # -- writing

    def add_root(self, root: Path) -> int:
        """Number of a root, added if it is new."""
        self._write("INSERT OR IGNORE INTO roots (path) VALUES (?)", [(_stored(str(root)),)])
        return int(self._rows("SELECT id FROM roots WHERE path = ?", (_stored(str(root)),))[0][0])

    def put_vectors(self, contents: Iterable[tuple[str, int, int]], vectors: np.ndarray, *, fingerprint: str) -> None:
        """Add vectors float [n, dim] of (content hash, width, height); those that are there stay as they are."""
        halves = vectors.astype(np.float16)
        self._write(
            "INSERT OR IGNORE INTO vectors (fingerprint, content_hash, width, height, vector) VALUES (?, ?, ?, ?, ?)",
            (
                (fingerprint, content_hash, width, height, half.tobytes())
                for (content_hash, width, height), half in zip(contents, halves, strict=True)
            ),
        )

    def put_files(self, rows: Iterable[FileRow]) -> None:
        """Write what was found. A file that cannot be read keeps the hash it had: it may come back."""
        self._write(
            """INSERT INTO files (root, path, size, mtime_ns, content_hash, status, reason, width, height, decoders)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (root, path, member, frame) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns,
            content_hash = coalesce(excluded.content_hash, content_hash), status = excluded.status,
            reason = excluded.reason, width = excluded.width, height = excluded.height, decoders = excluded.decoders""",
            (
                (
                    row.root,
                    _stored(row.path),
                    row.size,
                    row.mtime_ns,
                    row.content_hash,
                    row.status,
                    row.reason,
                    row.width,
                    row.height,
                    row.decoders,
                )
                for row in rows
            ),
        )

    def move_files(self, moves: Iterable[tuple[int, int, str, int, int]]) -> None:
        """Give files (their id) another root, path, size and mtime_ns; what they hold is as before."""
        self._write(
            "UPDATE files SET root = ?2, path = ?3, size = ?4, mtime_ns = ?5 WHERE id = ?1",
            ((number, root, _stored(path), size, mtime_ns) for number, root, path, size, mtime_ns in moves),
        )

    def remove_files(self, ids: Iterable[int]) -> None:
        """Take files out of the results. Their vectors stay until `prune`."""
        self._write("DELETE FROM files WHERE id = ?", ((number,) for number in ids))

    def prune(self) -> int:
        """Forget vectors that no file has, and those of other models than the answering one. Returns how many."""
        with self._transaction():
            cursor = self._connection.execute(
                """DELETE FROM vectors WHERE fingerprint != ? OR NOT EXISTS (SELECT 1 FROM files AS f
                WHERE f.content_hash = vectors.content_hash AND f.frame = vectors.frame)""",
                (self.fingerprint,),
            )
            return cursor.rowcount

    def put_generation(self, generation: Generation) -> None:
        """Name a FAISS file that is complete on the disk; the ones before the last two are forgotten."""
        # The fields are named and ordered as the columns are.
        self._write("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [astuple(generation)])
        self._write("DELETE FROM generations WHERE number <= ? - 2", [(generation.number,)])

    def set_model(self, *, fingerprint: str, model: str, dim: int) -> None:
        """Let the vectors of another model answer from the next commit on."""
        meta = {"fingerprint": fingerprint, "model": model, "dim": str(dim)}
        self._write("UPDATE meta SET value = ?2 WHERE key = ?1", meta.items())

    def commit(self) -> None:
        """Make what was written durable and visible to readers, all at once."""
        with self._lock, _explained(self.path):
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")

    def rollback(self) -> None:
        """Undo what was written since the last commit."""
        with self._lock, _explained(self.path):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def compact(self) -> None:
        """Give the space of forgotten rows back to the disk."""
        with self._lock, _explained(self.path):
            self._connection.execute("VACUUM")

    # -- one place each for reading and writing

    def _rows(self, query: str, arguments: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _explained(self.path):
            return self._connection.execute(query, arguments).fetchall()

    def _stream(self, query: str, arguments: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        with self._lock, _explained(self.path):
            cursor = self._connection.execute(query, arguments)
        try:
            while True:
                with self._lock, _explained(self.path):
                    rows = cursor.fetchmany(_BLOCK)
                if not rows:
                    return
                yield from rows
        finally:
            cursor.close()

    def _write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        with self._transaction():
            self._connection.executemany(statement, rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, _explained(self.path):
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            yield


def is_index(index_path: Path) -> bool:
    """Whether a folder holds a catalog, be it one that was only begun."""
    return (index_path / FILE_NAME).is_file()


def unit(halves: np.ndarray) -> np.ndarray:
    """Stored float16 vectors as float32 [n, dim] of unit length, which rounding had changed by up to 5e-4."""
    vectors = halves.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise DinosearchError(
                f"the disk that holds {path.parent} is full; what was saved before still answers. "
                "Free some space and run the command again."
            ) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise IndexUnusable(
                f"the catalog {path} is damaged ({error}). Put a copy back, or delete {path.parent} and index again"
            ) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise DinosearchError(
                f"cannot open {path} ({error}). Check that you may read it and, to index, write to its folder"
            ) from error
        if code == sqlite3.SQLITE_BUSY:
            raise DinosearchError(f"{path} is busy: another program holds it for long. Try again.") from error
        raise DinosearchError(f"{path}: {error}. Check its disk, then run the command again.") from error


def _check_format(connection: sqlite3.Connection, index_path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == 0 and version == 0 and not connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
        raise IndexNotFound(
            f"the index in {index_path} is not made yet. Run: dinosearch index IMAGES --name {index_path.name}"
        )
    if application != _APPLICATION_ID:
        raise IndexUnusable(f"{index_path / FILE_NAME} is no catalog of dinosearch. Name another --index")
    if version > FORMAT:
        raise IndexUnusable(
            f"the index in {index_path} has format {version}, this dinosearch reads up to {FORMAT}. "
            "Update dinosearch, or index again under another name."
        )


def _address(path: Path, *, writable: bool) -> str:
    """The URI to open a catalog by; in a read-only folder as immutable, which needs no files beside it."""
    address = path.resolve().as_uri()
    if writable:
        return f"{address}?mode=rw"
    wal = path.with_name(f"{FILE_NAME}-wal")
    frozen = not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size)
    return f"{address}?immutable=1" if frozen else f"{address}?mode=ro"


def _set_journal(connection: sqlite3.Connection, path: Path, note: Callable[[str], None]) -> None:
    """WAL lets readers go on while we write, but it needs memory shared between processes, which network disks lack."""
    network = network_file_system(path.parent)
    connection.execute(f"PRAGMA journal_mode = {'DELETE' if network else 'WAL'}")
    if network:
        note(f"{path.parent} is on a network file system ({network}): readers may have to wait while images are saved")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_size_limit = 67108864")


_NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "davfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "smb2",
    "smb3",
    "smbfs",
}
_NETWORK_FUSE = {"fuse.ceph", "fuse.davfs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "fuse.gcsfuse"}


def network_file_system(folder: Path, *, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Type of the network file system a folder lies on, None on local disks and where it cannot be told."""
    if not mounts.exists():
        return None
    folder = folder.resolve()
    best, kind = -1, ""
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, point, found, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)  # \040 is a space
        if folder.is_relative_to(point) and len(point) >= best:  # of two mounts on one point the later one is on top
            best, kind = len(point), found
    return kind if kind in _NETWORK else None


def _stored(path: str) -> str | bytes:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _path_of(stored: str | bytes) -> str:
    return os.fsdecode(stored) if isinstance(stored, bytes) else stored


def _halves(blobs: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(blobs), dtype=np.float16).reshape(len(blobs), -1)
