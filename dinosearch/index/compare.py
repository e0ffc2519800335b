"""What changed between the catalog and the sources. Compares names, sizes and times; opens no file.

A file is as it was when size and time are; anything else is read and its hash decides.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dinosearch.errors import DinosearchError
from dinosearch.images.source import UNTRUSTED_TIME, FoundImage, Scan, Source
from dinosearch.index.rows import OK, UNREADABLE, DecoderKeys, FileRow, StoredFile

MAX_GONE = 0.2
"""Share of a root's files that may be gone without being asked about: more looks like a disk half mounted."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A file that has to be read."""

    root: int
    source: Source
    found: FoundImage
    stored: StoredFile | None
    """What the catalog knows of it, under this path or the one it was moved from."""
    all_pages: bool = False
    """Each of its pages or frames is an image, not only the first."""
    moved: bool = False
    verified: bool = False
    """Size and time say that it is as it was; it is read to be sure."""

    @property
    def path(self) -> str:
        return self.source.shown_path(self.found)

    def outcome(self, row: FileRow) -> str:
        """Which count of the summary the file belongs to, now that it was read."""
        if row.status != OK:
            return "failed"
        if self.stored is None:
            return "new"
        same = row.content_hash == self.stored.content_hash and self.stored.status in (OK, UNREADABLE)
        return "changed" if not same else "moved" if self.moved else "unchanged"

    def loses_by(self, rows: Sequence[FileRow]) -> bool:
        """Whether the file is as it was, as far as can be told, and these rows leave less of it to search."""
        before, first = self.stored, rows[0]
        if before is None or before.status != OK:
            return False
        if first.content_hash is None:
            as_it_was = (first.size, first.mtime_ns) == (before.size, before.mtime_ns)
        else:
            as_it_was = first.content_hash == before.content_hash
        return as_it_was and (len(rows) < (before.frames or 1) or any(row.status != OK for row in rows))


@dataclass(frozen=True)
class View:
    """A source as a sync sees it, and how."""

    root: int
    source: Source
    scan: Scan | None
    """None for a source whose stamp tells that it holds what it held."""
    all_pages: bool = False
    verify: bool = False
    """Read unchanged files too."""
    excluded: Callable[[FoundImage], bool] = lambda _: False
    """Whether a file that was not found is there and left out on purpose, now that the options are others."""


@dataclass
class Changes:
    """What a sync has to do, over all its roots."""

    n_unchanged: int = 0
    n_failed: int = 0
    """Bad files that are as they were, and need not be read."""
    wanted: list[Wanted] = field(default_factory=list)
    gone: dict[str, list[StoredFile]] = field(default_factory=dict)
    """By location of the root: files that were there and are not."""
    excluded: list[StoredFile] = field(default_factory=list)
    """Files that leave the index because it was asked for, and no sign of a missing disk."""
    relabelled: list[tuple[int, str]] = field(default_factory=list)
    """Files (their id) of which a table says something else now."""
    n_missing: dict[str, int] = field(default_factory=dict)
    """By location of the root: good files that a list or table still names, and that are not there."""
    n_stored: dict[str, int] = field(default_factory=dict)
    """By location of the root: files that the catalog has."""
    lost: list[StoredFile] = field(default_factory=list)
    """Files of sources that nobody asked for and that are not there: they may have moved, else they stay."""
    n_out_of_reach: int = 0
    """Files with a vector of another model only, below folders that could not be listed."""

    def add_lost(self, stored: Iterable[StoredFile]) -> None:
        """Remember those of a lost source's files that have as many bytes as a new one."""
        if sizes := {wanted.found.size for wanted in self.wanted if wanted.stored is None}:
            self.lost += [each for each in stored if each.content_hash and each.size in sizes]

    def news_like_gone(self) -> list[Wanted]:
        """New files that may be gone or lost ones under another name: one of these has as many bytes."""
        known = itertools.chain(self.lost, *self.gone.values())
        sizes = {stored.size for stored in known if stored.content_hash}
        return [wanted for wanted in self.wanted if wanted.stored is None and wanted.found.size in sizes]


