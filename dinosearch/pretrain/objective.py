"""What a student is asked to learn: one class per method behind one seam. Knows no optimizer and draws no crops.

A new method is a class with the members of `Objective`, and a name in `make_objective`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinosearch.pretrain.dino import DINOHead, DINOLoss
from dinosearch.pretrain.dinov2 import IBOTLoss, SinkhornDINOLoss, koleo_loss
from dinosearch.pretrain.distributed import ALONE, Team
from dinosearch.pretrain.masking import block_masks, masked_places, most_masked, patches_to_mask
from dinosearch.pretrain.net import MaskToken, Net
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.schedules import linear_then_constant
from dinosearch.pretrain.views import ViewSettings

Forwarded = dict[str, Tensor]
"""What the networks made of a batch. Every method gives `teacher_logits` [2, batch, out_dim] and
`teacher_features` [2 × batch, dim], of the global crops; the rest is its own."""


@dataclass(frozen=True)
class Terms:
    """The loss of one step."""

    total: Tensor
    """What is minimised, a scalar."""
    parts: dict[str, Tensor]
    """By name, each without its weight. The first is the one that is reported, and compared with ln(out_dim)."""
    teacher_temperature: float


class Objective(nn.Module, ABC):
    """A method: heads, forward pass and loss. Its buffers are part of the run's state."""

    recipe: Recipe
    team: Team = ALONE
    """The processes that share each batch: what is a mean over the batch has to be one over all of them."""

    @property
    def view_settings(self) -> ViewSettings:
        """The crops that a step is to make."""
        return self.recipe.views

    @abstractmethod
    def heads(self, dim: int) -> dict[str, nn.Module]:
        """Fresh heads for a backbone with features of length `dim`, by the name they get in `Net`."""

    def extend(self, views: tuple[Tensor, ...], *, generator: torch.Generator) -> tuple[Tensor, ...]:  # noqa: ARG002 - for methods that draw
        """The crops, and behind them what else a method draws for a step (masks), on the crops' device."""
        return views

    @abstractmethod
    def forward_crops(self, student: Net, teacher: Net, *views: Tensor) -> Forwarded:
        """Crops [2, batch, 3, size, size], [n_local, batch, 3, …] and what `extend` added, through both networks.

        This part is compiled.
        """

    @abstractmethod
    def terms(self, forwarded: Forwarded, *, done: float) -> Terms:
        """The loss at a share `done` of the run; moves what the method keeps from step to step (a center)."""

    @abstractmethod
    def assignments(self, teacher_logits: Tensor, *, teacher_temperature: float) -> Tensor:
        """Teacher logits [n, out_dim] → probabilities, for looks at the teacher's health."""

    @property
    @abstractmethod
    def center(self) -> Tensor:
        """[out_dim], for looks at the teacher's health; zeros where a method has none."""

    def adopt(self, recipe: Recipe) -> None:
        """Go on by another recipe for the same architecture."""
        self.recipe = recipe

    def join(self, team: Team) -> None:
        """Share every batch with other processes from now on."""
        self.team = team

    def teacher_temperature(self, done: float) -> float:
        recipe = self.recipe
        return linear_then_constant(
            recipe.warmup_teacher_temperature, recipe.teacher_temperature, done, warmup=recipe.temperature_warmup
        )


def make_objective(recipe: Recipe) -> Objective:
    """The objective that `recipe.method` names."""
    return {"dino": DINO, "dinov2": DINOv2}[recipe.method](recipe)


