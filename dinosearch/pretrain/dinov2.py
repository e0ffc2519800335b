"""What DINOv2 (arXiv 2304.07193) adds to DINO: the masked-patch loss of iBOT, KoLeo and Sinkhorn-Knopp."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinosearch.pretrain.dino import DINOLoss

SINKHORN_ITERATIONS = 3


class IBOTLoss(nn.Module):
    """Cross-entropy between the teacher's assignment of a patch and that of a student who does not see the patch.

    Source: iBOT, arXiv 2111.07832, eq. 2, with the weights of DINOv2's ibot_patch_loss.py.
    """

    center: Tensor

    def __init__(
        self, out_dim: int, *, student_temperature: float = 0.1, center_momentum: float = 0.9, sinkhorn: bool = False
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.sinkhorn = sinkhorn
        self.register_buffer("center", torch.zeros(out_dim))

    def forward(
        self, student: Tensor, teacher: Tensor, weights: Tensor, *, n_images: int, teacher_temperature: float
    ) -> Tensor:
        """Weighted sum over hidden patches, per image of the batch; then the center moves to the teacher's mean.

        student, teacher: logits [n_patches, out_dim] of the same patches. weights: [n_patches], 0 for none.
        """
        logits = student.float() / self.student_temperature
        targets = self.assignments(teacher, weights > 0, teacher_temperature=teacher_temperature)
        cross_entropy = torch.logsumexp(logits, dim=-1) - (targets * logits).sum(dim=-1)  # [n_patches]
        loss = (cross_entropy * weights).sum() / n_images
        if not self.sinkhorn:
            self.update_center(teacher, weights > 0)
        return loss

    @torch.no_grad()
    def assignments(self, teacher: Tensor, counted: Tensor, *, teacher_temperature: float) -> Tensor:
        """Teacher logits [n_patches, out_dim] → probabilities; counted: which patches are there, bool [n_patches]."""
        if self.sinkhorn:
            return sinkhorn_knopp(teacher, counted, temperature=teacher_temperature)
        return torch.softmax((teacher.float() - self.center) / teacher_temperature, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher: Tensor, counted: Tensor) -> None:
        n_counted = counted.sum()
        mean = (teacher.float() * counted[:, None]).sum(dim=0) / n_counted.clamp(min=1)
        mean = torch.where(n_counted > 0, mean, self.center)
        self.center.lerp_(mean, 1.0 - self.center_momentum)


class SinkhornDINOLoss(DINOLoss):
    """DINO's loss with assignments that Sinkhorn-Knopp balances over the batch; there is no center to move."""

    @torch.no_grad()
    def assignments(self, teacher: Tensor, *, teacher_temperature: float) -> Tensor:
        flat = teacher.flatten(0, -2)
        everything = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        return sinkhorn_knopp(flat, everything, temperature=teacher_temperature).view_as(teacher)

    def update_center(self, teacher: Tensor) -> None:
        """Nothing: balancing takes its place."""


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, counted: Tensor, *, temperature: float) -> Tensor:
    """Logits [n, out_dim] → probabilities [n, out_dim] that use every prototype about alike.

    counted: which rows take part, bool [n]; the others get probabilities that mean nothing. Prototypes and rows are
    scaled in turn (SwAV, arXiv 2006.09882, section 3.1), as logarithms, which sharp temperatures do not overflow.
    """
    log_q = logits.float() / temperature
    absent = ~counted[:, None]
    for _ in range(SINKHORN_ITERATIONS):
        per_prototype = torch.logsumexp(log_q.masked_fill(absent, -torch.inf), dim=0)
        log_q = log_q - torch.where(per_prototype.isfinite(), per_prototype, 0.0)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()


def koleo_loss(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Spread the vectors of a batch: minus the mean log distance to the nearest other vector, on the unit sphere.

    features: [n, dim], n ≥ 2, of different images. Source: Sablayrolles et al., arXiv 1806.03198, eq. 2.
    """
    unit = functional.normalize(features.float(), dim=-1, eps=eps)
    with torch.no_grad():
        similarity = unit @ unit.T
        nearest = similarity.fill_diagonal_(-1.0).argmax(dim=1)  # [n]
    distance = torch.linalg.vector_norm(unit - unit[nearest] + eps, dim=1)
    return -torch.log(distance + eps).mean()
