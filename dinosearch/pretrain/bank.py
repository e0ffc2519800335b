"""All training images as uint8 squares, decoded once into memory or a memory-mapped file. Knows no augmentation.

Where neither holds them all, a part drawn at random stays, and the others are decoded again whenever their turn comes,
one batch ahead of the run. Every epoch shows each image once, so that what was used longest ago is what comes next:
to drop that (LRU) would never find anything, while a fixed part of p saves p of all decoding, which is the most that
can be saved. What is kept decides only where pixels come from, never which they are.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.images import BadImage, Fit, Picture, memory_bytes, n_cores
from dinosearch.images.workers import DecodePool
from dinosearch.pretrain.distributed import ALONE, Team
from dinosearch.pretrain.gather import TrainingImage, square_again, squares_of
from dinosearch.vit.folder import write_whole

SHARE_OF_MEMORY = 0.4
"""Above this share of the machine's memory the bank becomes a memory-mapped file."""
SHARE_OF_DISK = 0.8
"""Of what is free: checkpoints and others need some."""
SURVEYED = 200
"""Images that speak for all."""


@dataclass(frozen=True)
class Survey:
    """What a sample of the images says about all of them."""

    n_images: int
    """Files found, readable or not."""
    width: int
    """Median of the sample, in pixels."""
    height: int
    """Median of the sample, in pixels."""
    grey: bool
    """No image of the sample has colour."""
    mean: tuple[float, ...] = ()
    """Of each channel, in 0..1."""
    std: tuple[float, ...] = ()
    """Of each channel, in 0..1."""


