"""Opening SQLite so that it neither loses nor blocks, and what its errors mean to people. Knows no tables."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dinosearch.errors import DinosearchError, IndexUnusable

_BUSY_SECONDS = 30


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Open a database that exists; in a read-only folder as immutable, which needs no files beside it."""
    return sqlite3.connect(
        _address(path, writable=writable),
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=_BUSY_SECONDS,
    )


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


def _address(path: Path, *, writable: bool) -> str:
    address = path.resolve().as_uri()
    if writable:
        return f"{address}?mode=rw"
    wal = path.with_name(f"{path.name}-wal")
    frozen = not os.access(path.parent, os.W_OK) and not (wal.exists() and wal.stat().st_size)
    return f"{address}?immutable=1" if frozen else f"{address}?mode=ro"


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
