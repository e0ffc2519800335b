"""A ViT → OpenVINO's form of it, once, kept in the model's cache. The only step on the processor that needs torch.

The form takes uint8 [n, S, S, channels] for any n and gives float32 [n, dim], not of unit length; it normalises.
Its weights are stored in half precision, which moves vectors by less than bf16 does.

It is made in a process of its own (`convertprocess`): torch and timm take more memory than all else that `index` and
`query` do, and would keep it. Where torch is loaded anyway it is made here, which saves the second import.
"""

import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dinosearch.encoder.cache import keep_form, kept_form
from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import ModelFolder, Note

if TYPE_CHECKING:
    import openvino

EXPLAINED = 70
"""Exit code of a process whose last line is a DinosearchError's message."""


def import_openvino() -> Any:
    """The module `openvino`, without its telemetry and, for now, without its conversion tools. Raises ImportError.

    On import, OpenVINO reports itself and leaves files in the user's home, unless openvino_telemetry cannot be
    imported: then it uses a stub. The tools, which only a conversion needs, are a third of the import's time.
    """
    modules = cast(dict[str, Any], sys.modules)
    modules.setdefault("openvino_telemetry", None)
    without_tools = "openvino.tools.ovc" not in modules
    if without_tools:
        modules["openvino.tools.ovc"] = None
    try:
        import openvino
    finally:
        if without_tools:
            del modules["openvino.tools.ovc"]
    return openvino


def converted_path(model: ModelFolder, *, note: Note) -> Path:
    """The folder of the converted form (`vit.xml`, `vit.bin`), made if need be.

    Raises ModelMismatch if the weights are not the model's, DinosearchError if it cannot be made.
    """
    if path := kept_form(model, "openvino"):
        return path
    model.verify()
    note(f"converting {model.name} for this processor, once (imports torch, takes some seconds)")
    write = partial(convert if "torch" in sys.modules else _convert_apart, model)
    return keep_form(model, "openvino", write, note=note)


def convert(model: ModelFolder, path: Path) -> None:
    """Write the converted form into a folder. Imports torch. Raises DinosearchError if it cannot be written."""
    graph = _graph(model)
    try:
        import_openvino().save_model(graph, str(path / "vit.xml"), compress_to_fp16=True)
    except RuntimeError as error:  # all of OpenVINO's: the disk has run full meanwhile
        raise DinosearchError(f"{path} cannot be written ({last_line(error)}). Free some space") from error


def run_apart(module: str, *arguments: str) -> tuple[int, str]:
    """Run `main` of a module beside this one in a process of its own: its exit code, and what it said last."""
    # -P: the current folder may hold a numpy.py, which must not be imported.
    package = Path(__file__).parent.parent.parent
    code = f"import sys; sys.path.insert(0, {str(package)!r})\nfrom dinosearch.encoder import {module}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\n{module}.main(*sys.argv[1:])", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if done.returncode == -getattr(signal, "SIGKILL", 9):
        return done.returncode, "it was killed (SIGKILL), as systems do that lack memory"
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    return done.returncode, said[-1]


def last_line(error: BaseException) -> str:
    """What an error of OpenVINO's says in the end, after the places in its source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:150]


def _convert_apart(model: ModelFolder, path: Path) -> None:
    code, said = run_apart("convertprocess", str(model.path), str(path))
    if code == EXPLAINED:
        raise DinosearchError(said)
    if code:
        raise DinosearchError(
            f"{model.name} could not be converted for this processor ({said[:200]}). Is memory or disk short?"
        )


def _graph(model: ModelFolder) -> "openvino.Model":
    import torch

    from dinosearch.encoder.shortcut import skip_unread_tokens

    openvino = import_openvino()
    from openvino.preprocess import PrePostProcessor
    from openvino.tools.ovc import convert_model

    side = model.image_size
    vit = model.load_vit()
    skip_unread_tokens(vit, channels=model.channels, image_size=side)
    example = torch.zeros(2, model.channels, side, side)
    with warnings.catch_warnings():
        # Tracing is deprecated in torch, but what OpenVINO converts; and all our inputs have one shape but for n.
        warnings.simplefilter("ignore")
        graph = convert_model(vit, example_input=example, input=[-1, model.channels, side, side])
    steps = PrePostProcessor(graph)
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    to_float = steps.input().preprocess().convert_element_type(openvino.Type.f32)
    to_float.mean([255 * x for x in model.mean]).scale([255 * x for x in model.std])
    return steps.build()
