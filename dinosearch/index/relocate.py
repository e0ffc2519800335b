"""Tell an index that its sources lie elsewhere now: a disk that got another mount point, a folder that was moved.

Files keep their rows, so nothing is read again but a sample, which proves that it is the same source.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.decode import BadImage, content_hash
from dinosearch.images.reading import readings
from dinosearch.images.source import Source
from dinosearch.images.sources import known_source
from dinosearch.index.catalog import Catalog
from dinosearch.index.compare import MAX_GONE, Wanted
from dinosearch.index.lock import writer_lock
from dinosearch.index.rows import Root
from dinosearch.index.survey import refuse_overlap

SAMPLE = 32
"""Files of each source that are read in the new place before anything is changed."""


@dataclass(frozen=True)
class Relocated:
    """What has another place now."""

    index: str
    sources: dict[str, str]
    """Earlier and present location of each source that moved."""
    entries: int
    """Absolute paths in lists and tables that changed with it."""


def relocate(index_path: Path, old: str, new: str, *, note: Callable[[str], None] = lambda _: None) -> Relocated:
    """Move all sources at or below `old`, and absolute paths in lists and tables, to the same places at `new`.

    Raises DinosearchError, with nothing changed, if no source lies there, if one is known at the new place already, or
    if a sample of the files is not at the new place with the same content.
    """
    after = new.rstrip("/") if "://" in new else os.path.realpath(new)
    with Catalog.open(index_path):
        pass  # says what is wrong with the index before the lock makes a file
    with writer_lock(index_path), Catalog.open(index_path, writable=True, note=note) as catalog:
        roots = catalog.roots().values()
        before = _place_before(old, roots)
        if before == after:
            raise UsageError(f"{old} and {new} are the same place. Give where the images were, and where they are")
        places = {root.id: _moved_location(root, before, after) for root in roots}
        entries = {root.id: _moved_entries(catalog, root, before, after) for root in roots}
        moved = [root for root in roots if places[root.id] != root.location or entries[root.id]]
        if not moved:
            known = ", ".join(root.location for root in roots)
            raise DinosearchError(f"no source of {index_path.name} lies in {before}. It follows {known}")
        stay = {root.location for root in roots} - {root.location for root in moved}
        if taken := stay & {places[root.id] for root in moved}:
            raise DinosearchError(
                f"{index_path.name} follows {taken.pop()} already; nothing was changed. Forget it first"
            )
        sources = {root.id: known_source(root.kind, places[root.id]) for root in roots}
        refuse_overlap(sources.values())
        for root in moved:
            _check_sample(catalog, root, sources[root.id], entries[root.id])
        for root in moved:
            if root.kind in ("list", "table") and root.options.forgotten:
                forgotten = [(_moved(path, before, after) or path, member) for path, member in root.options.forgotten]
                catalog.set_options(root.id, replace(root.options, forgotten=tuple(forgotten)))
            catalog.relocate(root.id, places[root.id], entries[root.id].items())
        catalog.commit()
    changed = {root.location: places[root.id] for root in moved if places[root.id] != root.location}
    return Relocated(index_path.name, changed, sum(len(each) for each in entries.values()))


def _place_before(old: str, roots: Collection[Root]) -> str:
    """As the index spells it: where there is a link now, it may have been a folder, or a link to what moved."""
    if "://" in old:
        return old.rstrip("/")
    literal = os.path.abspath(old)  # noqa: PTH100 - keeps surrogate escapes
    known = any(_moved_location(root, literal, "/elsewhere") != root.location for root in roots)
    return literal if known else os.path.realpath(old)


def _moved_location(root: Root, before: str, after: str) -> str:
    if root.kind == "glob":
        before, after = glob.escape(before), glob.escape(after)
    return _moved(root.location, before, after) or root.location


def _moved(path: str, before: str, after: str) -> str | None:
    """The path in its new place, None if it lies elsewhere."""
    if path == before:
        return after
    inside = before.rstrip("/") + "/"
    return f"{after.rstrip('/')}/{path[len(inside) :]}" if path.startswith(inside) else None


def _moved_entries(catalog: Catalog, root: Root, before: str, after: str) -> dict[int, str]:
    """By id: the new paths of a root's files that are named by absolute path or URL."""
    if root.kind not in ("list", "table"):
        return {}
    stored = list(catalog.stored_files(root.id, fingerprint=catalog.fingerprint))
    entries = {each.id: path for each in stored if (path := _moved(each.path, before, after))}
    stay = {each.path for each in stored if each.id not in entries}
    if taken := sorted(stay.intersection(entries.values())):
        raise UsageError(
            f"{root.location} names {taken[0]} already, and its place under {before} too; nothing was changed. "
            f"Name each once in {root.location}, run index, then relocate"
        )
    return entries


def _check_sample(catalog: Catalog, root: Root, source: Source, entries: dict[int, str]) -> None:
    """Raise DinosearchError if of some files all over the source too many are not in the new place as they were."""
    files = [stored for stored in catalog.stored_files(root.id, fingerprint=catalog.fingerprint) if stored.content_hash]
    files.sort(key=lambda stored: (os.fsencode(stored.path), stored.member))
    sample = files[:: max(1, len(files) // SAMPLE)][:SAMPLE]
    places = [replace(stored.image, path=entries.get(stored.id, stored.path)) for stored in sample]
    wanted = [Wanted(root.id, source, image, stored) for image, stored in zip(places, sample, strict=True)]
    algorithm = catalog.meta("content_hash")
    missed = []
    for reading in readings(wanted):
        stored = reading.wanted.stored
        assert stored is not None
        try:
            same = content_hash(reading.stable_bytes().data, algorithm) == stored.content_hash
            reason = "holds something else"
        except BadImage as bad:
            same, reason = False, bad.reason
        if not same:
            missed.append(f"{reading.wanted.path}: {reason}")
    if len(missed) > MAX_GONE * len(sample):
        raise DinosearchError(
            f"of {len(sample)} files {len(missed)} are not in {source.location} as they were ({missed[0]}); nothing "
            f"was changed. Check that this is where {root.location} moved to"
        )
