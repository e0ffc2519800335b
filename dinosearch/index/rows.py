"""What a catalog takes and gives: files, contents, sources and FAISS files as rows. Knows no SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dinosearch.images.source import FoundImage, ScanOptions

OK = "ok"
UNREADABLE = "unreadable"
TOO_LARGE = "too-large"


@dataclass(frozen=True)
class RootOptions(ScanOptions):
    """What an index remembers of how a source is to be seen."""

    all_pages: bool = False
    """Every page and frame is an image of its own, not only the first."""
    forgotten: tuple[tuple[str, str], ...] = ()
    """Path and member, as found, of what was erased and is still there: it is not taken in again."""


class Root(NamedTuple):
    """A source that the index follows, as the catalog knows it."""

    id: int
    kind: str
    location: str
    options: RootOptions
    stamp: str | None
    """The source's stamp when a sync last came to its end; None where only a scan can tell what is new."""


class StoredFile(NamedTuple):
    """A file as the catalog knows it before a sync; its further frames follow it."""

    id: int
    path: str
    member: str
    size: int
    mtime_ns: int
    content_hash: str | None
    status: str
    decoders: str | None
    metadata: str
    frames: int | None
    """How many frames are known; None where only the first was looked at."""
    embedded: bool
    """Its content, with all frames known, has vectors of the model asked about."""

    @property
    def image(self) -> FoundImage:
        """As a scan would find it, if it is as it was."""
        return FoundImage(self.path, self.size, self.mtime_ns, self.member, self.metadata)


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file or one frame of it, as a sync found it; written over what was known of the same root, path and member."""

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
    member: str = ""
    frame: int = 0
    frames: int | None = None
    """Of frame 0: how many there are, if the others were looked at; a file's rows beyond them are removed."""
    metadata: str = ""


@dataclass(frozen=True)
class DecoderKeys:
    """What a bad file was tried with; it is tried again when that changes."""

    decoders: str
    large: str
    """Decoders and pixel budget: for files that were refused for their size."""

    def of(self, status: str) -> str:
        return self.large if status == TOO_LARGE else self.decoders


class Content(NamedTuple):
    """What is known of a content (the bytes of a file), whatever the files that hold it."""

    status: str
    reason: str
    width: int | None
    height: int | None


class LiveFile(NamedTuple):
    """A file, or a frame of one, that a search can return."""

    root: int
    path: str
    member: str
    frame: int
    vector_id: int
    metadata: str
    """What a table says of it: a JSON object, or empty."""


class CopiedFile(NamedTuple):
    """A file or frame with its vector as stored, for another catalog."""

    row: FileRow
    vector: bytes | None
    """float16, of the answering model."""


class FailedFile(NamedTuple):
    """A file without a vector, and why."""

    root: int
    path: str
    member: str
    frame: int
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
    """What else is known of it: a JSON object."""
