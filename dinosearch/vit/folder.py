"""A model on disk: `model.json` says what it is, `weights.safetensors` holds the backbone under timm's names.

Opening a folder and reading its facts imports no torch; only `ModelFolder.load_vit` and `save_model` do.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinosearch.errors import DinosearchError, ModelMismatch, ModelNotFound, UsageError

if TYPE_CHECKING:
    import torch

FORMAT = 2
"""2 may have stripes, which 1 knows nothing of."""
LARGEST_DEFAULT_SIZE = 256
"""Released weights made for larger squares (518 for DINOv2) are used at about 224 px unless told otherwise."""
REPLACED = Path("training", "replaced")
"""Where a model lies in its own folder while a run is about to replace it."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Note = Callable[[str], None]
"""Takes one line for the person at the terminal: what was chosen by default, or what takes long."""


def quiet(_line: str) -> None:
    """The Note that tells nobody."""


@dataclass(frozen=True)
class ModelFacts:
    """What turns an image into a vector, apart from the weights themselves."""

    arch: str
    """timm's name of the architecture."""
    arch_kwargs: dict[str, Any]
    """Arguments of `timm.create_model` beside the name, such as img_size and patch_size."""
    image_size: int
    """Side of the square that the model sees, in pixels."""
    fit: str = "crop"
    """How an image meets the square: "crop" (its centre), "pad" (all, with borders) or "squash" (all, distorted)."""
    crop_pct: float = 1.0
    """With "crop": share of the short side that is kept; 1.0 keeps all of it."""
    interpolation: str = "bicubic"
    """Resampling filter: "bicubic", "bilinear" or "lanczos", antialiased."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted from pixels scaled to 0..1, per channel: three are RGB, others the bands or pages of a file."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divides what is left, per channel."""
    pooling: str = "token"
    """What becomes the vector: "token" (class token) or "avg" (mean of the patch tokens); timm's global_pool."""
    stripes: int = 1
    """With "avg": horizontal stripes whose means are laid side by side, top to bottom; they keep what is above what."""

    @property
    def channels(self) -> int:
        """Of the images that the model takes."""
        return len(self.mean)


@dataclass(frozen=True)
class ModelFolder(ModelFacts):
    """An opened folder of `models/`: the facts of `model.json`. Weights are read by `load_vit` alone."""

    path: Path = Path()
    dim: int = 0
    """Length of a vector."""
    fingerprint: str = ""
    """16 hex digits over weights, architecture and preprocessing: equal fingerprints make equal vectors."""
    created: str = ""
    """When the folder was first written, ISO 8601, UTC."""
    trained: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: method, data, images, steps, seed, metrics; or the source of an import."""

    @property
    def name(self) -> str:
        path = self.path
        while path.parts[-2:] == REPLACED.parts:
            path = path.parents[1]
        return path.name

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def cache_path(self) -> Path:
        """Derived forms of the weights, keyed by fingerprint; safe to delete."""
        return self.path / "cache"

    def facts(self) -> ModelFacts:
        return ModelFacts(**{f.name: getattr(self, f.name) for f in fields(ModelFacts)})

    def load_vit(self) -> "torch.nn.Module":
        """The backbone in float32, in eval mode: normalised [n, channels, S, S] → vectors [n, dim], not unit length.

        Raises DinosearchError when the weights do not fit the architecture.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        vit = create_vit(self.facts())
        try:
            vit.load_state_dict(load_file(self.weights_path))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise DinosearchError(
                f"{self.weights_path} cannot be loaded as {self.arch} ({first_line(error)}). "
                "Restore the file from a backup, or train or import the model again"
            ) from error
        return vit.eval()

    def verify(self) -> None:
        """Raise ModelMismatch if the weights are not those that `model.json` was written for."""
        from safetensors import SafetensorError

        if not self.weights_path.is_file():
            raise ModelNotFound(f"{self.weights_path} is missing. Put it back, or train the model again")
        try:
            found = fingerprint_of(self.weights_path, self.facts())
        except (OSError, SafetensorError) as error:
            raise ModelMismatch(
                f"{self.weights_path} cannot be read ({first_line(error)}). Restore it, or train into another --name"
            ) from error
        if found != self.fingerprint:
            raise ModelMismatch(
                f"{self.weights_path} (fingerprint {found}) is not the file that model.json describes "
                f"({self.fingerprint}). Restore it, or train into another --name"
            )


