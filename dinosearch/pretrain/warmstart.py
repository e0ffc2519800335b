"""Weights to start from: which, how they are brought to the size that is trained, and how gently they go on.

Released heads do not exist, so a fresh one learns first while the backbone waits; steps are small, and smaller the
deeper the layer: continuing with a paper's own learning rate has cost users most of what the weights knew.
Knows no loop: that a run never ends worse than it began is seen to by whoever measures quality.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.pretrain.quality import Quality
from dinosearch.pretrain.recipe import usual_lr
from dinosearch.vit.folder import ModelFacts, ModelFolder, Note, list_models, open_model, save_model
from dinosearch.vit.released import read_released
from dinosearch.vit.resolve import is_released, resolve_model

SCRATCH = "scratch"
"""What `--from` is called to start from random weights, however few images there are."""
STARTS_BELOW = 10_000
"""With fewer images released weights are the better start. Public figures: 9,500 images (Imagenette) taught a ViT-S/16
in 200 epochs to a k-NN accuracy of 0.838 among 10 classes (stable-pretraining's benchmark); DINOv2's released ViT-S/14
has 0.790 among all 1,000 classes of ImageNet (arXiv 2304.07193, table 4)."""
DECIDED = ("arch", "arch_kwargs", "patch_size", "mean", "std", "pooling", "fit")
"""What comes from the start and cannot be chosen beside it."""
GENTLE = 0.1
"""Of the usual learning rate."""
SMALL_DIM = 192
"""Up to this width a small head suffices, as in recipes of our own."""


@dataclass(frozen=True)
class Start:
    """A backbone at the size that is trained, and what it is."""

    backbone: nn.Module
    facts: ModelFacts
    origin: dict[str, Any]
    """For model.json: name, fingerprint, and where it was imported from."""


def choose_start(
    spec: str | None,
    *,
    models: Path,
    n_images: int,
    image_size: int | None,
    channels: int | None = None,
    chosen: bool,
    note: Note,
) -> Start | None:
    """The start that `spec` names; without one, for few images, the newest released weights among `models` that fit.

    image_size, channels: what the user asked for. chosen: the user chose an architecture, so nothing is started from
    unasked. Raises ModelNotFound, DinosearchError when the size does not fit, UsageError when the channels do not.
    """
    if spec == SCRATCH:
        return None
    if spec is not None:
        # a released file is read at this size, so that its positions are resized once
        size = image_size if is_released(spec) else None
        start = open_start(resolve_model(spec, models=models, note=note, image_size=size), image_size=image_size)
        if channels not in (None, start.facts.channels):
            raise UsageError(
                f"--from {spec} takes images of {start.facts.channels} channels, not {channels}: "
                f"leave --channels out, or start with --from {SCRATCH}"
            )
        return start
    if chosen or n_images >= STARTS_BELOW:
        return None
    for model in list_models(models):
        if model.trained.get("method") != "imported" or channels not in (None, model.channels):
            continue
        try:
            start = open_start(model, image_size=image_size)
        except DinosearchError as error:
            note(f"{n_images} images are few, but {model.path} is no start for them: {error}")
            continue
        note(
            f"start: {model.path}, since {n_images} images are few (--from MODEL chooses another, "
            f"--from {SCRATCH} none)"
        )
        return start
    if channels not in (None, 3):
        return None  # released weights are of RGB
    note(
        f"{n_images} images are few: released weights will probably do better. Put a .pth of DINO, DINOv2 or DINOv3 in "
        "place and use --from FILE, or --from timm:vit_small_patch14_reg4_dinov2.lvd142m where there is a network"
    )
    return None


def open_start(model: ModelFolder, *, image_size: int | None) -> Start:
    """A model with its position embeddings resized to `image_size`, if one is given."""
    backbone, facts = read_released(model.weights_path, image_size=image_size or model.image_size)
    origin: dict[str, Any] = {"model": model.name, "fingerprint": model.fingerprint}
    if "source" in model.trained:
        origin["source"] = model.trained["source"]
    return Start(backbone, facts, origin)


def gentle_presets(facts: ModelFacts, *, batch_size: int) -> dict[str, tuple[Any, str]]:
    """Lines of the recipe that a start decides or suggests, each with its reason."""
    own = "the start's own"
    kwargs = {name: value for name, value in facts.arch_kwargs.items() if name != "img_size"}
    presets: dict[str, tuple[Any, str]] = {
        "arch": (facts.arch, own),
        "image_size": (facts.image_size, own),
        "channels": (facts.channels, own),
        "mean": (facts.mean, own),
        "std": (facts.std, own),
        "pooling": (facts.pooling, own),
        "fit": (facts.fit, own),
        "stripes": (facts.stripes, own),
        "lr": (GENTLE * usual_lr(batch_size), "a tenth of the usual: large steps undo what the start knows"),
        "layer_decay": (0.9, "as in DINOv2: what early layers know is the most general"),
        "freeze_backbone": (0.1, "the head is fresh, and learns first"),
        "teacher_momentum": (0.996, "as in DINO: the teacher leaves the start slowly"),
    }
    if kwargs:
        presets["arch_kwargs"] = (kwargs, own)
    if "patch_size" in kwargs:
        presets["patch_size"] = (kwargs["patch_size"], own)
    if kwargs.get("embed_dim", SMALL_DIM + 1) <= SMALL_DIM:
        presets |= {
            "head_hidden_dim": (512, "enough for a narrow model"),
            "head_bottleneck_dim": (128, "enough for a narrow model"),
            "drop_path_rate": (0.0, "none in a small model"),
        }
    return presets


def refuse_decided(overrides: Mapping[str, Any]) -> None:
    """Raise UsageError for a setting that comes from the start."""
    for name in DECIDED:
        if overrides.get(name) is not None:
            raise UsageError(f"{name.replace('_', '-')} comes from the model given by --from: leave it out")


def improved(quality: Quality, start: Quality) -> bool:
    """Whether features are better than the start's: more images find themselves, or as many in richer features.

    Where a start finds every image already, its recall leaves nothing to gain, and the rank alone decides.
    """
    return (quality.recall_at_1, quality.rank) > (start.recall_at_1, start.rank)


def keep_start(start: Start, folder: Path) -> None:
    """Copy the start below the run's own folder: a resumed run needs nothing else."""
    save_model(folder / "start", start.backbone, start.facts, trained=start.origin)


def kept_start(folder: Path) -> Start | None:
    """What `keep_start` kept; None for a run from random weights."""
    if not (folder / "start" / "model.json").is_file():
        return None
    model = open_model(folder / "start")
    return Start(model.load_vit(), model.facts(), model.trained)
