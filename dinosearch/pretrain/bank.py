"""All training images, decoded once into uint8 squares, in memory or in a memory-mapped file. Knows no augmentation."""

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.images import (
    BadImage,
    Fit,
    Picture,
    decode,
    in_threads,
    memory_bytes,
    n_cores,
    pixel_budget,
    read_bytes,
)

SHARE_OF_MEMORY = 0.4
"""Above this share of the machine's memory the bank becomes a memory-mapped file."""


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


class ImageBank:
    """Squares of all readable images, filled by `read`; too large for memory, it is a file that ends with the run.

    grey: start with one channel; the first image with colour makes it three.
    """

    def __init__(self, paths: Sequence[Path], *, side: int, grey: bool, folder: Path) -> None:
        self.failed: list[tuple[Path, str]] = []
        """Files without usable pixels, with the reason."""
        self._paths = paths
        self._side = side
        self._folder = folder
        self._n = 0
        self._aspect = np.empty(len(paths), dtype=np.float32)
        self._pixels = self._allocate(1 if grey else 3)

    def __len__(self) -> int:
        return self._n

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [n, channels, side, side]; 1 channel when no image has colour, else 3."""
        return self._pixels[: self._n]

    @property
    def aspect(self) -> np.ndarray:
        """float32 [n], width / height of the images before they were squeezed into squares."""
        return self._aspect[: self._n]

    def read(self) -> Iterator[int]:
        """Decode every image in threads, yielding the number of files done now and then.

        Raises DinosearchError when fewer than two images can be read.
        """
        n_files = len(self._paths)
        for i, (path, picture) in enumerate(zip(self._paths, _pictures(self._paths, side=self._side), strict=True)):
            if isinstance(picture, BadImage):
                self.failed.append((path, f"{picture.status}: {picture.reason}"))
            else:
                self._add(picture)
            if i % 64 == 63 or i == n_files - 1:
                yield i + 1
        if self._n < 2:
            raise DinosearchError(f"{self._n} of {n_files} images can be read; training needs two. Check the files")

    def _add(self, picture: Picture) -> None:
        channels = self._pixels.shape[1]
        if channels == 1 and not _is_grey(picture.pixels):
            grey = self._pixels
            self._pixels = self._allocate(3)
            self._pixels[: self._n] = grey[: self._n]
            channels = 3
        self._pixels[self._n] = picture.pixels.transpose(2, 0, 1)[:channels]
        self._aspect[self._n] = picture.width / picture.height
        self._n += 1

    def _allocate(self, channels: int) -> np.ndarray:
        shape = (len(self._paths), channels, self._side, self._side)
        n_bytes = math.prod(shape)
        if n_bytes <= SHARE_OF_MEMORY * memory_bytes():
            return np.empty(shape, dtype=np.uint8)
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if n_bytes > 0.9 * free:
            raise DinosearchError(
                f"{shape[0]} decoded images need {n_bytes / 2**30:.0f} GiB, {self._folder} has {free / 2**30:.0f} GiB "
                "free. Free some space, move the models (DINOSEARCH_MODELS), or choose a smaller --image-size"
            )
        path = self._folder / f"bank-{channels}.u8"
        bank = np.memmap(path, dtype=np.uint8, mode="w+", shape=shape)
        path.unlink()  # the space is given back when the process ends, however it ends
        return bank


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


def survey_images(paths: Sequence[Path], *, sample: int = 200) -> Survey:
    """Median size and colour of up to `sample` images, evenly spread. Raises DinosearchError if none can be read."""
    step = max(1, len(paths) // sample)
    pictures = [p for p in _pictures(paths[::step], side=16) if isinstance(p, Picture)]
    if not pictures:
        raise DinosearchError(f"none of {len(paths[::step])} files tried is a readable image, such as {paths[0]}")
    return Survey(
        n_images=len(paths),
        width=int(np.median([p.width for p in pictures])),
        height=int(np.median([p.height for p in pictures])),
        grey=all(_is_grey(p.pixels) for p in pictures),
    )


def _pictures(paths: Iterable[Path], *, side: int) -> Iterator[Picture | BadImage]:
    budget = pixel_budget(n_cores())

    def picture(path: Path) -> Picture | BadImage:
        try:
            return decode(read_bytes(path), Fit(side, mode="squash"), max_pixels=budget)
        except BadImage as bad:
            return bad

    return in_threads(picture, paths, ahead=256)


def _is_grey(pixels: np.ndarray) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