class ImageBank:
    """Squares of all readable images, filled by `read`.

    channels: what is decoded. Of 3, `grey` says to keep one until the first image with colour makes it three.
    limit: bytes that the squares may take, in memory or on disk; None is what there is of either.
    team: the processes that each have such a bank; those on one machine share what there is, and the limit.
    """

    def __init__(
        self,
        images: Sequence[TrainingImage],
        pool: DecodePool,
        *,
        side: int,
        grey: bool,
        folder: Path,
        channels: int = 3,
        limit: int | None = None,
        team: Team = ALONE,
    ) -> None:
        self.failed: list[tuple[str, BadImage]] = []
        """Paths of images without usable pixels, and why."""
        self._images = images
        self._pool = pool
        self._fit = Fit(side, mode="squash", channels=channels)
        self._folder = folder
        self._limit = None if limit is None else limit // team.n_beside
        self._team = team
        self._n = 0
        self._again: list[TrainingImage] = []
        """Of each image that can be read, how to do it again."""
        self._aspect = np.empty(len(images), dtype=np.float32)
        self._slot = np.full(len(images), -1, dtype=np.int64)
        """Where an image's square is kept; -1 where it is not."""
        self._rank = _ranks(images)
        self._n_kept = 0
        self._room = 0
        self._pixels = self._allocate(1 if grey and channels == 3 else channels)
        self._threads = ThreadPoolExecutor(max(1, n_cores() // team.n_beside), thread_name_prefix="bank")
        self._coming: dict[int, Future[np.ndarray]] = {}

    def __len__(self) -> int:
        return self._n

    def __str__(self) -> str:
        n, side = len(self._images), self._fit.image_size
        kept = f"{self._room * math.prod(self._pixels.shape[1:]) / 1e6:,.1f} MB"
        place = f"in a file in {self._folder}" if isinstance(self._pixels, np.memmap) else "in memory"
        rest = f"; the other {n - self._room} are decoded again each time" if self._room < n else ""
        return f"{self._room} images at {side} px, {kept} {place}{rest}"

    @property
    def pixels(self) -> np.ndarray:
        """The squares that are kept, uint8 [n kept, channels, side, side]: of all images, in order, if there was room.

        One channel when no image has colour, else as many as are decoded.
        """
        return self._pixels[: self._n_kept]

    @property
    def unreadable(self) -> list[int]:
        """Numbers, among the images given, of those without usable pixels: with these all batches would be others."""
        paths = {path for path, _ in self.failed}
        return [i for i, image in enumerate(self._images) if image.shown_path() in paths] if paths else []

    @property
    def aspect(self) -> np.ndarray:
        """float32 [n], width / height of the images before they were squeezed into squares."""
        return self._aspect[: self._n]

    def read(self) -> Iterator[int]:
        """Decode every image, yielding the number of files done now and then.

        Raises DinosearchError when fewer than two images can be read.
        """
        n_files = len(self._images)
        self._pool.make(self._fit)
        for i, (image, picture) in enumerate(squares_of(self._images, self._pool)):
            if isinstance(picture, BadImage):
                self.failed.append((image.shown_path(), picture))
            else:
                self._add(image, picture, rank=int(self._rank[i]))
            if i % 64 == 63 or i == n_files - 1:
                yield i + 1
        if self._n < 2:
            raise DinosearchError(f"{self._n} of {n_files} images can be read; training needs two. Check the files")
        if self._n_kept == self._n:
            self._pool.close()  # nothing is decoded any more

    def take(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Squares uint8 [batch, channels, side, side] and width / height float32 [batch] of images by number."""
        slots = self._slot[chosen]
        kept = slots >= 0
        if kept.all():
            return self._pixels[slots], self._aspect[chosen]
        pixels = np.empty((len(chosen), *self._pixels.shape[1:]), dtype=np.uint8)
        pixels[kept] = self._pixels[slots[kept]]
        self.expect(chosen)
        for at in np.flatnonzero(~kept):
            pixels[at] = self._coming.pop(int(chosen[at])).result()
        return pixels, self._aspect[chosen]

    def expect(self, chosen: np.ndarray) -> None:
        """Begin to decode what is not kept of these images, which are taken next."""
        wanted = [int(number) for number in chosen if self._slot[number] < 0]
        for number in self._coming.keys() - wanted:  # the run went back to an earlier step
            self._coming.pop(number).cancel()
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._threads.submit(self._decode_again, number)

    def write_failed(self, path: Path) -> None:
        """One JSON object a line for each image that is left out: path, status and reason. No file without any."""
        path.unlink(missing_ok=True)
        if self.failed:
            lines = [
                json.dumps({"path": shown, "status": bad.status, "reason": bad.reason}) for shown, bad in self.failed
            ]
            write_whole(path, ("\n".join(lines) + "\n").encode())

    def _add(self, image: TrainingImage, picture: Picture, *, rank: int) -> None:
        channels = self._pixels.shape[1]
        decoded = picture.pixels.shape[2]
        if channels < decoded and not _is_grey(picture.pixels):
            self._widen(decoded)
        self._rank[self._n] = rank
        self._aspect[self._n] = picture.width / picture.height
        self._again.append(image)
        if rank < self._room:
            self._keep(self._n, self._channels_first(picture.pixels))
        self._n += 1

    def _keep(self, number: int, pixels: np.ndarray) -> None:
        self._pixels[self._n_kept] = pixels
        self._slot[number] = self._n_kept
        self._n_kept += 1

    def _widen(self, channels: int) -> None:
        """Give the squares so far more channels, all alike; where they don't fit any more, fewer stay."""
        grey, slots = self._pixels, self._slot[: self._n].copy()
        self._pixels = self._allocate(channels)
        self._slot[:] = -1
        self._n_kept = 0
        for number in np.flatnonzero((slots >= 0) & (self._rank[: self._n] < self._room)):
            self._keep(int(number), grey[slots[number]])

    def _channels_first(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.transpose(2, 0, 1)[: self._pixels.shape[1]]

    def _decode_again(self, number: int) -> np.ndarray:
        return self._channels_first(square_again(self._again[number], self._pool).pixels)

    def _allocate(self, channels: int) -> np.ndarray:
        """Room for as many squares as may be kept. Raises DinosearchError where it is too little."""
        square = channels * self._fit.image_size**2
        n_beside = self._team.n_beside
        in_memory = int(SHARE_OF_MEMORY * memory_bytes()) // n_beside
        n = len(self._images)
        wanted = n * square if self._limit is None else min(n * square, self._limit)
        if wanted > in_memory:
            self._folder.mkdir(parents=True, exist_ok=True)
            wanted = min(wanted, max(in_memory, int(SHARE_OF_DISK * shutil.disk_usage(self._folder).free) // n_beside))
        self._room = wanted // square
        n_streamed = sum(image.source.sequential for image in self._images)
        if n_streamed > self._room:
            raise DinosearchError(
                f"{n_streamed} images out of compressed tars, which are read once, need "
                f"{n_streamed * square / 2**30:.1f} GiB decoded, and there is room for {wanted / 2**30:.1f} GiB. Free "
                "some space, give a larger --cache-size or a smaller --image-size, or decompress the tars"
            )
        shape = (self._room, channels, self._fit.image_size, self._fit.image_size)
        if wanted <= in_memory or not self._room:
            return np.empty(shape, dtype=np.uint8)
        path = self._folder / f"bank-{channels}-{self._team.rank}.u8"
        bank = np.memmap(path, dtype=np.uint8, mode="w+", shape=shape)
        path.unlink()  # the space is given back when the process ends, however it ends
        return bank


def _ranks(images: Sequence[TrainingImage]) -> np.ndarray:
    """int64 [n], in the order of reading: those whose rank is below the number that there is room for are kept.

    Drawn once, not from the run's seed. What can be read only once comes before all others.
    """
    streamed = np.array([image.source.sequential for image in images], dtype=bool)
    order = np.random.default_rng(0).permutation(len(images))
    order = np.concatenate([order[streamed[order]], order[~streamed[order]]])
    ranks = np.empty(len(images), dtype=np.int64)
    ranks[order] = np.arange(len(images))
    return ranks


def batch_indices(step: int, *, n: int, batch_size: int, seed: int) -> np.ndarray:
    """Which images step number `step` sees: int64 [batch_size]. Every epoch shuffles anew, by (seed, epoch)."""
    epoch, at = divmod(step, n // batch_size)
    order = _epoch_order(epoch, n, seed)
    return np.sort(order[at * batch_size : (at + 1) * batch_size])  # sorted: kinder to a memory-mapped bank


_ORDER: dict[tuple[int, int, int], np.ndarray] = {}


def _epoch_order(epoch: int, n: int, seed: int) -> np.ndarray:
    key = (epoch, n, seed)
    if key not in _ORDER:
        _ORDER.clear()
        _ORDER[key] = np.random.default_rng((seed, epoch)).permutation(n)
    return _ORDER[key]


def survey_images(images: Sequence[TrainingImage], pool: DecodePool, *, channels: int = 3) -> Survey:
    """Median size, colour and statistics of up to SURVEYED images, evenly spread; of compressed tars the first ones.

    Raises DinosearchError if none can be read.
    """
    pool.make(Fit(64, mode="squash", channels=channels))
    alone = [image for image in images if not image.source.sequential]
    streamed = [image for image in images if image.source.sequential]
    sample = alone[:: max(1, len(alone) // SURVEYED)] + streamed[: max(0, SURVEYED - len(alone))]
    squares = list(squares_of(sample, pool))
    pictures = [picture for _, picture in squares if isinstance(picture, Picture)]
    if not pictures:
        first, bad = squares[0]
        raise DinosearchError(
            f"none of {len(squares)} files tried is a readable image, such as {first.shown_path()} ({bad})"
        )
    values = np.stack([picture.pixels for picture in pictures]).reshape(-1, channels) / 255
    return Survey(
        n_images=len(images),
        width=int(np.median([picture.width for picture in pictures])),
        height=int(np.median([picture.height for picture in pictures])),
        grey=channels == 3 and all(_is_grey(picture.pixels) for picture in pictures),
        mean=tuple(values.mean(axis=0).round(4).tolist()),
        std=tuple(values.std(axis=0).clip(min=1 / 255).round(4).tolist()),
    )


def _is_grey(pixels: np.ndarray) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
