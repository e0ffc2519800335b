"""What the tests of index/ and query/ share: a tiny model without weights, an encoder of the real one's interface."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from dinosearch.images import read, workers
from dinosearch.images.decode import Fit
from dinosearch.index.sync import SyncProgress, SyncSummary, sync_index
from dinosearch.vit.folder import ModelFolder

T = TypeVar("T")
SIDE = 16
DIM = 24


def a_model(seed: int = 0) -> ModelFolder:
    return ModelFolder(
        arch="none", arch_kwargs={}, image_size=SIDE, path=Path(f"models/m{seed}"), dim=DIM, fingerprint=f"{seed:016x}"
    )


class ProjectingEncoder:
    """A seeded random projection of the pixels, in place of a ViT: as deterministic, and much faster."""

    engine = "random projection"

    def __init__(self, model: ModelFolder, *, seconds_per_batch: float = 0.0, stop_after: int | None = None) -> None:
        self.model = model
        self.fingerprint = model.fingerprint
        self.dim = model.dim
        self.fit = Fit(model.image_size)
        self.n_seen = 0
        self._seconds = seconds_per_batch
        self._stop_after = stop_after
        random = np.random.default_rng(int(model.fingerprint, 16))
        self._projection = random.standard_normal((3 * model.image_size**2, model.dim), dtype=np.float32)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        flat = pixels.reshape(len(pixels), len(self._projection)).astype(np.float32) / 255 - 0.5
        vectors = flat @ self._projection
        self.n_seen += len(pixels)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def stream(self, pictures: Iterable[tuple[T, np.ndarray]]) -> Iterator[tuple[list[T], np.ndarray]]:
        remaining = iter(pictures)
        while batch := list(islice(remaining, 8)):
            if self._stop_after is not None and self.n_seen >= self._stop_after:
                raise KeyboardInterrupt
            time.sleep(self._seconds)
            yield [key for key, _ in batch], self.encode(np.stack([pixels for _, pixels in batch]))


@dataclass
class Workshop:
    """A folder of images, an index of it and the last encoder used."""

    root: Path
    index: Path
    model: ModelFolder
    encoder: ProjectingEncoder
    notes: list[str]

    def sync(self, **options: object) -> SyncSummary:
        return last(self.progress(**options))

    def progress(
        self, *, roots: list[Path] | None = None, stop_after: int | None = None, **options: object
    ) -> Iterator[SyncProgress]:
        self.encoder = ProjectingEncoder(self.model, stop_after=stop_after)
        return sync_index(
            roots or [self.root],
            index_path=self.index,
            model=self.model,
            encoder_for=lambda _: self.encoder,
            workers=2,
            note=self.notes.append,
            **options,
        )


def last(progress: Iterator[SyncProgress]) -> SyncSummary:
    summary = None
    for step in progress:
        summary = step.summary
    assert summary is not None
    return summary


def write_image(path: Path, seed: int, *, size: tuple[int, int] = (20, 16), age: float = 1000) -> Path:
    """A PNG of colour noise over a gradient; its time lies `age` seconds back."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    set_age(path, age)
    return path


def set_age(path: Path, age: float) -> None:
    when = time.time_ns() - int(age * 1e9)
    os.utime(path, ns=(when, when))


def write_images(folder: Path, n: int, *, seed: int = 0) -> list[Path]:
    return [write_image(folder / f"{number:04d}.png", seed + number) for number in range(n)]


def never(*_: object) -> Callable[[], None]:
    raise AssertionError("this must not be called")


def read_in_this_process(monkeypatch: pytest.MonkeyPatch, read_bytes: Callable[..., bytes]) -> None:
    """In place of the decoding processes, which read local files themselves and cannot be disturbed."""

    @contextmanager
    def read_here(pool: workers.DecodePool, path: str) -> Iterator[workers.OpenFile]:
        stable = read.read_stable(path)
        with pool.take(stable.data) as file:
            file.mtime_ns = stable.mtime_ns
            yield file

    monkeypatch.setattr(workers.DecodePool, "read", read_here)
    monkeypatch.setattr(read, "read_bytes", read_bytes)
