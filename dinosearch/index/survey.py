"""Look at the sources as an index is to see them: the options it remembers, what is there, what needs no looking.

Knows the catalog's roots, none of its files. Nothing is written here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.source import FoundImage, Scan, Source
from dinosearch.images.sources.files import FilesSource
from dinosearch.index.rows import Root, RootOptions


@dataclass(frozen=True)
class GivenOptions:
    """Options of the sources that are asked for this time; None leaves what the index remembers."""

    exclude: tuple[str, ...] | None = None
    """Patterns as in .gitignore; they replace those before."""
    include_hidden: bool | None = None
    all_pages: bool | None = None

    def over(self, before: RootOptions) -> RootOptions:
        return RootOptions(
            exclude=before.exclude if self.exclude is None else self.exclude,
            include_hidden=before.include_hidden if self.include_hidden is None else self.include_hidden,
            all_pages=before.all_pages if self.all_pages is None else self.all_pages,
            forgotten=before.forgotten,
        )


@dataclass(frozen=True)
class Shard:
    """One of n parts of the images, by their names: the same on every machine."""

    number: int
    """From 1."""
    n: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "2/8". Raises UsageError."""
        number, slash, n = text.partition("/")
        if not (slash and number.isdecimal() and n.isdecimal() and 1 <= int(number) <= int(n)):
            raise UsageError(f"{text!r} is no part of the whole. Write --shard 1/4 to --shard 4/4 for four parts")
        return cls(int(number), int(n))

    def __str__(self) -> str:
        return f"{self.number}/{self.n}"

    def has(self, image: FoundImage) -> bool:
        name = os.fsencode(image.path) + b"\0" + os.fsencode(image.member)
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") % self.n == self.number - 1


@dataclass(frozen=True)
class Survey:
    """A source as it is now."""

    source: Source
    before: RootOptions | None
    """The options that the index remembers; None of a source that is new to it."""
    options: RootOptions
    stamp: str | None
    """Taken before the scan: a change meanwhile is found the next time."""
    scan: Scan | None
    """None where the stamp tells that all is as it was."""

    @property
    def seen_otherwise(self) -> bool:
        return self.before is not None and self.before != self.options


def survey(
    source: Source,
    root: Root | None,
    given: GivenOptions,
    *,
    known_names: Iterable[str] = (),
    verify: bool = False,
    shard: Shard | None = None,
    note: Callable[[str], None],
) -> Survey:
    """Look at one source. Raises DinosearchError when it is not there or has no images."""
    if root is not None and root.kind != source.kind:
        raise DinosearchError(
            f"{source.location} is indexed as {root.kind} and cannot be {source.kind} in the same index. "
            "Give it as it was, or index it under another --name"
        )
    before = root.options if root else None
    options = given.over(before or RootOptions())
    if isinstance(source, FilesSource):
        source.add(known_names)
    stamp = source.stamp()
    if root is not None and stamp is not None and stamp == root.stamp and options == before and not verify:
        return Survey(source, before, options, stamp, None)
    scan = source.scan(options, note=note)
    if not scan.images:
        raise DinosearchError(
            f"no image found in {source.location}; nothing was changed. Check the path, and that its disk is attached"
        )
    if options.forgotten:
        forgotten = frozenset(options.forgotten)
        scan = replace(scan, images=[image for image in scan.images if (image.path, image.member) not in forgotten])
    for folder, reason in scan.unreadable_folders:
        note(f"{source.location}/{folder} cannot be listed ({reason}): what lies there stays as it was")
    if shard:
        scan = replace(scan, images=[image for image in scan.images if shard.has(image)])
    return Survey(source, before, options, stamp, scan)


def say_options(surveys: Iterable[Survey], given: Mapping[str, GivenOptions], note: Callable[[str], None]) -> None:
    """What is remembered from earlier runs and holds on is said: it decides what is searched.

    given: by location, those of the sources that were asked for.
    """
    for each in surveys:
        if each.before is None:
            continue
        now = given.get(each.source.location, GivenOptions())
        kept = []
        if now.exclude is None and each.before.exclude:
            kept.append(f"without {', '.join(each.before.exclude)}")
        if each.before.forgotten:
            kept.append(f"without {len(each.before.forgotten)} forgotten")
        if now.include_hidden is None and each.before.include_hidden:
            kept.append("with hidden names")
        if now.all_pages is None and each.before.all_pages:
            kept.append("every page")
        if kept:
            note(f"{each.source.location}: {', '.join(kept)}, as before")


def refuse_overlap(sources: Iterable[Source | Root]) -> None:
    """Raise UsageError for a folder inside another one: its images would be found twice."""
    folders = {source.location: PurePath(source.location) for source in sources if source.kind == "folder"}
    for outer in folders.values():
        for inner in folders.values():
            if outer in inner.parents:
                raise UsageError(
                    f"{inner} lies inside {outer}, which is indexed here too. Index one of them, or use two indexes"
                )
