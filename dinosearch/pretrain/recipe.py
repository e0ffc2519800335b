"""From the images and the machine to hyperparameters, each with its reason. Trains nothing.

A recipe is a plain frozen dataclass: what is printed, recorded in `model.json` and checked by `--resume`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from dinosearch.errors import UsageError
from dinosearch.pretrain.bank import Survey
from dinosearch.pretrain.unused import unused
from dinosearch.pretrain.views import ViewSettings
from dinosearch.vit.folder import ModelFacts, create_vit

BASE_ARCH = "vit_tiny_patch16_224"
"""timm's architecture whose width, depth and patch size are changed where its own do not suit the images."""


METHODS = ("dino", "dinov2", "distill")
NORMALISATIONS = ("centering", "sinkhorn")
OPTIMIZERS = ("adamw", "muon")
POOLINGS = ("token", "avg")
FITS = ("crop", "pad", "squash")
DINOV2_IMAGES, DINOV2_STEPS = 1_000_000, 125_000
"""From so many of both on, dinov2 is chosen: its shortest published run (ViT-L/16, 100 × 1,250 steps on ImageNet).
With few images plain DINO is far ahead: on 9,500 of them, from scratch, k-NN 83.8 against 43.3 for iBOT's loss
(stable-pretraining's Imagenette table, untuned)."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run learns, apart from the images, the number of steps and the seed."""

    arch: str
    """timm's name of the vision transformer."""
    arch_kwargs: dict[str, Any]
    """Arguments of `timm.create_model` beside the name."""
    image_size: int
    """Side of the global crops, and later of indexed images, in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    fit: str = "crop"
    """How an indexed image meets the square: "crop" (its centre), "pad" (all, with borders) or "squash" (all,
    distorted). Training does not depend on it."""
    channels: int = 3
    """Of the images: 3 is RGB, others are the bands or pages of multi-channel files."""
    views: ViewSettings = field(default_factory=ViewSettings)
    """The crops and their distortions."""
    method: str = "dino"
    """What the student is asked to learn: "dino" (crops alike), "dinov2" (hidden patches too, for many images), or
    "distill" (what a stronger model makes of the images)."""
    batch_size: int = 64
    """Images per step; DINO works with small batches, and short runs need the steps."""
    accumulate: int = 1
    """Parts of a batch that go through the blocks one after another: less memory, the same result, slower."""
    checkpoint_activations: bool = False
    """Keep the blocks' inputs only, and compute the rest again in the backward pass: less memory, slower."""
    out_dim: int = 1024
    """Number of prototypes. Few images need few: 65,536 suit a million images, 1,024 some ten thousand."""
    head_hidden_dim: int = 512
    """Width of the projection head's hidden layers; 2,048 in the paper, for 384-dimensional features."""
    head_bottleneck_dim: int = 128
    """Width of the unit-length layer before the prototypes."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the matrices inside and AdamW for the rest: a small model learns faster with it."""
    muon_lr: float = 5.0
    """With muon: its learning rate as a multiple of lr."""
    lr: float = 1e-3
    """Peak learning rate, after a linear warm-up and before a cosine decay."""
    final_lr: float = 1e-6
    """Learning rate at the end."""
    warmup: float = 0.1
    """Share of the run during which the learning rate rises."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """At the start and at the end, along a cosine; matrices only."""
    layer_decay: float = 1.0
    """Each block's learning rate as a share of that of the block above it; 1 treats all alike, DINOv2 takes 0.9."""
    patch_embed_lr: float = 1.0
    """The patch embedding's learning rate as a share of what is left for the lowest layer; DINOv2 takes 0.2."""
    clip_grad: float = 3.0
    """Largest norm of one parameter's gradient; 0 turns clipping off."""
    teacher_momentum: float = 0.99
    """Share of itself that the teacher keeps per step, at the start; it rises to 1 along a cosine."""
    teacher_temperature: float = 0.04
    """Sharper is safer: above 0.07 training tends to collapse."""
    warmup_teacher_temperature: float = 0.04
    """Teacher temperature at the start."""
    temperature_warmup: float = 0.3
    """Share of the run during which the teacher's temperature moves to its final value."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    center_momentum: float = 0.9
    """Share of itself that the center keeps per step; 0.999 collapses (table 8 of the paper)."""
    freeze_last_layer: float = 0.02
    """Share of the run during which the prototypes stay as they are."""
    norm_last_layer: bool = True
    """Keep every prototype at unit length: steadier; without, small models learn a little more."""
    feature_weight: float = 1.0
    """Distillation: weight of following the teacher's features, beside its neighbours, which weigh 1."""
    pooling: str = "token"
    """What becomes the vector: "token" (class token) or "avg" (mean of the patch tokens)."""
    stripes: int = 1
    """With "avg": horizontal stripes whose means become the vector, side by side; what is learnt is their mean."""
    freeze_backbone: float = 0.0
    """Share of the run in which the heads alone learn: fresh heads would first undo what good weights know."""
    koleo_weight: float = 0.3
    """Weight of the KoLeo regulariser on the student's global class tokens; 0 is plain DINO. Short runs gain from it:
    k-NN accuracy after 51,000 images of Fashion-MNIST was 0.744 at 0.3 and 0.725 at 1 (untrained 0.648)."""
    teacher_normalisation: str = "centering"
    """What keeps the teacher from one answer to everything: "centering", or "sinkhorn", which wants large batches."""
    ibot_weight: float = 1.0
    """With dinov2: weight of the loss on hidden patches."""
    mask_probability: float = 0.5
    """With dinov2: share of the global crops of which patches are hidden from the student."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """With dinov2: share of the patches that is hidden in such a crop."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the student; 0.1 in the paper, for runs of many epochs."""
    uniform_drop_path: bool = False
    """The same stochastic depth in every block, as DINOv2 has it, instead of a rise from 0."""

    def model_facts(self) -> ModelFacts:
        """What the trained backbone's folder says of it: own models keep the whole short side where they crop."""
        return ModelFacts(
            arch=self.arch,
            arch_kwargs=self.arch_kwargs,
            image_size=self.image_size,
            fit=self.fit,
            mean=self.views.mean,
            std=self.views.std,
            pooling=self.pooling,
            stripes=self.stripes,
        )

    def settings(self) -> dict[str, Any]:
        """By the names that users set them by, flat."""
        flat = vars(self) | vars(self.views)
        del flat["views"], flat["global_size"]
        return flat | {"local_crops": flat.pop("n_local")}

    def facts(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


@dataclass(frozen=True)
class Reason:
    """One line of the table that is printed before training."""

    name: str
    value: str
    why: str


def recipe_from_facts(facts: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.facts` wrote."""
    known = {f.name: _as_tuple(facts[f.name]) for f in fields(Recipe) if f.name in facts}
    known["views"] = ViewSettings(**{name: _as_tuple(value) for name, value in facts["views"].items()})
    return Recipe(**known)


class _Choices:
    """Collects one value after another, the user's before ours, with the reason for each."""

    def __init__(self, given: Mapping[str, Any], presets: Mapping[str, tuple[Any, str]]) -> None:
        asked = {name: value for name, value in given.items() if value is not None}
        self.given = {name: value for name, (value, _) in presets.items()} | asked
        self._whys = {name: why for name, (_, why) in presets.items() if name not in asked}
        self.reasons: list[Reason] = []

    def decide(self, name: str, value: Any, why: str) -> Any:
        if self.given.get(name, "auto") != "auto":
            value, why = self.given[name], self._whys.get(name, "as you asked")
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        self.reasons.append(Reason(name.replace("_", " "), shown, why))
        return value


def plan_recipe(
    survey: Survey,
    *,
    accelerator: bool,
    overrides: Mapping[str, Any],
    presets: Mapping[str, tuple[Any, str]] = MappingProxyType({}),
    steps: int | None = None,
    epochs: float | None = None,
) -> tuple[Recipe, list[Reason]]:
    """The recipe for these images on this machine, and the reason for each choice.

    overrides: what the user set, by the names of `Recipe` and `ViewSettings` (local_crops for n_local); None and
    "auto" leave the choice here. presets: choices made elsewhere, with their reasons, that yield to the user's.
    accelerator: a GPU trains. steps, epochs: the length of the run, where it is known.
    What has no effect in the recipe has no reason either. Raises UsageError when sizes do not go together.
    """
    choices = _Choices(overrides, presets)
    decide = choices.decide
    side = min(survey.width, survey.height)
    by_name = "arch" in choices.given
    arch = decide("arch", BASE_ARCH, "timm's plain vision transformer, cut to size below")
    native_size, native_patch = _native(arch) if by_name else (None, None)
    image_size = decide("image_size", *(_image_size(side, accelerator) if native_size is None else (native_size, OWN)))
    patch_size = decide("patch_size", *(_patch_size(image_size) if native_patch is None else (native_patch, OWN)))
    _check_grid("--image-size", image_size, patch_size)
    local_size = decide("local_size", _local_size(image_size, patch_size), "near 3/7 of the image size, as in DINO")
    _check_grid("--local-size", local_size, patch_size)
    n_local = decide(
        "local_crops", *((8, "as in DINO") if accelerator else (4, "half of DINO's: a CPU sees more images"))
    )
    channels, mean, std = _channels(survey, choices)
    if survey.n_images < 2:
        raise UsageError("training needs two images or more: name more images")
    batch_size = decide("batch_size", *usual_batch_size(survey.n_images, accelerator))
    if not 2 <= batch_size <= survey.n_images:
        raise UsageError(
            f"--batch-size {batch_size} does not go with {survey.n_images} images: choose 2 to {survey.n_images}"
        )
    if epochs is not None:
        steps = round(epochs * survey.n_images / batch_size)
    method = decide("method", *_method(survey.n_images, steps))
    _check_word("--method", method, METHODS)
    out_dim = decide("out_dim", *_out_dim(survey.n_images))
    small = not by_name and not (accelerator and image_size >= 96)
    lr = decide("lr", *(_own_lr(batch_size) if small else _paper_lr(batch_size)))
    if small and method == "dino":
        optimizer = decide("optimizer", "muon", "a small model learns faster with it than with adamw")
        pooling = decide("pooling", "avg", "the mean of all patches; a small model is slow to teach a class token")
        stripes = decide("stripes", *(_stripes(image_size // patch_size) if pooling == "avg" else (1, "no mean")))
    else:
        optimizer, pooling, stripes = Recipe.optimizer, Recipe.pooling, Recipe.stripes
    momentum = Recipe.teacher_momentum if method == "dinov2" else decide("teacher_momentum", *momentum_for(steps))
    usual = {
        name: decide(name, getattr(Recipe, name), why)
        for name, why in USUAL.items()
        if method == "dino" or name in USUAL_OF_ALL
    }
    arch_kwargs: dict[str, Any] = {"img_size": image_size}
    if patch_size != native_patch:
        arch_kwargs["patch_size"] = patch_size
    if channels != 3:
        arch_kwargs["in_chans"] = channels
    sizes = dict(arch_kwargs)
    if not by_name:
        dim, depth = (128, 4) if small else (192, 12) if survey.n_images < FEW_IMAGES else (384, 12)
        arch_kwargs |= {"embed_dim": dim, "depth": depth, "num_heads": dim // 32 if small else dim // 64}
        why = "small squares and a processor's minutes" if small else "enough images and a GPU"
        choices.reasons.append(Reason("width × depth", f"{dim} × {depth}", why))
    if "arch_kwargs" in choices.given:
        asked = choices.decide("arch_kwargs", None, "")
        if "patch_size" in asked:
            sizes["patch_size"] = patch_size
        arch_kwargs |= asked | sizes  # sizes asked for by their own names hold
    if pooling == "avg" and not by_name:
        arch_kwargs.setdefault("class_token", False)
    views = ViewSettings(global_size=image_size, local_size=local_size, n_local=n_local, mean=mean, std=std)
    if image_size <= TINY:
        views = replace(
            views,
            global_scale=decide("global_scale", (0.5, 1.0), f"a twentieth of {side} px is no picture any more"),
            local_scale=decide("local_scale", (0.15, 0.5), "small crops keep some of their pixels"),
            solarize=decide("solarize", (0.0, 0.0, 0.0), "tiny pictures have little but their tones"),
        )
    elif method != "dinov2":
        views = replace(
            views,
            global_scale=decide("global_scale", views.global_scale, "as in DINO"),
            local_scale=decide("local_scale", views.local_scale, "as in DINO"),
        )
    recipe = Recipe(
        arch=arch,
        arch_kwargs=arch_kwargs,
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        views=views,
        method=method,
        batch_size=batch_size,
        out_dim=out_dim,
        optimizer=optimizer,
        lr=lr,
        teacher_momentum=momentum,
        pooling=pooling,
        stripes=stripes,
        **usual,
    )
    if not small:
        recipe = replace(recipe, head_hidden_dim=2048, head_bottleneck_dim=256, drop_path_rate=0.1)
    if method == "dinov2":
        recipe = _as_dinov2(recipe, choices, registers=not by_name)
    recipe = _with_the_rest(recipe, choices)
    _check_word("--set teacher_normalisation", recipe.teacher_normalisation, NORMALISATIONS)
    _check_word("--set optimizer", recipe.optimizer, OPTIMIZERS)
    _check_word("--fit", recipe.fit, FITS)
    if overrides.get("pooling") is not None:  # a start may pool in yet another way
        _check_word("--set pooling", recipe.pooling, POOLINGS)
    if recipe.stripes != 1:
        _check_stripes(recipe)
    idle = {name.replace("_", " ") for name in unused(recipe.settings())}
    return recipe, [reason for reason in choices.reasons if reason.name not in idle]


def _as_dinov2(recipe: Recipe, choices: "_Choices", *, registers: bool) -> Recipe:
    """What DINOv2 does otherwise and suits fewer images.

    It also has a learning rate for batches of thousands, a drop path of 0.3, LayerScale (arch_kwargs' init_values) and
    gradients clipped by the norm of a whole network: these stay as they are here.
    """
    settings: dict[str, tuple[Any, str]] = {
        "koleo_weight": (0.1, "as in DINOv2"),
        "layer_decay": (0.9, "as in DINOv2: lower blocks learn slower"),
        "patch_embed_lr": (0.2, "as in DINOv2"),
        "teacher_momentum": (0.992, "as in DINOv2"),
        "teacher_temperature": (0.07, "as in DINOv2, after a rise from 0.04"),
        "norm_last_layer": (False, "as in DINOv2"),
        "uniform_drop_path": (True, "as in DINOv2"),
        "teacher_normalisation": ("centering", "sinkhorn wants larger batches than this"),
    }
    views: dict[str, tuple[Any, str]] = {}
    if recipe.image_size > TINY:  # those of tiny images are decided
        views = {
            "global_scale": ((0.32, 1.0), "as in DINOv2"),
            "local_scale": ((0.05, 0.32), "as in DINOv2"),
        }
    if recipe.batch_size >= SINKHORN_BATCH:
        settings["teacher_normalisation"] = ("sinkhorn", "as in DINOv2's long runs")
    chosen = {name: choices.decide(name, *value) for name, value in settings.items()}
    of_views = {name: choices.decide(name, *value) for name, value in views.items()}
    n_patches = (recipe.image_size // recipe.patch_size) ** 2
    arch_kwargs = recipe.arch_kwargs
    if registers and n_patches >= REGISTER_PATCHES and "reg_tokens" not in arch_kwargs:
        arch_kwargs = arch_kwargs | {"reg_tokens": 4}
        why = "keep attention maps clean (arXiv 2309.16588)"
        choices.reasons.append(Reason("register tokens", "4", why))
    views_settings = replace(recipe.views, **of_views)
    return replace(recipe, views=views_settings, arch_kwargs=arch_kwargs, **chosen)


def _with_the_rest(recipe: Recipe, choices: "_Choices") -> Recipe:
    """What the user set beyond the choices that were made above."""
    decided = {reason.name for reason in choices.reasons}
    rest = {name: value for name, value in choices.given.items() if name.replace("_", " ") not in decided}
    for name, value in rest.items():
        choices.decide(name, value, "")
    of_views = {f.name for f in fields(ViewSettings)}
    views = replace(recipe.views, **{name: value for name, value in rest.items() if name in of_views})
    return replace(recipe, views=views, **{name: value for name, value in rest.items() if name not in of_views})


def _channels(survey: Survey, choices: "_Choices") -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Their number, mean and std: ImageNet's for RGB, else what the images have."""
    if "channels" not in choices.given or choices.given["channels"] == 3:
        views = ViewSettings()
        n, mean, std = 3, views.mean, views.std
    else:
        n = choices.decide("channels", None, "")
        mean = choices.decide("mean", survey.mean, "measured, per channel")
        std = choices.decide("std", survey.std, "measured, per channel")
    for name in ("mean", "std"):
        if len(choices.given.get(name, mean)) != n:
            raise UsageError(f"{name} {choices.given[name]} does not go with {n} channels: give {n} numbers")
    return n, mean, std


USUAL = {
    "teacher_temperature": "sharp from the start: it tends to collapse above 0.07",
    "student_temperature": "as in DINO",
    "warmup": "that share of the run, however long: the learning rate rises, then falls along a cosine",
    "weight_decay": "as in DINO, from the start to the end",
    "koleo_weight": "keeps features apart; short runs gain from it",
}
"""What dino takes as it is, and why."""
USUAL_OF_ALL = ("warmup", "weight_decay")
"""Of these, what every method takes so."""
OWN = "the architecture's own"
TINY = 40
"""Pixels a side; up to here crops are gentler. After 40,000 images of Fashion-MNIST, k-NN accuracy was 0.785 to 0.807
with the gentler crops and 0.776 to 0.785 with DINO's, in batches of 64 and 32; runs of near-equal settings differed by
0.02."""
FEW_IMAGES = 20_000
SINKHORN_BATCH = 1024
"""Below it balanced assignments are noise: with small batches the loss of dinov3 stayed at ln(out_dim)."""
REGISTER_PATCHES = 64
"""Smaller grids have no patches to spare as registers, which is what these are for."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _native(arch: str) -> tuple[int, int]:
    """timm's image and patch size of an architecture."""
    import torch

    with torch.device("meta"):
        patches: Any = create_vit(ModelFacts(arch=arch, arch_kwargs={}, image_size=0)).patch_embed
    return int(patches.img_size[0]), int(patches.patch_size[0])


def _image_size(side: int, accelerator: bool) -> tuple[int, str]:
    """Never more pixels than the images have; fewer on a CPU, where time grows with their number."""
    steps, largest = ((32, 64, 96, 128, 160, 224), 224) if accelerator else ((32, 64, 96, 128), 128)
    if side <= TINY:
        size = max(8, side - side % 4)
        return size, f"all of their {side} px"
    size = max(size for size in steps if size <= max(side, 32))
    return size, f"of their {side} px" if size < largest else "more would cost more time than it gives"


def _patch_size(image_size: int) -> tuple[int, str]:
    """Patches that cut small squares into 4×4 and larger ones into about 8×8, or 14×14 at 224 px."""
    if image_size <= TINY:
        patch = image_size // 4
    elif image_size <= 128:
        patch = image_size // 8
    else:
        patch = 16
    n = image_size // patch
    return patch, f"{n}×{n} of them in a square"


def _stripes(n_rows: int) -> tuple[int, str]:
    """Four, or the next fewer that cut the rows into equal parts."""
    most = max(n for n in (1, 2, 3, 4) if n_rows % n == 0)
    why = "keep what is above what; take 1 for pictures without a right way up"
    return most, why if most > 1 else f"{n_rows} rows of patches cannot be cut equally"


def _local_size(image_size: int, patch_size: int) -> int:
    return max(1, round(image_size * 3 / 7 / patch_size)) * patch_size


def _check_grid(option: str, size: int, patch_size: int) -> None:
    if size < patch_size or size % patch_size:
        nearest = max(1, round(size / patch_size)) * patch_size
        raise UsageError(f"{size} px cannot be cut into patches of {patch_size} px. Try {option} {nearest}")


def _check_stripes(recipe: Recipe) -> None:
    n_rows = recipe.image_size // recipe.patch_size
    fitting = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
    if recipe.stripes not in fitting:
        raise UsageError(
            f"{n_rows} rows of patches cannot be cut into {recipe.stripes} stripes. "
            f"Try --set stripes={min(fitting, key=lambda n: abs(n - recipe.stripes))}"
        )
    if recipe.pooling != "avg":
        raise UsageError(f"stripes are of average pooling, not {recipe.pooling}: leave --set stripes out")


def _check_word(option: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UsageError(f"{option} {word!r} is none of {', '.join(known)}. Choose one of these")


def _method(n_images: int, steps: int | None) -> tuple[str, str]:
    many = f"{DINOV2_IMAGES:,} images and {DINOV2_STEPS:,} steps"
    if n_images < DINOV2_IMAGES:
        return "dino", f"learns more from {n_images:,} images; dinov2 pays from {many} on"
    if steps is None:
        return "dino", f"dinov2 pays from {many} on: ask for it if time allows them"
    if steps < DINOV2_STEPS:
        return "dino", f"learns more in {steps:,} steps; dinov2 pays from {many} on"
    return "dinov2", f"{n_images:,} images and {steps:,} steps are enough for it"


def usual_batch_size(n_images: int, accelerator: bool) -> tuple[int, str]:
    """What suits so many images, and why."""
    if accelerator and n_images >= 256:
        return 256, "fills a GPU; DINO works with small batches"
    if not accelerator and n_images >= 64:
        return 64, "more steps in the same time; DINO works with small batches"
    return n_images, "all the images there are"


def _out_dim(n_images: int) -> tuple[int, str]:
    for limit, out_dim in ((50_000, 1024), (200_000, 4096), (1_000_000, 16_384)):
        if n_images < limit:
            return out_dim, f"enough for {n_images} images, and cheap"
    return 65_536, "as in DINO, for a million images or more"


def usual_lr(batch_size: int) -> float:
    """What suits a small model, by the square root of the batch size."""
    return SMALL_LR * math.sqrt(batch_size / 64)


def _own_lr(batch_size: int) -> tuple[float, str]:
    return usual_lr(batch_size), f"{SMALL_LR:g} at 64 images, for a small model"


def _paper_lr(batch_size: int) -> tuple[float, str]:
    return 5e-4 * batch_size / 256, "5e-4 per 256 images, as in DINO"


SMALL_LR = 1e-3


def momentum_for(steps: int | None) -> tuple[float, str]:
    """Half of what the teacher was is gone after a twentieth of a short run, or after 69 steps of a longer one."""
    longest = 0.99
    if steps is None or steps == 0:
        return longest, "the teacher's half-life is 69 steps"
    momentum = min(longest, max(0.9, 1 - math.log(2) / (HALF_LIFE * steps)))
    return round(momentum, 4), f"the teacher's half-life is {math.log(2) / (1 - momentum):.0f} of {steps} steps"


HALF_LIFE = 0.05
"""Of a short run's steps. At 625 steps 0.98 (34 steps) gave 0.785 k-NN accuracy on Fashion-MNIST, 0.99 gave 0.768; one
run each, and runs of near-equal settings differed by 0.02: a hint, no more."""
