"""Which model is meant: a name, a folder, `timm:<name>`, a released file, or nothing at all."""

import errno
import logging
import os
import ssl
import threading
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from dinosearch.errors import DinosearchError, ModelNotFound, UsageError
from dinosearch.vit.folder import (
    LARGEST_DEFAULT_SIZE,
    ModelFacts,
    ModelFolder,
    Note,
    first_line,
    free_name,
    list_models,
    model_in,
    open_model,
    path_for,
    quiet,
    save_model,
    unwritable_told,
)

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
DEFAULT_MODEL = "timm:vit_small_patch14_reg4_dinov2.lvd142m"


def resolve_model(spec: str | None, *, models: Path, note: Note = quiet, image_size: int | None = None) -> ModelFolder:
    """The model that `spec` names; what comes from elsewhere is converted once into a folder of `models`.

    spec: None (the newest in `models`, else `DEFAULT_MODEL`), a name in `models`, a folder, `timm:<name>`, or a
        released `.pth`/`.safetensors` file of DINO, DINOv2 or DINOv3.
    image_size: side of the square for timm's and released weights; own models keep theirs.
    Raises ModelNotFound, or DinosearchError with what to do.
    """
    if spec is None:
        found = list_models(models, note=note)
        if found:
            note(f"model: {found[0].path} (the newest in {models}/; --model chooses another)")
            return _with_size(found[0], image_size, models=models, note=note)
        note(f"model: {DEFAULT_MODEL} (none of your own in {models}/; dinosearch train IMAGES makes one)")
        return _timm_model(DEFAULT_MODEL, models=models, image_size=image_size, note=note)
    if spec.startswith("timm:"):
        return _timm_model(spec, models=models, image_size=image_size, note=note)
    path = Path(spec)
    if _is_own(path):
        own = open_model(path.parent)  # already what an import would make
        return _with_size(own, image_size, models=models, note=note)
    if path.is_file():
        return _released_model(path, models=models, image_size=image_size, note=note)
    for folder in (models / spec, path):
        if (place := model_in(folder)) is not None:
            return _with_size(open_model(place), image_size, models=models, note=note)
    names = ", ".join(model.name for model in list_models(models)[:5])
    raise ModelNotFound(
        f"no model {spec!r} in {models}/, and no such folder or file. "
        + (f"There are: {names}" if names else "Train one: dinosearch train IMAGES")
    )


def is_released(spec: str) -> bool:
    """Whether `spec` means weights from elsewhere, whose square may be chosen: timm's or a file."""
    return spec.startswith("timm:") or (Path(spec).is_file() and not _is_own(Path(spec)))


def _is_own(path: Path) -> bool:
    return path.name == "weights.safetensors" and (path.parent / "model.json").is_file()


def import_model(
    spec: str, *, models: Path, name: str | None = None, image_size: int | None = None, note: Note = quiet
) -> ModelFolder:
    """Convert a released file, or timm's weights (`timm:<name>`), into a folder of `models`, as first use would.

    name: of the new folder; without one it is taken from the file, and an earlier import of the same is found again.
    image_size: side of the square that the model will see; position embeddings are resized to it.
    Raises UsageError for a name that is taken or is none, DinosearchError as resolve_model does.
    """
    if name is not None and path_for(name, models).exists():
        raise UsageError(f"{models / name} exists. Choose another --name")
    if spec.startswith("timm:"):
        return _timm_model(spec, models=models, image_size=image_size, note=note, name=name)
    own = model_in(Path(spec))
    path = Path(spec) if own is None else own / "weights.safetensors"
    if not path.is_file():
        raise ModelNotFound(
            f"no file {spec!r}. Name a .pth or .safetensors file of DINO, DINOv2 or DINOv3, or timm:<name>"
        )
    return _released_model(path, models=models, image_size=image_size, note=note, name=name)


def _with_size(model: ModelFolder, image_size: int | None, *, models: Path, note: Note) -> ModelFolder:
    """The model at a size that was asked for, which timm's weights may have besides; others have the size they have."""
    if image_size in (None, model.image_size):
        return model
    source = str(model.trained.get("source", ""))
    if model.trained.get("method") != "imported":
        ways = f"train a model at {image_size} px"
    elif source.startswith("timm:"):
        return _timm_model(source, models=models, image_size=image_size, note=note)
    else:
        ways = f"import its file again: --model FILE --image-size {image_size}"
    raise DinosearchError(f"{model.name} works at {model.image_size} px. Leave --image-size out, or {ways}")


def _known_import(source: str, *, models: Path, image_size: int | None) -> ModelFolder | None:
    """An earlier import of the same source at the wanted size (or at the size chosen by default then)."""
    for model in list_models(models):
        origin = model.trained
        if origin.get("source") == source and (
            model.image_size == image_size or (image_size is None and origin.get("default_size"))
        ):
            return model
    return None