class DINO(Objective):
    """Cross-entropy between assignments of crops (arXiv 2104.14294), and KoLeo where the recipe weighs it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        kind = SinkhornDINOLoss if recipe.teacher_normalisation == "sinkhorn" else DINOLoss
        self.dino_loss = kind(
            recipe.out_dim, student_temperature=recipe.student_temperature, center_momentum=recipe.center_momentum
        )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        return {"head": make_head(dim, self.recipe)}

    def forward_crops(self, student: Net, teacher: Net, *views: Tensor) -> Forwarded:
        global_views, _ = views
        with torch.no_grad():
            teacher_features = teacher.encode_sizes(global_views.flatten(0, 1))
            teacher_logits = teacher.head(teacher_features)
        features = student.encode_sizes(*(crops.flatten(0, 1) for crops in views if len(crops)))
        return _of_crops(teacher_features, teacher_logits, features, student.head(features))

    def terms(self, forwarded: Forwarded, *, done: float) -> Terms:
        temperature = self.teacher_temperature(done)
        teacher_logits = forwarded["teacher_logits"]
        loss = self.dino_loss(forwarded["logits"], teacher_logits, teacher_temperature=temperature)
        parts, total = {"dino": loss}, loss
        if self.recipe.koleo_weight > 0:
            n_globals = len(forwarded["teacher_features"])
            views = forwarded["features"][:n_globals].chunk(2)  # within a view: crops of one image may be alike
            parts["koleo"] = sum(koleo_loss(self.team.gather(view)) for view in views)
            total = total + self.recipe.koleo_weight * parts["koleo"]
        return Terms(total, parts, temperature)

    def assignments(self, teacher_logits: Tensor, *, teacher_temperature: float) -> Tensor:
        return self.dino_loss.assignments(teacher_logits, teacher_temperature=teacher_temperature)

    @property
    def center(self) -> Tensor:
        return self.dino_loss.center

    def join(self, team: Team) -> None:
        super().join(team)
        self.dino_loss.across = team.mean

    def adopt(self, recipe: Recipe) -> None:
        super().adopt(recipe)
        self.dino_loss.center_momentum = recipe.center_momentum
        self.dino_loss.student_temperature = recipe.student_temperature


class DINOv2(DINO):
    """DINO, and the student's guess of patches that it does not see, through heads of their own (arXiv 2304.07193)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.ibot_loss = IBOTLoss(
            recipe.out_dim,
            student_temperature=recipe.student_temperature,
            center_momentum=recipe.center_momentum,
            sinkhorn=recipe.teacher_normalisation == "sinkhorn",
        )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        return super().heads(dim) | {"patch_head": make_head(dim, self.recipe), "mask_token": MaskToken(dim)}

    def extend(self, views: tuple[Tensor, ...], *, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Masks [2 × batch, rows, columns], indices of hidden patches among all, and their weights."""
        seeds = torch.randint(2**62, (self.team.size,), generator=generator)
        generator = torch.Generator().manual_seed(int(seeds[self.team.rank]))  # crops are shared, masks are one's own
        recipe, device = self.recipe, views[0].device
        n_images, grid = 2 * views[0].shape[1], views[0].shape[-1] // recipe.patch_size
        limits: Any = {"probability": recipe.mask_probability, "ratio": recipe.mask_ratio}
        counts = patches_to_mask(n_images, grid * grid, **limits, generator=generator)
        masks = block_masks(counts, grid, generator=generator)
        places = masked_places(masks, size=most_masked(n_images, grid * grid, **limits))
        return (*views, *(tensor.to(device, non_blocking=True) for tensor in (masks, *places)))

    def forward_crops(self, student: Net, teacher: Net, *views: Tensor) -> Forwarded:
        global_views, local_views, masks, indices, weights = views
        with torch.no_grad():
            teacher_features, patches = teacher.encode(global_views.flatten(0, 1))
            teacher_logits = teacher.head(teacher_features)
            teacher_patch_logits = teacher.patch_head(patches.flatten(0, 1)[indices])
        features, patches = student.encode(global_views.flatten(0, 1), masks)
        patch_logits = student.patch_head(patches.flatten(0, 1)[indices])
        if len(local_views):
            features = torch.cat([features, student.encode_sizes(local_views.flatten(0, 1))])
        return _of_crops(teacher_features, teacher_logits, features, student.head(features)) | {
            "teacher_patch_logits": teacher_patch_logits.float(),
            "patch_logits": patch_logits.float(),
            "patch_weights": weights,
        }

    def terms(self, forwarded: Forwarded, *, done: float) -> Terms:
        terms = super().terms(forwarded, done=done)
        loss = self.ibot_loss(
            forwarded["patch_logits"],
            forwarded["teacher_patch_logits"],
            forwarded["patch_weights"],
            n_images=len(forwarded["teacher_features"]),
            teacher_temperature=terms.teacher_temperature,
        )
        total = terms.total + self.recipe.ibot_weight * loss
        return Terms(total, terms.parts | {"ibot": loss}, terms.teacher_temperature)

    def join(self, team: Team) -> None:
        super().join(team)
        self.ibot_loss.across = team.mean

    def adopt(self, recipe: Recipe) -> None:
        super().adopt(recipe)
        self.ibot_loss.center_momentum = recipe.center_momentum
        self.ibot_loss.student_temperature = recipe.student_temperature


def _of_crops(teacher_features: Tensor, teacher_logits: Tensor, features: Tensor, logits: Tensor) -> Forwarded:
    batch = len(teacher_features) // 2
    return {
        "teacher_features": teacher_features.float(),
        "teacher_logits": teacher_logits.float().unflatten(0, (2, batch)),
        "features": features.float(),
        "logits": logits.unflatten(0, (-1, batch)),
    }


def make_head(dim: int, recipe: Recipe) -> DINOHead:
    return DINOHead(
        dim,
        recipe.out_dim,
        hidden_dim=recipe.head_hidden_dim,
        bottleneck_dim=recipe.head_bottleneck_dim,
        norm_last_layer=recipe.norm_last_layer,
    )