def compare(changes: Changes, view: View, stored: Iterable[StoredFile], keys: DecoderKeys) -> None:
    """Add to `changes` what is to be done for one root.

    Goes through the catalog's rows one by one and keeps none that are as they were: memory holds one list of names.
    """
    found = {(image.path, image.member): image for image in view.scan.images} if view.scan else None
    # A place that could not be looked through at all, such as a tar that is cut short, is the folder "".
    hidden = tuple(f"{folder}/" if folder else "" for folder, _ in view.scan.unreadable_folders) if view.scan else ()
    gone = changes.gone.setdefault(view.source.location, [])
    wanted: list[Wanted] = []
    n_stored = n_missing = 0
    for before in stored:
        n_stored += 1
        image = before.image if found is None else found.pop((before.path, before.member), None)
        if image is None:
            if not (hidden and before.path.startswith(hidden)):
                (changes.excluded if view.excluded(before.image) else gone).append(before)
            elif before.status == OK and not before.embedded:
                changes.n_out_of_reach += 1
            continue
        was_sure = before.status == OK and before.mtime_ns != UNTRUSTED_TIME  # some servers never say anything
        n_missing += was_sure and (image.size, image.mtime_ns) == (0, UNTRUSTED_TIME)
        same = _needs_no_reading(before, image, keys, all_pages=view.all_pages)
        if not same or view.verify:
            wanted.append(Wanted(view.root, view.source, image, before, view.all_pages, verified=same))
            continue
        if before.metadata != image.metadata:
            changes.relabelled.append((before.id, image.metadata))
        if before.status == OK:
            changes.n_unchanged += 1
        else:
            changes.n_failed += 1
    changes.n_stored[view.source.location], changes.n_missing[view.source.location] = n_stored, n_missing
    wanted += [Wanted(view.root, view.source, image, None, view.all_pages) for image in (found or {}).values()]
    changes.wanted += sorted(wanted, key=lambda each: (os.fsencode(each.found.path), os.fsencode(each.found.member)))


def _needs_no_reading(before: StoredFile, found: FoundImage, keys: DecoderKeys, *, all_pages: bool) -> bool:
    if (before.size, before.mtime_ns) != (found.size, found.mtime_ns) or found.mtime_ns == UNTRUSTED_TIME:
        return False
    if before.status != OK:
        return before.decoders == keys.of(before.status)
    return before.embedded and (before.frames is not None or not all_pages)


def match_moves(hashes: Mapping[Wanted, str], changes: Changes) -> dict[Wanted, StoredFile]:
    """Pair new files (and their content's hash) and gone files of equal content, by path; a further copy stays new.

    Lost files are taken after gone ones, which would leave the index. Takes the pairs out of `changes.gone`, and out of
    `changes.wanted` the new files.
    """
    by_content: defaultdict[str, list[StoredFile]] = defaultdict(list)
    for files in (changes.lost, itertools.chain.from_iterable(changes.gone.values())):  # the last are taken first
        for stored in sorted(files, key=lambda each: (os.fsencode(each.path), os.fsencode(each.member)), reverse=True):
            if stored.content_hash:
                by_content[stored.content_hash].append(stored)
    moves = {wanted: by_content[content].pop() for wanted, content in hashes.items() if by_content.get(content)}
    found_again = {stored.id for stored in moves.values()}
    for root, gone in changes.gone.items():
        changes.gone[root] = [stored for stored in gone if stored.id not in found_again]
    changes.wanted = [wanted for wanted in changes.wanted if wanted not in moves]
    return moves


def refuse_mass_deletion(changes: Changes, *, but: Collection[str] = ()) -> None:
    """Raise DinosearchError if more than MAX_GONE of a root's files are gone, unless it is one of those in `but`."""
    for root, gone in changes.gone.items():
        n_stored, n_gone = changes.n_stored[root], len(gone) + changes.n_missing[root]
        if n_gone > MAX_GONE * n_stored and root not in but:
            raise DinosearchError(
                f"{n_gone} of {n_stored} images are gone from {root}; nothing was changed. "
                "If that is meant, index it again with --yes; if a disk is missing, attach it first"
            )
