"""Archives of images: what zip files and tars have in common, and which is which. Nothing is extracted or written.

A member's name is only a name, whatever it says: absolute, with "..", of another system. Of several members with one
name the last counts, as it would after extracting. Links, devices and sparse files are passed over.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BadImage
from dinosearch.images.names import is_image_name, passed_over_test
from dinosearch.images.read import file_time, trusted_time
from dinosearch.images.source import UNTRUSTED_TIME, FoundImage, ScanOptions

MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is not unpacked into memory."""


class Archive:
    """What is the same for every kind of archive; `location` is its file."""

    kind = "archive"

    def __init__(self, location: str) -> None:
        self.location = location

    def stamp(self) -> str | None:
        """Size and time of the file; None if a change right now might leave both as they are."""
        facts = self.facts()
        if trusted_time(facts.mtime_ns, now=time.time_ns()) == UNTRUSTED_TIME:
            return None
        return f"{facts.size}:{facts.mtime_ns}"

    def file_path(self, image: FoundImage) -> str | None:  # noqa: ARG002
        return None

    def shown_path(self, image: FoundImage) -> str:
        return f"{self.location}/{image.member}"

    def facts(self) -> ArchiveFacts:
        """Raises DinosearchError if the archive is not there."""
        try:
            found = os.stat(self.location)  # noqa: PTH116 - surrogate escapes pass
        except OSError as error:
            raise missing(self.location, error) from error
        return ArchiveFacts(found.st_ino, found.st_size, file_time(found))


@dataclass(frozen=True)
class ArchiveFacts:
    """By which a change of the archive is noticed."""

    inode: int
    size: int
    mtime_ns: int


def wanted_members(images: list[FoundImage], options: ScanOptions) -> list[FoundImage]:
    """Those with an image's name that are neither hidden nor excluded, the last of each name, in byte order."""
    passed_over = passed_over_test(options)
    last = {image.member: image for image in images if is_image_name(image.member) and not passed_over(image.member)}
    return sorted(last.values(), key=lambda image: os.fsencode(image.member))


def member_name(name: str) -> str:
    """tar writes ./a.jpg for what others call a.jpg."""
    while name.startswith("./"):
        name = name[2:]
    return name


def refuse_large(size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise BadImage("too-large", f"{size >> 20} MiB; at most {MAX_MEMBER_BYTES >> 20} MiB are unpacked")


def missing(location: str, error: OSError | ValueError) -> DinosearchError:
    reason = getattr(error, "strerror", None) or error
    return DinosearchError(f"cannot read {location} ({reason}). Check the path; what is indexed of it stays as it is")


def damaged(location: str, error: BaseException) -> DinosearchError:
    reason = str(error) or type(error).__name__
    return DinosearchError(
        f"{location} cannot be read as an archive ({reason}). Check that it was copied whole; what is indexed of it "
        "stays as it is"
    )
