"""DINO, self-distillation with no labels: head, loss and teacher update of arXiv 2104.14294, and nothing else."""

from collections.abc import Callable

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
        logits = student.float() / self.student_temperature
        targets = self.assignments(teacher, teacher_temperature=teacher_temperature)  # [2, batch, out_dim]
        # −Σ_k t_k log softmax(s)_k = logsumexp(s) − Σ_k t_k s_k, because the t_k sum to one: no [n_crops, batch,
        # out_dim] log-softmax is ever stored.
        agreement = torch.einsum("qbk,vbk->qvb", targets, logits)  # [2, n_crops, batch]
        cross_entropy = (torch.logsumexp(logits, dim=-1)[None] - agreement).mean(dim=-1)  # [2, n_crops]
        different = ~torch.eye(2, len(student), dtype=torch.bool, device=student.device)
        loss = (cross_entropy * different).sum() / different.sum()
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


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, over all parameters at once."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