def _timm_model(spec: str, *, models: Path, image_size: int | None, note: Note, name: str | None = None) -> ModelFolder:
    known = _known_import(spec, models=models, image_size=image_size)
    if known and name is None:
        return known
    _prepare_hub()
    import timm

    arch = spec.removeprefix("timm:")
    if not timm.is_model(arch):
        close = timm.list_models(f"*{arch.split('.')[0]}*", pretrained=True)[:3]
        hint = f"Did you mean timm:{' or timm:'.join(close)}?" if close else "timm.list_models('vit_*') lists them"
        raise ModelNotFound(f"timm has no model {arch!r}. {hint}")
    try:
        config = timm.get_pretrained_cfg(arch)
    except RuntimeError:  # a tag that it does not have
        there = timm.list_models(f"{arch.split('.')[0]}.*", pretrained=True)[:3]
        hint = f"There are timm:{', timm:'.join(there)}" if there else f"Choose another, such as {DEFAULT_MODEL}"
        raise ModelNotFound(f"timm has no weights {arch!r}. {hint}") from None
    if config is None or not config.has_weights:
        raise ModelNotFound(
            f"timm has no pretrained weights for {arch!r}. Choose one with a tag, such as {DEFAULT_MODEL}"
        )
    size = image_size or _default_size(config.input_size[-1])
    if image_size is not None:
        _check_size(arch, image_size)
    arch_kwargs: dict[str, Any] = {"img_size": size}
    facts = ModelFacts(
        arch=arch,
        arch_kwargs=arch_kwargs,
        image_size=size,
        crop_pct=float(config.crop_pct or 1.0),
        interpolation=config.interpolation or "bicubic",
        mean=_rgb(config.mean),
        std=_rgb(config.std),
        pooling="token",
    )
    note(f"fetching {arch} once from the Hugging Face hub, through timm")
    try:
        vit = timm.create_model(arch, pretrained=True, num_classes=0, global_pool=facts.pooling, **arch_kwargs)
    except _network_errors() as error:
        raise ModelNotFound(
            f"{arch} could not be fetched: {_why_not(error)}. "
            "Train a model of your own (dinosearch train IMAGES), or put weights in place: "
            "--model FILE.pth or FILE.safetensors takes released DINO, DINOv2, DINOv3 files"
        ) from error
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise DinosearchError(
            f"{arch} cannot be used ({first_line(error)}). Choose a vision transformer, vit_*"
        ) from error
    by_default = image_size is None
    return _import(vit, facts, name=name or arch, source=spec, models=models, by_default=by_default, note=note)


def _prepare_hub() -> None:
    """No telemetry (DESIGN section 6), and no minute of retries when the hub is plainly out of reach."""
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(variable, "1")
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not _answers(constants.ENDPOINT, within=5.0):
        constants.HF_HUB_OFFLINE = True  # what was fetched before is still found in the hub's own cache


def _answers(url: str, *, within: float) -> bool:
    """Whether anything answers at `url`, through the environment's proxy if there is one; `within` is in seconds.

    In a thread, since neither the look-up of a name nor the trying of its addresses keeps to one timeout.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=within).close()
        except HTTPError:
            pass  # a refusal is an answer
        except (OSError, HTTPException) as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # the hub's client trusts by other lists
                return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within)
    return answered.is_set()


def _why_not(error: BaseException) -> str:
    """Why nothing could be fetched, for people."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        return f"the Hugging Face hub refused it ({error.response.status_code})"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return f"{constants.HF_HUB_CACHE} cannot be written ({error.strerror}); HF_HOME chooses another folder"
    return "no way to the Hugging Face hub"


def _network_errors() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def _released_model(
    path: Path, *, models: Path, image_size: int | None, note: Note, name: str | None = None
) -> ModelFolder:
    from dinosearch.vit.released import read_released

    source = f"file:{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}"
    known = _known_import(source, models=models, image_size=image_size)
    if known and name is None:
        return known
    vit, facts = read_released(path, image_size=image_size)
    name = name or (path.parent.resolve().name if path.name == "weights.safetensors" else path.stem)
    by_default = image_size is None
    return _import(vit, facts, name=name, source=source, models=models, by_default=by_default, note=note)


def _import(
    vit: Any, facts: ModelFacts, *, name: str, source: str, models: Path, by_default: bool, note: Note
) -> ModelFolder:
    folder = models / free_name(name, models)
    trained = {"method": "imported", "source": source, "default_size": by_default}
    with unwritable_told(folder):
        model = save_model(folder, vit, facts, trained=trained)
    note(f"imported as {model.path} ({facts.arch}, {facts.image_size} px, {model.dim} dimensions)")
    return model


def _rgb(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return (float(red), float(green), float(blue))


def _check_size(arch: str, image_size: int) -> None:
    """Raises DinosearchError for a size that one of timm's models does not fill with patches; nothing is fetched."""
    import timm
    import torch

    from dinosearch.vit.released import square_for

    try:
        with torch.device("meta"):
            patches: Any = getattr(timm.create_model(arch, pretrained=False, num_classes=0), "patch_embed", None)
    except (TypeError, AssertionError, RuntimeError, ValueError):
        return  # which says why when it is made for use
    patch = getattr(patches, "patch_size", None)
    if patch is not None:
        square_for(image_size, image_size, patch if isinstance(patch, int) else patch[0])


def _default_size(native: int) -> int:
    return native if native <= LARGEST_DEFAULT_SIZE else 224
