"""A model as files for other programs: ONNX, OpenVINO, a folder of Hugging Face transformers.

ONNX and OpenVINO take uint8 [n, S, S, channels], RGB if these are three, for any n, and give the unit vectors float32
[n, dim] that an index holds: normalisation is inside, so what has to be done outside is to make the square. What was
written is read back and run beside the source before it gets its name.
"""

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinosearch.encoder.conversion import import_openvino
from dinosearch.errors import DinosearchError, UsageError
from dinosearch.vit.folder import ModelFolder, Note, publish

if TYPE_CHECKING:
    import torch

FORMS = ("onnx", "openvino", "hf")
LEAST_COSINE = 0.999
"""Between a vector of the source and of the export; below it the export is refused."""
N_COMPARED = 3
"""Images of noise: another number than the graphs were traced with."""
OPSET = 17
"""ONNX Runtime 1.12 (2022) and later read it."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to its source."""

    files: list[Path]
    cosine: float | None
    """Least cosine similarity of vectors; None where they could not be compared."""
    max_difference: float | None
    """Largest absolute difference of an element of unit vectors."""


def export_model(model: ModelFolder, *, form: str, out: Path | None = None, note: Note) -> Exported:
    """Write OUT.onnx, or OUT.xml and OUT.bin, each with OUT.json beside, or the folder OUT for transformers.

    out: the model's name in the current folder without, for transformers with -hf. What is there of the same names is
    replaced once the new files are whole and compared. Raises UsageError for another form, DinosearchError when the
    architecture cannot be expressed, a library is missing, the vectors differ, or nothing can be written.
    """
    if form not in FORMS:
        raise UsageError(f"no form {form!r}. Choose {', '.join(FORMS)}")
    model.verify()
    target = out or Path(f"{model.name}-hf" if form == "hf" else model.name)
    folder, stem = (target, "") if form == "hf" else (target.parent, target.name.removesuffix(f".{form}"))
    write = {"onnx": _write_onnx, "openvino": _write_openvino, "hf": _write_hf}[form]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".export-"))
        try:
            embed = write(model, aside, stem, note)
            cosine, difference = _compare(model, embed) if embed else (None, None)
            _refuse_unlike(model, form, cosine)
            (aside / f"{stem or 'dinosearch'}.json").write_text(_description(model, form), encoding="utf-8")
            files = []
            for file in sorted(aside.iterdir()):
                publish(file, folder / file.name)
                files.append(folder / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DinosearchError(
            f"cannot write {target} ({error.strerror or error}). Free some space, or name another place with --out"
        ) from error
    return Exported(files, cosine, difference)


Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 [n, S, S, channels] → float32 [n, dim], by what was written."""


def _write_onnx(model: ModelFolder, folder: Path, stem: str, note: Note) -> Embed:
    import torch

    if importlib.util.find_spec("onnx") is None:
        raise DinosearchError("writing ONNX needs the package onnx: pip install 'dinosearch[onnx]'")
    import onnx

    path = folder / f"{stem}.onnx"
    note(f"writing {path.name} and running it beside the source")
    with warnings.catch_warnings():
        # The exporter by tracing is deprecated, but writes a dynamic batch without further packages; our graphs have
        # no branches that it could miss, and what it wrote is compared.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _embedder(model),
            (_example(model),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["vectors"],
            dynamic_axes={"pixels": {0: "n"}, "vectors": {0: "n"}},
        )
    written = onnx.load(str(path))
    for key, value in _facts(model).items():
        written.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.save(written, str(path))
    return _by_openvino(path)


def _write_openvino(model: ModelFolder, folder: Path, stem: str, note: Note) -> Embed:
    openvino = import_openvino()
    from openvino.tools.ovc import convert_model

    path = folder / f"{stem}.xml"
    note(f"writing {path.name} and running it beside the source")
    side = model.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing, as above
        graph = convert_model(_embedder(model), example_input=_example(model), input=[-1, side, side, model.channels])
    graph.inputs[0].get_tensor().set_names({"pixels"})
    graph.outputs[0].get_tensor().set_names({"vectors"})
    for key, value in _facts(model).items():
        graph.set_rt_info(value if isinstance(value, str) else json.dumps(value), ["dinosearch", key])
    openvino.save_model(graph, str(path), compress_to_fp16=False)
    return _by_openvino(path)


def _write_hf(model: ModelFolder, folder: Path, _stem: str, note: Note) -> Embed | None:
    from dinosearch.vit.huggingface import write_huggingface

    foreign = write_huggingface(model, model.load_vit(), folder)
    if foreign:
        note(f"written as timm's module within transformers (timm_wrapper), which needs timm beside it: {foreign}")
    if model.fit == "pad":
        note("transformers has no word for this model's padding: pad images to a square before its processor")
    if importlib.util.find_spec("transformers") is None:
        note("transformers is not installed, so its vectors were not compared with the source's")
        return None
    import torch
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(folder).eval()

    def embed(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            made = loaded(pixel_values=_normalised(model, torch.from_numpy(pixels)))
            vectors = made.pooler_output if model.stripes == 1 else _striped(model, loaded, made.last_hidden_state)
        return torch.nn.functional.normalize(vectors, dim=1).numpy()

    return embed


def _striped(model: ModelFolder, loaded: Any, tokens: "torch.Tensor") -> "torch.Tensor":
    """The vectors as a user makes them of what transformers gives."""
    vit = loaded.timm_model
    patches = tokens[:, vit.num_prefix_tokens :]
    return vit.fc_norm(patches.unflatten(1, (model.stripes, -1)).mean(dim=2)).flatten(1)


def _by_openvino(path: Path) -> Embed:
    """OpenVINO reads ONNX too. In float32: the comparison is of files, not of a processor's bf16."""
    openvino = import_openvino()
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: np.asarray(compiled({0: pixels})[0])


def _embedder(model: ModelFolder) -> "torch.nn.Module":
    """uint8 [n, S, S, channels] → unit float32 [n, dim]."""
    import torch

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = model.load_vit()

        def forward(self, pixels: "torch.Tensor") -> "torch.Tensor":
            return torch.nn.functional.normalize(self.vit(_normalised(model, pixels)), dim=1)

    return Embedder().eval()


def _normalised(model: ModelFolder, pixels: "torch.Tensor") -> "torch.Tensor":
    """uint8 [n, S, S, channels] → float32 [n, channels, S, S]"""
    import torch

    mean, std = torch.tensor(model.mean), torch.tensor(model.std)
    return ((pixels.float() - 255 * mean) / (255 * std)).permute(0, 3, 1, 2)


def _example(model: ModelFolder) -> "torch.Tensor":
    import torch

    return torch.zeros(2, model.image_size, model.image_size, model.channels, dtype=torch.uint8)


def _compare(model: ModelFolder, embed: Embed) -> tuple[float, float]:
    """Least cosine and largest difference of unit vectors, over squares of noise."""
    import torch

    side = model.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (N_COMPARED, side, side, model.channels), dtype=np.uint8)
    with torch.inference_mode():
        wanted = _embedder(model)(torch.from_numpy(pixels)).numpy()
    found = embed(pixels)
    return float((wanted * found).sum(axis=1).min()), float(np.abs(wanted - found).max())


