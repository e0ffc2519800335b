"""Images in a tar: a plain one is read in any order, a compressed one from front to back.

In a webdataset, files of one name and different extensions belong together: 0001.jpg, 0001.cls, 0001.json. What stands
beside an image that way becomes its metadata. A tar that ends early has the images that came before; what
an index knows of others stays.
"""

from __future__ import annotations

import errno
import gzip
import importlib
import json
import lzma
import math
import re
import sys
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any, Self

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BadImage
from dinosearch.images.names import is_image_name
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
from dinosearch.images.sources.metadata import as_json

COMPRESSED = {
    (".tar.gz", ".tgz"): "gzip",
    (".tar.bz2", ".tbz2", ".tbz"): "bz2",
    (".tar.xz", ".txz"): "lzma",
    (".tar.zst", ".tzst"): "compression.zstd",
}
"""By extension: the module of the standard library that reads it."""

SIDECARS = ("json", "cls", "txt")

_MAX_SIDECAR_BYTES = 2**16
_MAX_NAME_BYTES = 2**20  # a header that brings a longer name or more attributes means to fill the memory
_LONG_HEADERS = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
_DAMAGE = (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a member is: the number of its entry, and of its first byte in the unpacked tar."""

    number: int
    offset: int
    size: int


class TarSource(Archive):
    """All members have the archive's time: tars of data sets often give theirs none, so a changed tar is read again."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.sequential = _compression(location) is not None
        self._members: dict[str, _Member] = {}
        self._scanned: ArchiveFacts | None = None

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        """One pass over the headers of a plain tar, over all bytes of a compressed one."""
        facts = self.facts()
        images: list[FoundImage] = []
        members: dict[str, _Member] = {}
        sidecars = _Sidecars()
        broken: list[tuple[str, str]] = []
        try:
            with _open(self.location) as tar:
                for number, info in _regular_members(tar):
                    name = member_name(info.name)
                    if is_image_name(name):
                        members[name] = _Member(number, info.offset_data, info.size)
                        images.append(FoundImage("", info.size, facts.mtime_ns, name))
                    else:
                        sidecars.see(tar, info, name)
        except _damage() as error:
            # EINVAL: the size that a member claims leads beyond what the file system can have.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise missing(self.location, error) from error
            if not images:
                raise damaged(self.location, error) from error
            broken.append(("", f"the archive is damaged: {str(error) or type(error).__name__}"))
        self._members, self._scanned = members, facts
        wanted = [replace(each, metadata=sidecars.of(each.member)) for each in wanted_members(images, options)]
        return Scan(wanted, broken)

    def read(self, image: FoundImage) -> StableBytes:
        assert not self.sequential
        member = self._member(image)
        try:
            with open(self.location, "rb", buffering=0) as file:  # noqa: PTH123 - surrogate escapes pass
                file.seek(member.offset)
                data = file.read(member.size)
        except OSError as error:
            raise BadImage("unreadable", error.strerror or str(error)) from error
        return self._checked(image, data)

    def stream(self, images: Iterable[FoundImage]) -> Iterator[tuple[FoundImage, StableBytes | BadImage]]:
        """What the archive does not have any more comes last."""
        wanted: dict[int, FoundImage] = {}
        failed: list[tuple[FoundImage, BadImage]] = []
        for image in images:
            try:
                wanted[self._member(image).number] = image
            except BadImage as bad:
                failed.append((image, bad))
        try:
            with _open(self.location) as tar:
                for number, info in _regular_members(tar):
                    if not wanted:
                        break
                    if number in wanted:
                        image = wanted[number]
                        file = tar.extractfile(info)
                        assert file is not None
                        data = file.read(info.size)
                        del wanted[number]
                        try:
                            yield image, self._checked(image, data)
                        except BadImage as bad:
                            yield image, bad
        except _damage() as error:
            failed += [(image, BadImage("unreadable", f"the archive: {error}")) for image in wanted.values()]
        yield from failed

    def _member(self, image: FoundImage) -> _Member:
        if self._scanned is None:
            self.scan(ScanOptions(), note=lambda _: None)
        member = self._members.get(image.member)
        if member is None:
            raise BadImage("unreadable", "is not in the archive any more")
        refuse_large(member.size)
        return member

    def _checked(self, image: FoundImage, data: bytes) -> StableBytes:
        if self.facts() != self._scanned:
            raise BadImage("unreadable", "the archive changes while it is read")
        if len(data) != self._members[image.member].size:
            raise BadImage("unreadable", "the archive ends within it")
        return StableBytes(data, image.mtime_ns)


class _Sidecars:
    """What stands beside images in a webdataset."""

    def __init__(self) -> None:
        self._values: defaultdict[str, dict[str, Any]] = defaultdict(dict)

    def see(self, tar: tarfile.TarFile, info: tarfile.TarInfo, name: str) -> None:
        key, extension = _key(name)
        if extension in SIDECARS and info.size <= _MAX_SIDECAR_BYTES:
            file = tar.extractfile(info)
            assert file is not None
            self._values[key].update(_sidecar(extension, file.read().decode("utf-8", "replace").strip()))

    def of(self, name: str) -> str:
        return as_json(self._values.get(_key(name)[0], {}))


def _key(name: str) -> tuple[str, str]:
    """As webdataset splits names: at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _sidecar(extension: str, text: str) -> dict[str, Any]:
    if extension == "cls":
        return {"cls": int(text) if re.fullmatch(r"-?\d{1,15}", text, re.ASCII) else text}
    if extension == "txt":
        return {"txt": text}
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=lambda _: None)  # JSON has no NaN
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {"json": value}


def _finite(text: str) -> float | None:
    """1e999 is a number to JSON, and infinity to Python."""
    value = float(text)
    return value if math.isfinite(value) else None


class _Header(tarfile.TarInfo):
    """As tarfile reads it, except that it takes whatever it cannot read for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0"):
                raise tarfile.ReadError(str(error)) from error
            raise
        if header.type in _LONG_HEADERS and header.size > _MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header

    def _block(self, count: int) -> int:
        """Bytes that a member takes up. A negative size would lead back to its header, again and again."""
        return -(-_size(count) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Unpacked:
    """The stream of a compressed tar. Past its end tarfile would read on for as long as a member's size claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ended = False

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if self._ended and not data:
            raise EOFError("unexpected end of data")
        self._ended = not data
        return data


def _size(claimed: int) -> int:
    """Raises ReadError for what is no size."""
    if not 0 <= claimed <= MOST_BYTES:
        raise tarfile.ReadError(f"a member of {claimed} bytes")
    return claimed


def _compression(location: str) -> str | None:
    lowered = location.lower()
    return next((module for ends, module in COMPRESSED.items() if lowered.endswith(ends)), None)


def _damage() -> tuple[type[BaseException], ...]:
    """What a damaged archive raises; Python 3.14 has an error of its own for zstd, loaded with its module."""
    zstd = sys.modules.get("compression.zstd")
    more: list[type[BaseException]] = [zstd.ZstdError] if zstd else []
    return (*_DAMAGE, *more)


@contextmanager
def _open(location: str) -> Iterator[tarfile.TarFile]:
    compression = _compression(location)
    file: IO[bytes]
    if compression is None:
        file = open(location, "rb")  # noqa: PTH123, SIM115 - closed below
    else:
        try:
            file = importlib.import_module(compression).open(location, "rb")
        except ModuleNotFoundError as error:
            raise DinosearchError(
                f"this Python cannot read {location} ({compression} is missing). Decompress it, or use a newer Python"
            ) from error
    source: Any = file if compression is None else _Unpacked(file)
    with file, tarfile.open(fileobj=source, mode="r:" if compression is None else "r|", tarinfo=_Header) as tar:
        yield tar


def _regular_members(tar: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Files and the numbers of their entries; keeps none of them, whatever their number."""
    number = 0
    kept: Any = tar
    while (info := tar.next()) is not None:
        if info.isreg() and not info.issparse():
            _size(info.size)  # a global header may have set it
            yield number, info
        number += 1
        kept.members.clear()
