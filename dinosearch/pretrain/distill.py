"""Distillation: a small student learns what a frozen, stronger model, its mentor, makes of the user's images.

The head of a released teacher is not released, so its assignments cannot be learnt; its features can. Two terms:

- neighbours: within a batch, the student's cosine similarities, as a softmax over the other images, follow the
  mentor's. It acts on the exported vectors themselves (on their mean, if the student has stripes) and needs no
  projection, so what it shapes is the very order in which a search will rank images (CompRess, arXiv 2010.14713; the
  batch is the set of anchors, so that a resumed run has no queue to restore). A softmax ignores what all similarities
  share, as the mentor's common mean.
- features: a linear projection of the student's class token and patch tokens follows the mentor's tokens, whitened
  by a layer norm without parameters, under a smooth L1 loss (arXiv 2205.14141, section 3.2). It is dense, and gives
  the patch tokens their meaning.

Both see the same crops with the same distortions: a mentor that sees something else teaches noise (arXiv
2106.05237). The mentor gets them at its own size, mean and standard deviation. There are no local crops. What is
exported is the running average of the student, as in DINOv2's distillation (arXiv 2304.07193, section 5).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinosearch.errors import DinosearchError
from dinosearch.pretrain.net import Net
from dinosearch.pretrain.objective import Forwarded, Objective, Terms
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.views import ViewSettings
from dinosearch.vit.folder import ModelFacts, ModelFolder, find_by_fingerprint, n_features
from dinosearch.vit.stripes import whole_mean

BETA = 2.0
"""Where smooth L1 turns from square to line (arXiv 2205.14141)."""


@dataclass(frozen=True)
class Mentor:
    """The frozen model that is learnt from; `teacher` is the average of the student, as everywhere in this package.

    No module, so that its weights are no part of the run's state.
    """

    vit: nn.Module
    facts: ModelFacts

    def to(self, device: torch.device) -> "Mentor":
        return Mentor(self.vit.to(device).requires_grad_(False).eval(), self.facts)


class Distillation(Objective):
    """Neighbours and features of the mentor."""

    def __init__(self, recipe: Recipe, mentor: Mentor) -> None:
        super().__init__()
        self.recipe = recipe
        # a function and no module, so that `state_dict` passes it by
        self._mentor = _seeing(mentor.vit)
        self._mentor_facts = mentor.facts
        self._mentor_dim = n_features(mentor.vit)

    @property
    def view_settings(self) -> ViewSettings:
        size = crop_size(self.recipe.image_size, self._mentor_facts)
        return replace(self.recipe.views, global_size=size, n_local=0)

    def heads(self, dim: int) -> dict[str, nn.Module]:
        return {"head": nn.Linear(dim, self._mentor_dim), "patch_head": nn.Linear(dim, self._mentor_dim)}

    def forward_crops(self, student: Net, teacher: Net, *views: Tensor) -> Forwarded:  # noqa: ARG002 - the average waits
        crops = views[0].flatten(0, 1)
        with torch.no_grad():
            vectors, wanted, wanted_patches = self._mentor(as_seen_by(self._mentor_facts, crops, self.recipe))
        features, patches = student.encode(resized(crops, self.recipe.image_size))
        n_batch = views[0].shape[1]
        return {
            "teacher_features": features.detach().float(),
            "teacher_logits": features.detach().float().unflatten(0, (2, n_batch)),  # see `assignments`
            "features": features.float(),
            "projected": student.head(features).float(),
            "projected_patches": student.patch_head(patches).float(),
            "wanted_vectors": vectors.float(),
            "wanted": wanted.float(),
            "wanted_patches": on_grid(wanted_patches.float(), math.isqrt(patches.shape[1])),
        }

    def terms(self, forwarded: Forwarded, *, done: float) -> Terms:
        temperature = self.teacher_temperature(done)
        features, wanted = (  # of all processes: who is near whom depends on all of a batch
            self.team.gather(forwarded[name].unflatten(0, (2, -1)), dim=1).flatten(0, 1)
            for name in ("features", "wanted_vectors")
        )
        parts = {
            "neighbours": neighbour_loss(features, wanted, temperature=temperature),
            "class": feature_loss(forwarded["projected"], forwarded["wanted"]),
            "patch": feature_loss(forwarded["projected_patches"], forwarded["wanted_patches"]),
        }
        total = parts["neighbours"] + self.recipe.feature_weight * (parts["class"] + parts["patch"])
        return Terms(total, parts, temperature)

    def assignments(self, teacher_logits: Tensor, *, teacher_temperature: float) -> Tensor:
        """To the other images of the batch, instead of prototypes: collapse looks alike.

        teacher_logits: features [2 × batch, dim] of all processes, whose neighbours are chosen among the whole batch.
        """
        near = similarities(teacher_logits.unflatten(0, (2, -1))).flatten(0, 1)
        return torch.softmax(near / teacher_temperature, dim=-1)

    @property
    def center(self) -> Tensor:
        return torch.zeros(1)


def _seeing(vit: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Images → the mentor's vectors, the same without stripes [n, dim], patch tokens [n, n_patches, dim]."""

    def see(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = vit.forward_features(images)
        return vit.forward_head(tokens), whole_mean(vit, tokens), tokens[:, vit.num_prefix_tokens :]

    return see


def neighbour_loss(features: Tensor, wanted: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy between the mentor's and the student's softmax over the other crops of the same view.

    features: the student's [2 × batch, dim]. wanted: the mentor's [2 × batch, mentor_dim]. ln(batch − 1) is a student
    that tells no images apart. The other view of an image is left out: it would take all of the probability.
    """
    found, target = (similarities(x.unflatten(0, (2, -1))) / temperature for x in (features, wanted))
    p = torch.softmax(target, dim=-1)  # [2, batch, batch], 0 on the diagonal
    agreement = (p * found.masked_fill(found.isneginf(), 0.0)).sum(dim=-1)
    return (torch.logsumexp(found, dim=-1) - agreement).mean()


def similarities(features: Tensor) -> Tensor:
    """[2, batch, dim] → cosine similarities within each view [2, batch, batch], −∞ of a crop to itself."""
    unit = functional.normalize(features, dim=-1)
    itself = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    return (unit @ unit.transpose(1, 2)).masked_fill(itself, -math.inf)


def feature_loss(projected: Tensor, wanted: Tensor) -> Tensor:
    """Smooth L1 to the whitened features of the mentor; both [..., mentor_dim]."""
    return functional.smooth_l1_loss(projected, functional.layer_norm(wanted, wanted.shape[-1:]), beta=BETA)


def as_seen_by(facts: ModelFacts, crops: Tensor, recipe: Recipe) -> Tensor:
    """Crops [n, 3, size, size], normalised by the recipe → at the size and normalisation of another model."""
    mean, std, theirs, their_std = (
        crops.new_tensor(values)[:, None, None]
        for values in (recipe.views.mean, recipe.views.std, facts.mean, facts.std)
    )
    return resized((crops * std + mean - theirs) / their_std, facts.image_size)


def crop_size(image_size: int, mentor: ModelFacts) -> int:
    """Side of the crops, from which those of student and mentor are shrunk: the larger of both, in pixels."""
    return max(image_size, mentor.image_size)


def find_mentor(fingerprint: str, *, models: Path) -> ModelFolder:
    """The mentor that an interrupted run learnt from. Raises DinosearchError when it is gone."""
    model = find_by_fingerprint(fingerprint, models=models)
    if model is None:
        raise DinosearchError(
            f"{models}/ has no model {fingerprint}, which this run learns from. Put it back to resume"
        )
    return model


def resized(crops: Tensor, size: int) -> Tensor:
    if crops.shape[-1] == size:
        return crops
    return functional.interpolate(crops, size=(size, size), mode="bicubic", antialias=True)


def on_grid(patches: Tensor, side: int) -> Tensor:
    """Patch tokens [n, s², dim] of one square grid → of another [n, side², dim], by antialiased interpolation."""
    grid = patches.transpose(1, 2).unflatten(2, (math.isqrt(patches.shape[1]), -1))  # [n, dim, s, s]
    if grid.shape[-1] != side:
        grid = functional.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)
    return grid.flatten(2).transpose(1, 2)
