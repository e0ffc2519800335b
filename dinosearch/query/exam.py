"""How well a backbone that is still learning tells labelled images apart. Knows no index and no training.

The pictures are decoded once, when the first backbone says how, and kept; accuracy is that of `probe`, from the vote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images import BadImage, Fit, find_images, in_threads, n_cores, pixel_budget
from dinosearch.images.source import ScanOptions
from dinosearch.images.workers import DecodePool
from dinosearch.index.contents import IndexedFile
from dinosearch.query.labels import load_labels
from dinosearch.query.probe import knn_accuracy, pose_task

if TYPE_CHECKING:
    from torch import nn

    from dinosearch.vit.folder import ModelFacts

MOST_IMAGES = 4000
"""Labelled images asked about; more would cost more of a run than their accuracy's last digit is worth."""
CHUNK = 256
IMAGES_PER_PROCESS = 64
"""Fewer images are decoded sooner than another process has started."""


class Exam:
    """Asks one backbone after another about the same held-out images.

    split: "train" or "test" for each path; without it a fifth of each class is held out. Raises DinosearchError when
    the labels leave nothing to tell apart, before any picture is read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[str],
        *,
        split: Sequence[str] | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        rows = np.sort(np.random.default_rng(0).permutation(len(paths))[:MOST_IMAGES])
        self._paths = [paths[row] for row in rows]
        self._labels = [labels[row] for row in rows]
        self._split = [split[row] for row in rows] if split is not None else None
        self._note = note
        self._pixels: np.ndarray | None = None
        pose_task(self._labels, split=self._split)

    def __call__(self, backbone: nn.Module, facts: ModelFacts) -> tuple[float, int]:
        """Share of held-out images whose class a vote of the nearest finds, and their number. It is in eval mode.

        Raises DinosearchError when the files that can be read leave nothing to tell apart.
        """
        if self._pixels is None:
            self._pixels = self._read(facts)
        vectors = _embed(backbone, self._pixels, facts)
        accuracy, n_asked = knn_accuracy(vectors, self._labels, split=self._split, note=self._note)
        self._note = lambda _: None  # what there was to say of the labels is said
        return accuracy, n_asked

    def _read(self, facts: ModelFacts) -> np.ndarray:
        """uint8 [n, size, size, channels]; files without usable pixels are left out, and their labels with them.

        Processes of their own decode: what hangs or crashes them is a bad image and no end of the run.
        """
        fit = Fit(facts.image_size, facts.fit, facts.crop_pct, facts.interpolation, facts.channels)
        workers = min(n_cores(), 1 + len(self._paths) // IMAGES_PER_PROCESS)

        def square(path: Path) -> np.ndarray | None:
            try:
                with pool.read(str(path)) as opened:
                    return opened.decode().pixels
            except BadImage:
                return None

        with DecodePool(fit, workers=workers, max_pixels=pixel_budget(n_cores())) as pool:
            squares = list(in_threads(square, self._paths, workers=workers, ahead=256))
        kept = [i for i, pixels in enumerate(squares) if pixels is not None]
        if not kept:
            raise DinosearchError("none of the labelled images can be read. Check --labels")
        self._labels = [self._labels[i] for i in kept]
        self._split = [self._split[i] for i in kept] if self._split is not None else None
        return np.stack([pixels for pixels in squares if pixels is not None])


def open_exam(
    labels: str,
    folders: Sequence[Path],
    *,
    options: ScanOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Exam:
    """An exam on the images in `folders`, labelled by a CSV or by "folders", as `load_labels` takes them.

    options: which of these images count; those of the training, which asks about no others.
    Raises DinosearchError when there are no labels, or none of these images has one.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"--labels goes with folders of images, and {folder} is none. Leave it out, and probe later"
            )
    files = [
        IndexedFile(folder.resolve() / image.path, image.path, folder.resolve())
        for folder in folders
        for image in find_images(folder, options).images
    ]
    known = load_labels(labels, files)
    if known.unmatched:
        note(f"{len(known.unmatched)} lines of {labels} name no image that is trained on")
    if known.n_outside:
        note(f"{known.n_outside} images lie in no folder that could be their label")
    split = known.splits
    if split is not None and len(set(split)) < 2:  # the others are kept from training, as they should be
        note(f"all images trained on are {split[0]!r} in the split of {labels}: a fifth of each class is asked about")
        split = None
    return Exam([Path(files[row].path) for row in known.rows], known.labels, split=split, note=note)


def _embed(backbone: nn.Module, pixels: np.ndarray, facts: ModelFacts) -> np.ndarray:
    """Unit float32 [n, dim]"""
    import torch

    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (facts.mean, facts.std))
    vectors = []
    with torch.no_grad():
        for chunk in torch.from_numpy(pixels).split(CHUNK):
            images = chunk.to(device).permute(0, 3, 1, 2).float() / 255
            vectors.append(torch.nn.functional.normalize(backbone((images - mean) / std).float(), dim=1).cpu())
    return torch.cat(vectors).numpy()
