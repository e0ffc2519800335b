"""A ViT → OpenVINO's form of it, once, kept in the model's cache. The only step on the processor that needs torch.

The form takes uint8 [n, S, S, channels] for any n and gives float32 [n, dim], not of unit length; it normalises.
Its weights are stored in half precision, which moves vectors by less than bf16 does.
"""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dinosearch.encoder.cache import keep_form, kept_form
from dinosearch.vit.folder import ModelFolder, Note

if TYPE_CHECKING:
    import openvino


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

    Raises ModelMismatch if the weights are not the model's.
    """
    if path := kept_form(model, "openvino"):
        return path
    model.verify()
    note(f"converting {model.name} for this processor, once (imports torch, takes some seconds)")

    def write(path: Path) -> None:
        import_openvino().save_model(_graph(model), str(path / "vit.xml"), compress_to_fp16=True)

    return keep_form(model, "openvino", write, note=note)


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
