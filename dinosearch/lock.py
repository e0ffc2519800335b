"""One writer per folder: a lock that the operating system holds, so that a dead holder never blocks.

Knows nothing of what is written. Who holds it stands in a file beside the lock, for the message only.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dinosearch.errors import DinosearchError


@contextmanager
def held(folder: Path, *, locked: Callable[[str], DinosearchError], advice: str) -> Iterator[None]:
    """Hold a folder for writing; it exists already.

    Raises at once what `locked` makes of the holder's description, and DinosearchError with `advice` where nothing can
    be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "lock")
    holder_path = folder / "lock.json"
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        lock.acquire(timeout=0)
        _write_holder(holder_path, holder)
    except Timeout:
        raise locked(_holder(holder_path)) from None
    except OSError as error:
        lock.release()
        raise DinosearchError(f"cannot write to {folder} ({error.strerror}). {advice}") from error
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
