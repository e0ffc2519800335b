"""DINO, self-distillation with no labels: head, loss and teacher update of arXiv 2104.14294, and nothing else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DINOHead(nn.Module):
    """Features [n, in_dim] → prototype logits [n, out_dim]: three-layer MLP, unit bottleneck, weight-normed linear.

    norm_last_layer: keep every prototype at unit length, which is what makes training stable (section 3.1, appendix).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = WeightNormLinear(bottleneck_dim, out_dim, trainable_norm=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = functional.normalize(self.mlp(features).float(), dim=-1)  # [n, bottleneck_dim]
        return self.prototypes(bottleneck)


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have the length `weight_g`, 1 unless it may be trained."""

    def __init__(self, in_dim: int, out_dim: int, *, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(out_dim, in_dim), std=0.02))
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=trainable_norm)

    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(features, functional.normalize(self.weight_v, dim=1) * self.weight_g)


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centered, sharpened assignment and the student's, over pairs of crops."""

    center: Tensor
    across: Callable[[Tensor], Tensor] | None = None
    """Where the batch is shared by several processes: a tensor's mean over them."""

    def __init__(self, out_dim: int, *, student_temperature: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(out_dim))

    def forward(self, student: Tensor, teacher: Tensor, *, teacher_temperature: float) -> Tensor:
        """Mean loss over pairs of different crops (eq. 3); then the center moves to the teacher's mean (eq. 4).

        student: logits [n_crops, batch, out_dim], the two global crops first. teacher: logits [2, batch, out_dim].
        """
        targets = self.assignments(teacher, teacher_temperature=teacher_temperature)  # [2, batch, out_dim]
        loss = _CrossEntropy.apply(student, targets, self.student_temperature)
        self.update_center(teacher)
        return loss

    @torch.no_grad()
    def assignments(self, teacher: Tensor, *, teacher_temperature: float) -> Tensor:
        """Teacher logits [..., out_dim] → probabilities over prototypes, centered, then sharpened."""
        return torch.softmax((teacher.float() - self.center) / teacher_temperature, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        mean = teacher.float().flatten(0, -2).mean(dim=0)
        if self.across is not None:
            mean = self.across(mean)
        self.center.lerp_(mean, 1.0 - self.center_momentum)


class _CrossEntropy(torch.autograd.Function):
    """Mean over pairs of different crops, and its gradient in the same pass.

    One crop at a time, so that the float32 copies on the way are a crop's and stay in a processor's cache; kept for the
    way back is the gradient alone, as large as the logits and of their type.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """student: logits [n_crops, batch, out_dim]. targets: probabilities [2, batch, out_dim]."""
        n_crops, batch, _ = student.shape
        share = 1.0 / (batch * (2 * n_crops - 2))  # of one image in one pair
        of_both = targets.sum(dim=0)
        gradient = torch.empty_like(student)
        loss = targets.new_zeros(())
        for crop, logits in enumerate(student):
            # a global crop is compared with the other one, a local crop with both
            target, n_teachers = (targets[1 - crop], 1) if crop < 2 else (of_both, 2)
            log_p = torch.log_softmax(logits.float() / temperature, dim=-1)  # [batch, out_dim]
            loss -= torch.dot(target.flatten(), log_p.flatten()) * share
            # d(−Σ t log p) / d logits = (n_teachers · p − Σ t) / temperature
            gradient[crop] = log_p.exp_().mul_(n_teachers).sub_(target).mul_(share / temperature)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss[0], None, None


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, over all parameters at once."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
