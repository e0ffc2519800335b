"""Sources of images: from what a user typed, or from what an index remembers. Knows the kinds, not their inside."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BadImage
from dinosearch.images.names import is_image_name
from dinosearch.images.read import read_stable
from dinosearch.images.source import UNTRUSTED_TIME, FoundImage, Source, StableBytes
from dinosearch.images.sources.archives import missing
from dinosearch.images.sources.files import FilesSource
from dinosearch.images.sources.folder import FolderSource
from dinosearch.images.sources.glob import GlobSource, absolute_pattern, is_pattern
from dinosearch.images.sources.lists import ListSource, is_text
from dinosearch.images.sources.remote import RemoteSource, fetch, is_url, open_files
from dinosearch.images.sources.tables import TABLE_EXTENSIONS, TableSource
from dinosearch.images.sources.tars import COMPRESSED, TarSource
from dinosearch.images.sources.zips import ZipSource

ARCHIVE_EXTENSIONS = (".zip", ".cbz", ".tar", *(each for ends in COMPRESSED for each in ends))


def open_sources(specs: Iterable[str]) -> list[Source]:
    """The sources that some words on a command line name, each once; files of one folder together.

    Raises DinosearchError where a word names nothing, or nothing that holds images.
    """
    found: dict[tuple[str, str], Source] = {}
    for spec in specs:
        for source in open_source(spec):
            first = found.setdefault((source.kind, source.location), source)
            if isinstance(first, FilesSource) and isinstance(source, FilesSource):
                first.add(source.names)
    return list(found.values())


def open_source(spec: str) -> list[Source]:
    """What one word names: a place, or the archives and the images that match a pattern. Raises DinosearchError."""
    if is_url(spec):
        open_files(spec)  # other protocols, a missing extra
        return [RemoteSource(spec.rstrip("/"))]
    try:
        mode = os.stat(spec).st_mode  # noqa: PTH116 - surrogate escapes pass
    except (OSError, ValueError) as error:
        if is_pattern(spec):
            return _matching(spec)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DinosearchError(f"no folder or file {spec}. Check the path; nothing was changed") from error
        raise missing(spec, error) from error
    if stat.S_ISDIR(mode):
        return [FolderSource(os.path.realpath(spec))]
    folder, name = os.path.split(spec)
    location = os.path.join(os.path.realpath(folder), name)  # noqa: PTH118 - surrogate escapes pass
    if stat.S_ISREG(mode):  # and no pipe, whatever its name
        if is_image_name(name):
            return [FilesSource(os.path.realpath(folder), [name])]
        if name.lower().endswith(ARCHIVE_EXTENSIONS):
            return [known_source("archive", location)]
        if name.lower().endswith(TABLE_EXTENSIONS):
            return [TableSource(location)]
        if is_text(location):
            return [ListSource(location)]
    raise DinosearchError(
        f"{spec} is no folder, image, list of paths (text), table (.csv, .tsv, .parquet) or archive "
        "(.zip, .tar, .tar.gz …). Give one of these; its name says which it is"
    )


def known_source(kind: str, location: str) -> Source:
    """The source that an index remembers; it need not be there any more, then scanning it raises DinosearchError."""
    if kind == "archive":
        return ZipSource(location) if location.lower().endswith((".zip", ".cbz")) else TarSource(location)
    kinds = (FolderSource, FilesSource, GlobSource, ListSource, TableSource, RemoteSource)
    return {each.kind: each for each in kinds}[kind](location)


def base_name(source: Source) -> str:
    """A name for what is made of it: the last part of its location that is no pattern, without a file's ending."""
    parts = [part for part in re.split(r"[/\\]", source.location) if part and not re.search(r"[*?\[]", part)]
    base = parts[-1] if parts else ""
    if source.kind in ("archive", "list", "table"):
        base = base.partition(".")[0]
    base = re.sub(r"[\x00-\x1f]", "", base).lstrip(".") or "images"
    return os.fsencode(base).decode("utf-8", "replace")


def read_image(path: str) -> StableBytes:
    """The bytes behind what was printed or typed: a file, a URL, or a member of an archive, photos.zip/a.jpg.

    Raises BadImage, and DinosearchError where an extra is missing.
    """
    if is_url(path):
        return StableBytes(fetch(path), UNTRUSTED_TIME)
    at = path.find("/", 1)
    while at > 0 and not os.path.exists(path):  # noqa: PTH110 - Path's raises where it may not look
        archive, member = path[:at], path[at + 1 :]
        if archive.lower().endswith(ARCHIVE_EXTENSIONS) and os.path.isfile(archive):  # noqa: PTH113
            try:
                return _read_member(known_source("archive", archive), member)
            except DinosearchError as error:
                raise BadImage("unreadable", str(error)) from error
        at = path.find("/", at + 1)
    return read_stable(path)


def _matching(pattern: str) -> list[Source]:
    source = GlobSource(absolute_pattern(pattern))
    found = sorted(source.paths(), key=os.fsencode)
    sources: list[Source] = [
        known_source("archive", os.path.join(source.base, path))  # noqa: PTH118 - surrogate escapes pass
        for path in found
        if path.lower().endswith(ARCHIVE_EXTENSIONS)
    ]
    if any(is_image_name(path) for path in found):
        sources.append(source)
    if not sources:
        raise DinosearchError(f"no image or archive matches {pattern}. Check the pattern; ** stands for any folders")
    return sources


def _read_member(archive: Source, member: str) -> StableBytes:
    image = FoundImage("", 0, 0, member)
    if not archive.sequential:
        return archive.read(image)
    [(_, found)] = archive.stream([image])
    if isinstance(found, BadImage):
        raise found
    return found
