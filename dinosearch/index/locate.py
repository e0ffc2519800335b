"""Which index is meant: by name, by folder, by the sources it follows, or the newest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dinosearch.errors import DinosearchError, IndexNotFound, UsageError
from dinosearch.images.source import Source
from dinosearch.images.sources import base_name
from dinosearch.index.catalog import Catalog, is_index


def indexes_path() -> Path:
    """Folder of all indexes: $DINOSEARCH_INDEXES, or `indexes` in the current folder."""
    return Path(os.environ.get("DINOSEARCH_INDEXES") or "indexes")


def list_indexes(indexes: Path, *, left_out: Callable[[DinosearchError], None] = lambda _: None) -> list[Path]:
    """Indexes, newest first by the time of their creation, without those that were only begun.

    One that cannot be opened is left out, and `left_out` is told what is wrong with it. Hidden ones are unfinished: a
    merge makes its index aside.
    """
    found = []
    for path in _folder_entries(indexes):
        if is_index(path) and not path.name.startswith("."):
            try:
                with Catalog.open(path) as catalog:
                    if catalog.roots():
                        found.append((catalog.meta("created"), path))
            except IndexNotFound:
                continue
            except DinosearchError as error:
                left_out(error)
    return [path for _, path in sorted(found, reverse=True)]


def resolve_index(spec: str | None, *, indexes: Path, note: Callable[[str], None]) -> Path:
    """Folder of an index by name or path; the newest one without, which `note` is told.

    Raises IndexNotFound; without a name, what is wrong with the first one where none can be opened.
    """
    if spec is not None:
        for path in (indexes / spec, Path(spec)):
            if is_index(path):
                return path
        raise IndexNotFound(
            f"no index {spec} in {indexes}. Build one: dinosearch index IMAGES --name {Path(spec).name}"
        )
    unusable: list[DinosearchError] = []
    found = list_indexes(indexes, left_out=unusable.append)
    if not found and unusable:
        raise unusable[0]
    if not found:
        raise IndexNotFound(f"no index in {indexes}. Build one: dinosearch index IMAGES")
    for error in unusable:
        note(f"left out: {error}")
    newest = "the newest that can be opened" if unusable else "the newest"
    note(f"index: {found[0]} ({newest}; --index chooses another)")
    return found[0]


def index_for(
    sources: Sequence[Source],
    *,
    name: str | None,
    indexes: Path,
    shard: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Where to index sources: under `name`; else in the index that follows them; else under the first one's name.

    Sources that no index follows yet join the index of those that one does, if it follows all of these: a pattern
    matches one more archive, or one more folder is named. A name that another source's index has gets a number: name-2;
    one of a shard says which part it is.
    Raises UsageError for a name that is no file name, and IndexUnusable where the index of that name cannot be opened:
    it may be the one that is meant.
    """
    if name is not None:
        return indexes / checked_name(name)
    locations = {source.location for source in sources}
    followed: dict[Path, set[str]] = {}
    for path in list_indexes(indexes, left_out=lambda error: note(f"left out: {error}")):
        with Catalog.open(path) as catalog:
            if catalog.shard() == shard:
                followed[path] = locations & {root.location for root in catalog.roots().values()}
    by_any = set[str]().union(*followed.values())
    for path, by_this in followed.items():
        if by_this and by_this == by_any:
            if by_this != locations:
                counts = f"{len(by_this)} of these {len(locations)} sources"
                note(f"{path.name} follows {counts}, and the others from now on; --name makes another index")
            return path
    base = base_name(sources[0]) + (f"-shard-{shard.replace('/', '-of-')}" if shard else "")
    path, number = indexes / base, 2
    while path.exists() and not _begun(path):
        path, number = indexes / f"{base}-{number}", number + 1
    return path


def checked_name(name: str) -> str:
    """Raises UsageError for a name that is no file name."""
    if not re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", name):
        raise UsageError(f"{name!r} cannot be the name of an index. Use letters, digits, - and _")
    return name


def _folder_entries(indexes: Path) -> list[Path]:
    try:
        return sorted(indexes.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DinosearchError(
            f"the indexes in {indexes} cannot be listed ({error.strerror}). Check its permissions, or let "
            "DINOSEARCH_INDEXES name another folder"
        ) from error


def _begun(path: Path) -> bool:
    """Whether a first run was killed here before it saved anything."""
    if not is_index(path):
        return os.access(path, os.R_OK | os.X_OK) and path.is_dir() and not any(path.glob("vectors-*"))
    try:
        with Catalog.open(path) as catalog:
            return not catalog.roots()
    except IndexNotFound:
        return True
