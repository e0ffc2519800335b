"""What a source of images is: a place that can be scanned for images and read. Knows no kinds of source.

A source has a location, by which an index knows it again, and gives images whose paths are relative to it, so that a
source which moved as a whole is still the same. `open_source` in `dinosearch.images.sources` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dinosearch.images.decode import BadImage

UNTRUSTED_TIME = -1
"""An mtime_ns that equals none: the file was written so shortly before that a later change might leave its time."""

MOST_BYTES = 2**63 - 1
"""No file has more, and SQLite no larger number, whatever an archive or a server claims."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that a source has, by name; what it really is, its content decides later."""

    path: str
    """Relative to the source's location, "/" between parts; bytes that are not UTF-8 as surrogate escapes. Lists and
    tables may also name absolute paths and URLs. Empty where the location itself is the file: an archive's images."""
    size: int
    """Bytes; of a member, its own."""
    mtime_ns: int
    """Time of the last change, nanoseconds; of a member, its own or its archive's."""
    member: str = ""
    """Name inside an archive."""
    metadata: str = ""
    """What a table says of it besides: a JSON object, or empty."""


@dataclass(frozen=True)
class Scan:
    """What a source has."""

    images: list[FoundImage]
    """Sorted by path and member, in byte order."""
    unreadable_folders: list[tuple[str, str]] = field(default_factory=list)
    """Relative path and reason of each folder that could not be listed: what lies below it is unknown, not gone. The
    empty path is the whole source: of a damaged archive all is unknown that is not among the images."""


@dataclass(frozen=True, slots=True)
class StableBytes:
    """A file's bytes with the time it had while they were read."""

    data: bytes
    mtime_ns: int
    """UNTRUSTED_TIME where a later change might leave it as it is."""


@dataclass(frozen=True)
class ScanOptions:
    """What of a source counts; an index remembers it with the source."""

    exclude: tuple[str, ...] = ()
    """Patterns as in .gitignore, of relative paths that are passed over."""
    include_hidden: bool = False
    """Take names that begin with a dot too."""


class Source(Protocol):
    """A place that holds images. `scan` and `read` raise DinosearchError when the place itself is not there."""

    kind: str
    """folder, files, glob, list, table, archive or remote."""
    location: str
    """Absolute path, pattern or URL: what an index knows the source by."""
    sequential: bool
    """Images can only be read in the order of the source, through `stream`: compressed tars."""

    def stamp(self) -> str | None:
        """Changes whenever something inside may have changed, and costs next to nothing; None where only a scan can
        tell. Archives: size and time of their file."""
        ...

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:
        """All images that are there now."""
        ...

    def file_path(self, image: FoundImage) -> str | None:
        """The local file that holds exactly this image's bytes; None for members of archives and remote objects."""
        ...

    def shown_path(self, image: FoundImage) -> str:
        """Absolute path or URL for people and programs; a member's is its archive's path, "/" and its name."""
        ...

    def read(self, image: FoundImage) -> StableBytes:
        """Its bytes; safe in any thread. Raises BadImage. Not for sequential sources."""
        ...

    def stream(self, images: Iterable[FoundImage]) -> Iterator[tuple[FoundImage, StableBytes | BadImage]]:
        """The bytes of some images, in the order of the source, one at a time. For sequential sources."""
        ...
