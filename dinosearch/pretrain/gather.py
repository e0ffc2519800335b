"""The images to train on, from all sources that were named, and their squares. Knows no model and keeps no pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dinosearch.errors import DinosearchError
from dinosearch.images import BadImage, Fit, FoundImage, Picture, in_threads, n_cores, pixel_budget
from dinosearch.images.reading import Reading, bytes_held, readings
from dinosearch.images.source import ScanOptions, Source
from dinosearch.images.sources import open_sources
from dinosearch.images.workers import DecodePool
from dinosearch.vit.folder import Note

IMAGES_PER_PROCESS = 64
"""Fewer images are decoded sooner than another process has started."""
AHEAD_BYTES = 128 << 20
"""Files out of archives that only stream may wait in so much memory."""


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """An image by name, and where it is."""

    source: Source
    found: FoundImage

    def shown_path(self) -> str:
        return self.source.shown_path(self.found)


def gather_images(specs: Iterable[str], options: ScanOptions, *, note: Note) -> list[TrainingImage]:
    """All images of the sources, in the sources' order and each of those in byte order; none twice.

    Raises DinosearchError for a source that is not there, and when there is no image at all.
    """
    sources = open_sources(specs)
    found: dict[str, TrainingImage] = {}
    for source in sources:
        scan = source.scan(options, note=note)
        for image in scan.images:
            found.setdefault(source.shown_path(image), TrainingImage(source, image))
        for folder, reason in scan.unreadable_folders:
            note(f"{source.location}/{folder} is left out: {reason}")
    if not found:
        raise DinosearchError(
            f"no images in {', '.join(source.location for source in sources)}. Name a folder that holds some"
        )
    return list(found.values())


def images_digest(images: Iterable[TrainingImage]) -> str:
    """Over paths below their sources, members and sizes: cheap, and enough to notice that a run would see others."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        found = image.found
        digest.update(b"\0".join([os.fsencode(found.path), os.fsencode(found.member), b"%d\n" % found.size]))
    return digest.hexdigest()


def decode_pool(*, n_beside: int = 1) -> DecodePool:
    """Processes that decode, as for an index: what hangs or crashes them is a bad image and no end of the run.

    They start when the first image is decoded. n_beside: pools like this one that share the machine's cores.
    """
    workers = max(1, n_cores() // n_beside)
    return DecodePool(Fit(16, mode="squash"), workers=workers, max_pixels=pixel_budget(workers * n_beside))


def squares_of(images: Sequence[TrainingImage], pool: DecodePool) -> Iterator[tuple[TrainingImage, Picture | BadImage]]:
    """Every image with its square, those of a compressed tar in its order, all others in theirs."""
    workers = max(1, min(n_cores(), len(images) // IMAGES_PER_PROCESS))
    return in_threads(
        partial(_square_of, pool=pool),
        readings(images),
        workers=workers,
        weight=bytes_held,
        most_weight=AHEAD_BYTES,
    )


def square_again(image: TrainingImage, pool: DecodePool) -> Picture:
    """The square of an image that could be read before. Raises DinosearchError if that is over."""
    _, picture = _square_of(Reading(image), pool=pool)
    if isinstance(picture, BadImage):
        raise DinosearchError(
            f"{image.shown_path()} could be read when the run began and cannot any more ({picture.reason}). "
            "Restore it, then go on with --resume"
        )
    return picture


def _square_of(reading: Reading[TrainingImage], *, pool: DecodePool) -> tuple[TrainingImage, Picture | BadImage]:
    try:
        with reading.opened(pool) as opened:
            return reading.wanted, opened.decode()
    except BadImage as bad:
        return reading.wanted, bad
