"""A ViT → OpenVINO's form of it, once, kept in the model's cache. The only step on the processor that needs torch.

The form takes uint8 [n, S, S, 3] for any n and gives float32 [n, dim], not of unit length; normalisation is part of it.
Its weights are stored in half precision, which moves vectors by less than bf16 does.
"""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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

    It appears whole or not at all, under the model's fingerprint. Where the model's folder cannot be written, it is
    kept in a folder of this user's among the system's temporary ones. Raises ModelMismatch if the weights are others.
    """
    wanted = model.cache_path / f"openvino-{model.fingerprint}"
    if _is_whole(wanted):
        return wanted
    spare = _own_temporary_path() / wanted.name
    if _is_whole(spare) and not os.access(model.path, os.W_OK):
        return spare
    model.verify()
    note(f"converting {model.name} for this processor, once (imports torch, takes some seconds)")
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        return _convert_into(model, wanted)
    except OSError as error:
        reason = error.strerror or str(error)
        note(f"{wanted.parent} cannot be written ({reason}); the converted form is kept in {spare.parent}")
        return _convert_into(model, spare)


def _is_whole(path: Path) -> bool:
    return (path / "vit.xml").is_file() and (path / "vit.bin").is_file()


def discard(path: Path) -> None:
    """Remove a converted form that cannot be read, so that the next `converted_path` makes it anew."""
    shutil.rmtree(path, ignore_errors=True)


def _own_temporary_path() -> Path:
    """A folder that outlives the process and that no other user can have filled."""
    if not hasattr(os, "getuid"):  # Windows: temporary folders are the user's own
        path = Path(tempfile.gettempdir()) / "dinosearch"
        path.mkdir(exist_ok=True)
        return path
    path = Path(tempfile.gettempdir()) / f"dinosearch-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    facts = path.lstat()
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid():
        return path
    return Path(tempfile.mkdtemp(prefix="dinosearch-"))


def _convert_into(model: ModelFolder, path: Path) -> Path:
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=".openvino-"))
    try:
        openvino = import_openvino()
        openvino.save_model(_graph(model), str(aside / "vit.xml"), compress_to_fp16=True)
        for name in ("vit.bin", "vit.xml"):
            with (aside / name).open("rb+") as file:
                os.fsync(file.fileno())
        aside.chmod(0o755)
        discard(path)
        try:
            aside.rename(path)
        except OSError:
            if not (path / "vit.xml").is_file():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def _graph(model: ModelFolder) -> "openvino.Model":
    import torch

    from dinosearch.encoder.shortcut import skip_unread_tokens

    openvino = import_openvino()
    from openvino.preprocess import PrePostProcessor
    from openvino.tools.ovc import convert_model

    side = model.image_size
    vit = model.load_vit()
    skip_unread_tokens(vit, image_size=side)
    example = torch.zeros(2, 3, side, side)
    with warnings.catch_warnings():
        # Tracing is deprecated in torch, but what OpenVINO converts; and all our inputs have one shape but for n.
        warnings.simplefilter("ignore")
        graph = convert_model(vit, example_input=example, input=[-1, 3, side, side])
    steps = PrePostProcessor(graph)
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    to_float = steps.input().preprocess().convert_element_type(openvino.Type.f32)
    to_float.mean([255 * x for x in model.mean]).scale([255 * x for x in model.std])
    return steps.build()
