"""One writer per index: a lock that the operating system holds, so that a dead holder never blocks.

Knows nothing of what is written. Who holds it stands in a file beside the lock, for the message only.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinosearch.errors import DinosearchError, IndexLocked


@contextmanager
def writer_lock(index_path: Path) -> Iterator[None]:
    """Hold the index for writing; its folder exists already. Raises IndexLocked, naming the holder, at once."""
    from filelock import FileLock, Timeout

    lock = FileLock(index_path / "lock")
    holder_path = index_path / "lock.json"
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        lock.acquire(timeout=0)
        _write_holder(holder_path, holder)
    except Timeout:
        raise IndexLocked(
            f"the index in {index_path} is being written by {_holder(holder_path)}. Wait until that ends, or stop it"
        ) from None
    except OSError as error:
        lock.release()
        raise DinosearchError(
            f"cannot write to {index_path} ({error.strerror}). Make it writable, or index under another --name"
        ) from error
    try:
        yield
    finally:
        holder_path.unlink(missing_ok=True)
        lock.release()


def _write_holder(holder_path: Path, holder: dict[str, Any]) -> None:
    """On a full disk the lock holds without a name."""
    try:
        holder_path.write_text(json.dumps(holder), encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _holder(holder_path: Path) -> str:
    try:
        holder = json.loads(holder_path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it holds the lock and has not written its name yet