def _refuse_unlike(model: ModelFolder, form: str, cosine: float | None) -> None:
    if cosine is not None and not cosine >= LEAST_COSINE:  # also when it is no number
        raise DinosearchError(
            f"{model.name} as {form} gives other vectors than the model (cosine {cosine:.4f}); nothing was kept. "
            f"Export it in another form: {', '.join(each for each in FORMS if each != form)}"
        )


def _facts(model: ModelFolder) -> dict[str, Any]:
    facts = asdict(model.facts())
    return {"model": model.name, "fingerprint": model.fingerprint, "dim": model.dim} | facts


def _description(model: ModelFolder, form: str) -> str:
    """What one has to know to use the file: JSON, for people and programs."""
    side, channels = model.image_size, model.channels
    colours = "RGB" if channels == 3 else "grey" if channels == 1 else "bands or pages of a TIFF in order"
    square = {
        "crop": f"scale the short side to {round(side / model.crop_pct)}, cut out the centre",
        "pad": "scale the long side to it, add borders of RGB 124, 116, 104",
        "squash": "scale to it, distorted",
    }[model.fit]
    square += f"; {model.interpolation}, antialiased; upright by EXIF"
    inside = (
        {
            "input": f"pixel_values: float32 [n, {channels}, {side}, {side}], {colours}, (x / 255 - mean) / std, as "
            "preprocessor_config.json says",
            "output": f"pooler_output: float32 [n, {model.dim}], not of unit length"
            if model.stripes == 1
            else f"last_hidden_state: the means of its patches in {model.stripes} equal runs, each through "
            f"timm_model.fc_norm and side by side, are float32 [n, {model.dim}], not of unit length",
        }
        if form == "hf"
        else {
            "input": f"pixels: uint8 [n, {side}, {side}, {channels}], {colours}, any n; normalisation is inside",
            "output": f"vectors: float32 [n, {model.dim}], of unit length: their dot product is the score",
        }
    )
    return json.dumps(inside | {"square": square} | _facts(model), indent=2) + os.linesep
