"""The int8 form of a model for the processor: made once by nncf, measured against fp32, refused where it strays.

Half of a sample of images calibrates the form, the other half measures the mean cosine of its vectors to those of
fp32. The figure is kept with the form, so a form that was refused stays refused, and one that was made is used where
nncf is not installed. Delete it from the model's `cache/` to have it made from other images.

nncf works in a process of its own (`quantizeprocess`): it prints, changes Python's logging, and needs torch and 1.3 GB
of memory for a ViT-S/16.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinosearch.encoder.cache import discard, keep_form, kept_form
from dinosearch.encoder.conversion import converted_path, run_apart
from dinosearch.encoder.openvino_engine import OpenVINOEngine
from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import ModelFolder, Note

Sample = Callable[[int], np.ndarray]
"""Gives up to so many squares, uint8 [n, S, S, channels], spread over the images that are to be embedded."""

LEAST_COSINE = 0.995
"""Mean cosine to fp32 below which int8 is refused: nearest neighbours change from there on."""

N_SAMPLE = 256
"""Squares of a sample. Of them the form of ViT-S/16 at 224 px takes 47 s on two cores, of a small ViT 5 to 10 s."""
LEAST_SAMPLE = 64
"""With fewer neither the ranges nor the cosine mean much."""

_SAMPLE_BYTES = 64 << 20
_KIND = "openvino-int8"
_MEASURED = "measured.json"


def int8_engine(model: ModelFolder, *, few: bool, sample: Sample | None, note: Note) -> OpenVINOEngine | None:
    """The engine of the int8 form, which is made from `sample` if there is none.

    None where it is refused or cannot be made, which is noted if there is a sample, that is if it was to be made.
    Raises DinosearchError if it is to be made and nncf is not installed.
    """
    try:
        form = partial(_form, model, sample, note)
        return OpenVINOEngine(model, few=few, precision="int8", form=form, note=note)
    except _NoForm as reason:
        if sample:
            note(f"{reason}; going on in the usual precision")
        return None


class _NoForm(Exception):
    """There is no int8 form to be used, for this reason."""


class _Measured(NamedTuple):
    cosine: float
    """Mean, to fp32."""
    images: int
    """It was measured on."""


def _form(model: ModelFolder, sample: Sample | None, note: Note) -> Path:
    path = kept_form(model, _KIND)
    measured = _measured(path) if path else None
    if path is None or measured is None:
        path = _make(model, sample, note)
        measured = _measured(path)
        assert measured
        if measured.cosine >= LEAST_COSINE:
            note(f"int8 vectors have a mean cosine of {measured.cosine:.4f} to fp32, on {measured.images} images")
    if measured.cosine < LEAST_COSINE:
        raise _NoForm(
            f"int8 is refused for {model.name}: its vectors have a mean cosine of {measured.cosine:.4f} to fp32, "
            f"on {measured.images} images, and {LEAST_COSINE} is asked"
        )
    return path


def _measured(path: Path) -> _Measured | None:
    try:
        facts = json.loads((path / _MEASURED).read_text(encoding="utf-8"))
        return _Measured(float(facts["cosine"]), int(facts["images"]))
    except (OSError, ValueError, KeyError, TypeError):
        discard(path)
        return None


def _make(model: ModelFolder, sample: Sample | None, note: Note) -> Path:
    if sample is None:
        raise _NoForm("there is no int8 form yet")
    if importlib.util.find_spec("nncf") is None:
        raise DinosearchError(
            f"{model.name} has no int8 form yet, and nncf, which makes it, is not installed. "
            "Use --precision auto, or pip install 'dinosearch[int8]'"
        )
    squares = sample(max(LEAST_SAMPLE, min(N_SAMPLE, _SAMPLE_BYTES // (model.channels * model.image_size**2))))
    if len(squares) < LEAST_SAMPLE:
        raise _NoForm(f"{len(squares)} new images are too few to make an int8 form from, which takes {LEAST_SAMPLE}")
    note(f"making the int8 form of {model.name}, once (takes about half a minute, larger models minutes)")
    reference = OpenVINOEngine(model, few=False, precision="fp32", note=note)

    def write(path: Path) -> None:
        _quantize(converted_path(model, note=note), squares[::2], path)
        engine = OpenVINOEngine(model, few=False, precision="int8", form=lambda: path, note=note)
        cosine = _cosines(_vectors(engine, squares[1::2]), _vectors(reference, squares[1::2])).mean()
        measured = _Measured(round(float(cosine), 6), len(squares[1::2]))
        (path / _MEASURED).write_text(json.dumps(measured._asdict()), encoding="utf-8")

    return keep_form(model, _KIND, write, note=note)


def _quantize(form: Path, squares: np.ndarray, into: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        squares_path = Path(folder) / "squares.npy"
        np.save(squares_path, squares)
        code, said = run_apart("quantizeprocess", str(form), str(squares_path), str(into))
    if code:
        raise _NoForm(f"nncf could not make an int8 form ({said[:200]})")


def _vectors(engine: OpenVINOEngine, squares: np.ndarray) -> np.ndarray:
    starts = range(0, len(squares), engine.batch)
    return np.concatenate([engine.start(squares[i : i + engine.batch])() for i in starts])


def _cosines(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(some, axis=1) * np.linalg.norm(others, axis=1)
    return (some * others).sum(axis=1) / np.maximum(lengths, 1e-12)
