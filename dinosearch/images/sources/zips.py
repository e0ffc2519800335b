"""Images in a zip file, read in any order."""

from __future__ import annotations

import lzma
import stat
import threading
import zipfile
import zlib
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


class ZipSource(Archive):
    """A member's checksum stands in place of its time, which zips know to two seconds, and which may be any.

    The file is opened once. Its directory stands at its end: one that was cut off cannot be read at all.
    """

    sequential = False

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._lock = threading.Lock()
        self._opened: tuple[zipfile.ZipFile, ArchiveFacts, dict[str, zipfile.ZipInfo]] | None = None

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        with self._lock:
            self._opened = None  # it may be another one now
        _, _, members = self._open()
        images = [FoundImage("", min(info.file_size, MOST_BYTES), info.CRC, name) for name, info in members.items()]
        return Scan(wanted_members(images, options))

    def read(self, image: FoundImage) -> StableBytes:
        archive, opened_as, members = self._open()
        info = members.get(image.member)
        if info is None:
            raise BadImage("unreadable", "is not in the archive any more")
        if info.flag_bits & 1:
            raise BadImage("unreadable", "encrypted")
        refuse_large(info.file_size)
        try:
            with self._lock:
                file = archive.open(info)
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
        with self._lock:
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
            return self._opened


def _is_file(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 from systems without such a thing
    return not info.is_dir() and kind in (0, stat.S_IFREG)
