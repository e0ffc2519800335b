"""Images in a zip file, read in any order."""

from __future__ import annotations

import lzma
import stat
import threading
import weakref
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from dinosearch.images.decode import BadImage
from dinosearch.images.source import MOST_BYTES, FoundImage, Scan, ScanOptions, StableBytes
from dinosearch.images.sources.archives import (
    Archive,
    ArchiveFacts,
    damaged,
    member_name,
    missing,
    refuse_large,
    wanted_members,
)

MOST_OPEN = 32
"""Zips are kept open at a time."""


class ZipSource(Archive):
    """A member's checksum stands in place of its time, which zips know to two seconds, and which may be any.

    The file stays open while it is among the last that were used. Its directory stands at its end: one that was cut
    off cannot be read at all.
    """

    sequential = False

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._lock = threading.Lock()
        self._opened: tuple[zipfile.ZipFile, ArchiveFacts, dict[str, zipfile.ZipInfo]] | None = None
        self._seen: ArchiveFacts | None = None  # what it was when it was scanned, or first read

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        self.close()
        with self._lock:
            self._seen = None  # it may be another one now
            _, _, members = self._open()
        _close_others(self)
        images = [FoundImage("", min(info.file_size, MOST_BYTES), info.CRC, name) for name, info in members.items()]
        return Scan(wanted_members(images, options))

    def close(self) -> None:
        """It is opened again when it is read; members that are being read stay open until they are."""
        with self._lock:
            if self._opened is not None:
                self._opened[0].close()
                self._opened = None

    def read(self, image: FoundImage) -> StableBytes:
        try:
            with self._lock:
                if self._opened is None and self._seen is not None and self.facts() != self._seen:
                    raise BadImage("unreadable", "the archive changes while it is read")
                archive, opened_as, members = self._open()
                info = members.get(image.member)
                if info is None:
                    raise BadImage("unreadable", "is not in the archive any more")
                if info.flag_bits & 1:
                    raise BadImage("unreadable", "encrypted")
                refuse_large(info.file_size)
                file = archive.open(info)
            _close_others(self)
            try:
                data = file.read(info.file_size)
            finally:
                with self._lock:
                    file.close()
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            # Of a better copy of the archive the directory is the same: what was never seen must not be remembered.
            raise BadImage("unreadable", f"damaged in the archive ({str(error) or 'ends early'})") from error
        except (OSError, NotImplementedError, RuntimeError, ValueError) as error:
            raise BadImage("unreadable", str(error)) from error
        if len(data) != info.file_size:
            raise BadImage("unreadable", f"damaged in the archive ({len(data)} of {info.file_size} bytes)")
        if self.facts() != opened_as:
            raise BadImage("unreadable", "the archive changes while it is read")
        return StableBytes(data, image.mtime_ns)

    def stream(self, images: Iterable[FoundImage]) -> Iterator[tuple[FoundImage, StableBytes | BadImage]]:
        raise AssertionError(f"{len(list(images))} members that can be read in any order are streamed")

    def _open(self) -> tuple[zipfile.ZipFile, ArchiveFacts, dict[str, zipfile.ZipInfo]]:
        """To be called with the lock."""
        if self._opened is None:
            facts = self.facts()
            try:
                archive = zipfile.ZipFile(self.location)
            except OSError as error:
                raise missing(self.location, error) from error
            except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise damaged(self.location, error) from error
            members = {member_name(info.filename): info for info in archive.infolist() if _is_file(info)}
            self._opened = archive, facts, members
            self._seen = self._seen or facts
        return self._opened


_recent: OrderedDict[int, weakref.ref[ZipSource]] = OrderedDict()
_recent_lock = threading.Lock()


def _close_others(source: ZipSource) -> None:
    """Leave few zips open, those used last: a process may open but so many files."""
    with _recent_lock:
        _recent[id(source)] = weakref.ref(source)
        _recent.move_to_end(id(source))
        n_more = max(0, len(_recent) - MOST_OPEN)
        oldest = [_recent.popitem(last=False)[1]() for _ in range(n_more)]
    for other in oldest:
        if other is not None and other is not source:
            other.close()


def _is_file(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 from systems without such a thing
    return not info.is_dir() and kind in (0, stat.S_IFREG)
