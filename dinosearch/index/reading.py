"""The bytes of wanted files, from sources that are read in any order and from those that only stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dinosearch.images.decode import BadImage
from dinosearch.images.source import StableBytes
from dinosearch.index.compare import Wanted
from dinosearch.index.rows import UNREADABLE


@dataclass(frozen=True, slots=True)
class Reading:
    """A wanted file that is ready to be read, in any thread."""

    wanted: Wanted
    streamed: StableBytes | BadImage | None = None
    """What came out of a source that only streams."""

    def stable_bytes(self) -> StableBytes:
        """Raises BadImage."""
        if self.streamed is None:
            return self.wanted.source.read(self.wanted.found)
        if isinstance(self.streamed, BadImage):
            raise self.streamed
        return self.streamed


def readings(wanted: Iterable[Wanted]) -> Iterator[Reading]:
    """Every wanted file once; those of a source that streams in its order, read here, in the caller's thread."""
    for (_, sequential), files in itertools.groupby(wanted, key=lambda each: (each.root, each.source.sequential)):
        if sequential:
            yield from _streamed(list(files))
        else:
            yield from map(Reading, files)


def _streamed(files: list[Wanted]) -> Iterator[Reading]:
    remaining = {(each.found.path, each.found.member): each for each in files}
    for found, data in files[0].source.stream([each.found for each in files]):
        if each := remaining.pop((found.path, found.member), None):
            yield Reading(each, data)
    for each in remaining.values():
        yield Reading(each, BadImage(UNREADABLE, "it is not in its archive any more"))
