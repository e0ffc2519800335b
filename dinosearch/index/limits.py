"""How much memory indexing may take, and what follows: processes, sizes of images, what may wait. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass

from dinosearch.errors import UsageError
from dinosearch.images.decode import BYTES_PER_PIXEL, MOST_PIXELS, decoders, pixel_budget
from dinosearch.images.planes import tiff_decoders
from dinosearch.index.rows import DecoderKeys
from dinosearch.vit.folder import ModelFolder

_BASE_BYTES = 450 << 20
"""Python, OpenVINO, the catalog and FAISS, without the model's weights: measured 0.3 to 0.4 GB. What converts or
quantises a model, once, is a process beside them and not in the bound: 1.3 GB for a ViT-S/16, 1.6 for a ViT-B/16."""
_PROCESS_BYTES = 64 << 20
"""A decoding process at rest."""
_AHEAD_BYTES = 128 << 20
"""Squares and streamed files that wait for the stage after theirs."""
_LEAST_PIXELS = 4_000_000
"""A budget that most photographs of telephones do not fit would make no useful index."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one run, whatever the folder."""

    workers: int
    """Decoding processes."""
    max_pixels: int
    """Of one image; more is "too-large"."""
    ahead_bytes: int = _AHEAD_BYTES
    channels: int = 3
    """Of the model: a file that is bad for one number may be good for another."""

    def decoder_keys(self) -> DecoderKeys:
        """What bad files are remembered with."""
        known = decoders()
        if self.channels != 3:
            known = f"{' '.join([known, *tiff_decoders()])}, {self.channels} channels"
        return DecoderKeys(known, f"{known}, at most {self.max_pixels} pixels")


def left_for_vectors(model: ModelFolder, max_memory: int | None) -> int | None:
    """Of so many bytes, those that are left beside interpreter, libraries and model; None is no bound."""
    return None if max_memory is None else max(0, max_memory - _base_bytes(model))


def _base_bytes(model: ModelFolder) -> int:
    weights = model.weights_path.stat().st_size if model.weights_path.is_file() else 0
    return _BASE_BYTES + 3 * weights // 2


def limits_for(model: ModelFolder, *, workers: int, max_memory: int | None = None) -> Limits:
    """The limits of `workers` processes, or of fewer where `max_memory` bytes do not suffice for so many.

    Without `max_memory` half of the machine's is what images may take. Raises UsageError if it is too little at all.
    """
    if max_memory is None:
        return Limits(workers, pixel_budget(workers), channels=model.channels)
    base = _base_bytes(model)
    free = max_memory - base
    per_worker = _PROCESS_BYTES + _LEAST_PIXELS * BYTES_PER_PIXEL
    least = base + per_worker * 4 // 3
    if max_memory < least:
        raise UsageError(
            f"--max-memory {max_memory / 2**30:.2f}G is too little for {model.name}. "
            f"Give {least / 2**30:.2f}G or more, or use a smaller model"
        )
    ahead = min(_AHEAD_BYTES, free // 4)
    workers = max(1, min(workers, (free - ahead) // per_worker))
    pixels = ((free - ahead) // workers - _PROCESS_BYTES) // BYTES_PER_PIXEL
    return Limits(workers, min(pixels, MOST_PIXELS, pixel_budget(workers)), ahead, model.channels)
