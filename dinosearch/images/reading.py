"""The bytes of wanted images, from sources that are read in any order and from those that only stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from dinosearch.images.decode import BadImage
from dinosearch.images.source import FoundImage, Source, StableBytes
from dinosearch.images.workers import DecodePool, OpenFile


class Wanted(Protocol):
    """An image that somebody wants, and where it is."""

    @property
    def source(self) -> Source: ...
    @property
    def found(self) -> FoundImage: ...


W = TypeVar("W", bound=Wanted)


@dataclass(frozen=True, slots=True)
class Reading(Generic[W]):
    """A wanted image that is ready to be read, in any thread."""

    wanted: W
    streamed: StableBytes | BadImage | None = None
    """What came out of a source that only streams."""

    def stable_bytes(self) -> StableBytes:
        """Raises BadImage."""
        if self.streamed is None:
            return self.wanted.source.read(self.wanted.found)
        if isinstance(self.streamed, BadImage):
            raise self.streamed
        return self.streamed

    @contextmanager
    def opened(self, pool: DecodePool) -> Iterator[OpenFile]:
        """The image in a decoding process, which reads local files itself. Raises BadImage."""
        path = self.wanted.source.file_path(self.wanted.found) if self.streamed is None else None
        if path is not None:
            with pool.read(path) as opened:
                yield opened
            return
        stable = self.stable_bytes()
        with pool.take(stable.data) as opened:
            opened.mtime_ns = stable.mtime_ns
            yield opened


def readings(wanted: Iterable[W]) -> Iterator[Reading[W]]:
    """Every wanted image once; those of a source that streams in its order, read here, in the caller's thread."""
    for (_, sequential), images in itertools.groupby(
        wanted, key=lambda each: (id(each.source), each.source.sequential)
    ):
        if sequential:
            yield from _streamed(list(images))
        else:
            yield from map(Reading, images)


def bytes_held(reading: Reading[W]) -> int:
    """What waits in memory with it: only sources that stream have been read already."""
    return len(reading.streamed.data) if isinstance(reading.streamed, StableBytes) else 0


def _streamed(images: list[W]) -> Iterator[Reading[W]]:
    remaining = {(each.found.path, each.found.member): each for each in images}
    for found, data in images[0].source.stream([each.found for each in images]):
        if each := remaining.pop((found.path, found.member), None):
            yield Reading(each, data)
    for each in remaining.values():
        yield Reading(each, BadImage("unreadable", "it is not in its archive any more"))