def create_vit(facts: ModelFacts, *, drop_path_rate: float = 0.0) -> "torch.nn.Module":
    """A randomly initialised timm backbone without a classifier: [n, 3, S, S] → [n, dim].

    With stripes it is timm's but for two layers without weights, which pool: see `Stripes`.

    Raises DinosearchError when timm does not know the architecture or cannot build it so.
    """
    import timm

    if not timm.is_model(facts.arch):
        close = timm.list_models(f"*{facts.arch.split('.')[0].strip('*')}*")[:3]
        hint = f"Did you mean {', '.join(close)}?" if close else "timm.list_models('vit_*') shows what there is"
        raise DinosearchError(f"timm has no architecture {facts.arch!r}. {hint}")
    try:
        vit = timm.create_model(
            facts.arch,
            pretrained=False,
            num_classes=0,
            global_pool=facts.pooling,
            drop_path_rate=drop_path_rate,
            **facts.arch_kwargs,
        )
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise DinosearchError(
            f"timm cannot build {facts.arch} with {facts.arch_kwargs} ({first_line(error)}). "
            "Choose a vision transformer (vit_*) and an --image-size that its patch size divides"
        ) from error
    if not (hasattr(vit, "blocks") and hasattr(vit, "patch_embed")):
        raise DinosearchError(f"{facts.arch} is not a vision transformer. Choose one of timm's vit_* architectures")
    if facts.stripes > 1:
        from dinosearch.vit.stripes import pool_by_stripes

        pool_by_stripes(vit, facts.stripes)
    return vit


def n_features(vit: "torch.nn.Module") -> int:
    """Width of a timm backbone's tokens; a vector with stripes is so many times as long."""
    width: Any = vit.num_features
    return int(width)


def save_model(
    path: Path, vit: "torch.nn.Module", facts: ModelFacts, *, trained: Mapping[str, Any], created: str | None = None
) -> ModelFolder:
    """Write (or replace) `weights.safetensors` and `model.json` in `path`, whole or not at all.

    The weights go first: a folder without `model.json` is no model yet. A replacement keeps its `created` time.
    """
    from safetensors.torch import save

    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in vit.state_dict().items()}
    weights = save(state, metadata={"format": "pt"})
    if created is None:
        created = open_model(path).created if (path / "model.json").is_file() else now()
    write_whole(path / "weights.safetensors", weights)
    fingerprint = fingerprint_of(path / "weights.safetensors", facts)
    facts_json = asdict(facts) | {
        "format": FORMAT if facts.stripes > 1 else 1,
        "dim": n_features(vit) * facts.stripes,
        "fingerprint": fingerprint,
        "created": created,
        "trained": dict(trained),
    }
    write_whole(path / "model.json", json.dumps(facts_json, indent=2, allow_nan=False).encode() + b"\n")
    return open_model(path)


