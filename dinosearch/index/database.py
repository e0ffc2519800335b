"""Opening SQLite so that it neither loses nor blocks, and what its errors mean to people. Knows no tables."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from dinosearch.errors import DinosearchError, IndexUnusable
from dinosearch.images.read import file_time, trusted_time
from dinosearch.images.source import UNTRUSTED_TIME

_BUSY_SECONDS = 30
_LEAST_FREE = 1 << 20  # bytes; with less, SQLite fails to grow the files beside the database, and says only "I/O error"

Stamp: TypeAlias = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Inode, size and time of a database's file and of its write-ahead log."""


class ImmutableConnection(sqlite3.Connection):
    """To a database that SQLite takes to never change: it locks nothing, and does not see what others commit."""

    stamp: Stamp | None
    """From before the files were opened; None if a commit so soon after another may leave it the same."""


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Open a database that exists.

    To be read, as immutable where SQLite's files beside it cannot be made: in a read-only folder, or on a full disk if
    no write-ahead log is left over.
    """
    address = path.resolve().as_uri()
    if writable:
        return _opened(f"{address}?mode=rw")
    now, stamp = time.time_ns(), stamp_of(path)
    _, (_, n_log_bytes, _) = stamp
    if n_log_bytes == 0 and not os.access(path.parent, os.W_OK):
        return _opened_immutable(address, stamp, now)
    connection = _opened(f"{address}?mode=ro")
    try:
        connection.execute("PRAGMA schema_version")
    except sqlite3.OperationalError:
        connection.close()
        if n_log_bytes == 0 and _is_full(path):
            return _opened_immutable(address, stamp, now)
        raise
    return connection


def stamp_of(path: Path) -> Stamp:
    """Of the files as they are now."""
    return _facts(path), _facts(path.with_name(f"{path.name}-wal"))


def _facts(path: Path) -> tuple[int, int, int]:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return 0, 0, 0
    return facts.st_ino, facts.st_size, file_time(facts)


def _opened_immutable(address: str, stamp: Stamp, now: int) -> ImmutableConnection:
    connection = sqlite3.connect(
        f"{address}?immutable=1",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        factory=ImmutableConnection,
    )
    trusted = all(trusted_time(mtime_ns, now=now) != UNTRUSTED_TIME for _, _, mtime_ns in stamp)
    connection.stamp = stamp if trusted else None
    return connection


def _opened(address: str) -> sqlite3.Connection:
    return sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)


def _is_full(path: Path) -> bool:
    return shutil.disk_usage(path.parent).free < _LEAST_FREE


def create(path: Path) -> sqlite3.Connection:
    """Open a database for writing, made if it is not there."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)


def set_journal(connection: sqlite3.Connection, path: Path, note: Callable[[str], None]) -> None:
    """WAL lets readers go on while we write, but it needs memory shared between processes, which network disks lack."""
    network = network_file_system(path.parent)
    connection.execute(f"PRAGMA journal_mode = {'DELETE' if network else 'WAL'}")
    if network:
        note(f"{path.parent} is on a network file system ({network}): readers may have to wait while images are saved")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_size_limit = 67108864")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise damaged(path, str(error)) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise full(path) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or str(error).startswith("Could not decode"):
            raise damaged(path, str(error)) from error
        if code == sqlite3.SQLITE_IOERR and _is_full(path):
            raise full(path) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise DinosearchError(
                f"cannot open {path} ({error}). Check that you may read it and, to index, write to its folder"
            ) from error
        if code == sqlite3.SQLITE_BUSY:
            raise DinosearchError(f"{path} is busy: another program holds it for long. Try again.") from error
        raise DinosearchError(f"{path}: {error}. Check its disk, then run the command again.") from error


def damaged(path: Path, reason: str) -> IndexUnusable:
    reason = " ".join(reason.split())
    return IndexUnusable(
        f"the catalog {path} is damaged ({reason}). Put a copy back, or delete {path.parent} and index again"
    )


def full(path: Path) -> DinosearchError:
    return DinosearchError(
        f"the disk that holds {path.parent} is full; what was saved before still answers. "
        "Free some space and run the command again."
    )


_NETWORK = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "davfs", "gpfs", "lustre"),
    *("ncpfs", "nfs", "nfs4", "smb2", "smb3", "smbfs"),
    *("fuse.ceph", "fuse.davfs", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "fuse.gcsfuse"),
}


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
