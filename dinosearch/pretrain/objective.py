"""What a student is asked to learn: one class per method behind one seam. Knows no optimizer and draws no crops.

A new method is a class with the members of `Objective`, and a name in `make_objective`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinosearch.pretrain.dino import DINOHead, DINOLoss
from dinosearch.pretrain.dinov2 import koleo_loss
from dinosearch.pretrain.distributed import ALONE, Team
from dinosearch.pretrain.net import Net
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.schedules import linear_then_constant

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
    return {"dino": DINO}[recipe.method](recipe)


class DINO(Objective):
    """Cross-entropy between assignments of crops (arXiv 2104.14294), and KoLeo where the recipe weighs it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.dino_loss = DINOLoss(
            recipe.out_dim, student_temperature=recipe.student_temperature, center_momentum=recipe.center_momentum
        )

    def heads(self, dim: int) -> dict[str, nn.Module]:
        return {"head": make_head(dim, self.recipe)}

    def forward_crops(self, student: Net, teacher: Net, *views: Tensor) -> Forwarded:
        global_views, local_views = views
        with torch.no_grad():
            teacher_features = teacher.backbone(global_views.flatten(0, 1))
            teacher_logits = teacher.head(teacher_features)
        features = student.backbone(global_views.flatten(0, 1))
        if len(local_views):
            features = torch.cat([features, student.backbone(local_views.flatten(0, 1))])
        batch = global_views.shape[1]
        return {
            "teacher_features": teacher_features.float(),
            "teacher_logits": teacher_logits.float().unflatten(0, (2, batch)),
            "features": features.float(),
            "logits": student.head(features).float().unflatten(0, (-1, batch)),
        }

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


def make_head(dim: int, recipe: Recipe) -> DINOHead:
    return DINOHead(
        dim,
        recipe.out_dim,
        hidden_dim=recipe.head_hidden_dim,
        bottleneck_dim=recipe.head_bottleneck_dim,
        norm_last_layer=recipe.norm_last_layer,
    )