@contextmanager
def unwritable_told(folder: Path) -> Iterator[None]:
    """Turn what the system says where it lets nobody write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise DinosearchError(
            f"{folder} cannot be written ({first_line(error)}). Make room there and make it writable, or set "
            "DINOSEARCH_MODELS to another folder"
        ) from error


def open_model(path: Path) -> ModelFolder:
    """The model in a folder. Raises ModelNotFound if there is none, DinosearchError if it cannot be read."""
    try:
        facts = json.loads((path / "model.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"no model in {path}. Train one: dinosearch train IMAGES --name {path.name}") from None
    except (OSError, ValueError) as error:
        raise DinosearchError(
            f"{path / 'model.json'} cannot be read ({first_line(error)}). Restore it, or train the model again"
        ) from error
    if not isinstance(facts, dict):
        raise DinosearchError(f"{path / 'model.json'} holds no JSON object. Restore it, or train the model again")
    if facts.get("format", 0) > FORMAT:
        raise DinosearchError(
            f"{path} was written by a newer dinosearch (model format {facts['format']}). "
            "Update: pip install -U dinosearch"
        )
    known = {f.name for f in fields(ModelFolder)} - {"path"}
    missing = {"arch", "arch_kwargs", "image_size", "dim", "fingerprint"} - facts.keys()
    if missing:
        raise DinosearchError(f"{path / 'model.json'} lacks {', '.join(sorted(missing))}. Restore it, or train again")
    values: dict[str, Any] = {
        name: tuple(v) if name in ("mean", "std") else v for name, v in facts.items() if name in known
    }
    return ModelFolder(path=path, **values)


def list_models(models: Path, *, note: Note = quiet) -> list[ModelFolder]:
    """Every model in the folder `models`, newest first by the `created` time in its JSON.

    One that cannot be read is told to `note` and left out: it must not stand in the way of the others.
    """
    found = []
    for path in _entries(models):
        if (place := model_in(path)) is not None:
            try:
                found.append(open_model(place))
            except DinosearchError as error:
                note(f"left out: {error}")
    return sorted(found, key=lambda model: model.created, reverse=True)


def model_in(folder: Path) -> Path | None:
    """Where the model of a folder lies: there, or set aside in it until the run that replaces it has one. None where
    there is no model, or none that one may look at.
    """
    while not os.path.isfile(folder / "model.json"):  # noqa: PTH113 - Path's raises where it may not look
        folder = folder / REPLACED
        if not os.path.isdir(folder):  # noqa: PTH112
            return None
    return folder


def _entries(models: Path) -> list[Path]:
    try:
        return sorted(models.iterdir()) if os.path.isdir(models) else []  # noqa: PTH112
    except OSError as error:
        raise DinosearchError(
            f"{models} cannot be read ({error.strerror}). Make it readable, or set DINOSEARCH_MODELS to another folder"
        ) from error


def find_by_fingerprint(fingerprint: str, *, models: Path) -> ModelFolder | None:
    return next((model for model in list_models(models) if model.fingerprint == fingerprint), None)


def models_path() -> Path:
    """Where models live: the environment's DINOSEARCH_MODELS, else `models/` in the working directory."""
    return Path(os.environ.get("DINOSEARCH_MODELS") or "models")


def fingerprint_of(weights_path: Path, facts: ModelFacts) -> str:
    """16 hex digits over the tensors (names, shapes, bytes) and everything in `facts`."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(weights_path, framework="numpy") as tensors:
        for name in sorted(tensors.keys()):
            tensor = np.ascontiguousarray(tensors.get_tensor(name))
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(tensor.data)
    known = asdict(facts)
    if facts.stripes == 1:
        del known["stripes"]  # models are older than the word
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader, or a power cut, sees the old bytes or the new."""
    aside = Path(tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")[1])
    try:
        aside.write_bytes(data)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # still there only if writing failed, on a full disk say


def publish(aside: Path, path: Path) -> None:
    """Give a finished file its name: flushed to disk first, the folder's entry after."""
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.chmod(0o666 & ~_umask())
    aside.replace(path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def clean_name(wanted: str) -> str:
    """`wanted` without what does not belong in a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", wanted).strip("-.") or "images"


def free_name(wanted: str, folder: Path, *, given_up: Callable[[Path], bool] = lambda _path: False) -> str:
    """`wanted`, or `wanted-2`, `wanted-3`, … : the first that does not exist in `folder`, or may be used again."""
    clean = clean_name(wanted)
    names = [clean, *(f"{clean}-{i}" for i in range(2, 10_000))]
    return next(name for name in names if not (folder / name).exists() or given_up(folder / name))


def path_for(name: str, models: Path) -> Path:
    """The folder of the model that the user calls `name`. Raises UsageError for what is no name of a folder."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UsageError(f"--name {name!r} is no name for a folder: leave out slashes and leading dots")
    return models / name


def remove_model(path: Path) -> None:
    """Delete a model's folder, `model.json` first, so that a half-deleted folder is no model."""
    (path / "model.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
