"""Bytes off the disk, and work in threads: bounded, in order. Knows no formats."""

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dinosearch.images.decode import BadImage
from dinosearch.images.machine import n_cores
from dinosearch.images.source import UNTRUSTED_TIME, StableBytes

T = TypeVar("T")
R = TypeVar("R")

MAX_FILE_BYTES = 2 * 2**30
"""No image within the pixel budget needs more; beyond it a file is not read into memory at all."""

_READ_ATTEMPTS = 3
# A write soon after the last one may leave the time as it is: clocks of file systems tick in steps of up to 10 ms, of
# some (FAT, old NFS; they show whole seconds) up to 2 s. A time so close to the reading is not trusted the next time.
_FINE_TICK_NS = 20_000_000
_COARSE_TICK_NS = 2_000_000_000


def read_bytes(path: str | Path) -> bytes:
    """The whole file. Raises BadImage: "unreadable" with the system's reason, or "too-large"."""
    try:
        facts = Path(path).stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BadImage("unreadable", "is a folder" if stat.S_ISDIR(facts.st_mode) else "not a regular file")
        if facts.st_size > MAX_FILE_BYTES:
            raise BadImage("too-large", f"{facts.st_size / 2**30:.1f} GiB; at most {MAX_FILE_BYTES >> 30} GiB are read")
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - half the time of Path.open on small files
            return file.readall()
    except OSError as error:
        raise BadImage("unreadable", error.strerror or str(error)) from error
    except ValueError as error:
        raise BadImage("unreadable", f"not a file name ({error})") from error


def read_stable(path: str) -> StableBytes:
    """The bytes of a file that did not change meanwhile. Raises BadImage like `read_bytes`."""
    for _ in range(_READ_ATTEMPTS):
        began = time.time_ns()
        before = _stat(path)
        data = read_bytes(path)
        after = _stat(path)
        if _state(before) == _state(after) and len(data) == before.st_size:
            return StableBytes(data, trusted_time(file_time(before), now=began))
    raise BadImage("unreadable", "it changes while it is read")


def file_time(facts: os.stat_result) -> int:
    """Nanoseconds of the last change in the 64 bits that SQLite has: from the year 2262 on they wrap round."""
    return (facts.st_mtime_ns + 2**63) % 2**64 - 2**63


def trusted_time(mtime_ns: int, *, now: int) -> int:
    """`mtime_ns`, or UNTRUSTED_TIME if a change after `now` might leave a file with the same."""
    tick = _FINE_TICK_NS if mtime_ns % 1_000_000_000 else _COARSE_TICK_NS
    return UNTRUSTED_TIME if abs(now - mtime_ns) < tick else mtime_ns


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 - surrogate escapes pass, and it is fast
    except OSError as error:
        raise BadImage("unreadable", error.strerror or str(error)) from error
    except ValueError as error:
        raise BadImage("unreadable", f"not a file name ({error})") from error


def _state(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def in_threads(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int | None = None,
    ahead: int = 64,
    weight: Callable[[T], int] = lambda _: 0,
    most_weight: int = 0,
) -> Iterator[R]:
    """`map(function, items)` in `workers` threads (default: one per core), results in the order of the items.

    `items` is consumed in the caller's thread, at most `ahead` items before the result being waited for, and fewer
    where their weights together exceed `most_weight`, so memory is bounded. The first exception of `function` or
    `items` propagates. When the caller stops early, what has not begun is cancelled and the threads have ended before
    this returns.
    """
    pending: deque[tuple[Future[R], int]] = deque()
    weights = 0
    with ThreadPoolExecutor(workers or n_cores(), thread_name_prefix="images") as pool:
        try:
            for item in items:
                pending.append((pool.submit(function, item), weight(item)))
                weights += pending[-1][1]
                while len(pending) > ahead or (weights > most_weight and len(pending) > 1):
                    future, freed = pending.popleft()
                    weights -= freed
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()
