"""Signals that a loss does not give: is the teacher collapsing, and how rich are the features? Pure functions."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Health:
    """One look at the teacher. docs/health.md tells what sound and collapsed runs show."""

    teacher_entropy: float
    """Mean entropy of the teacher's assignment of one crop, in nats: 0 is one-hot, ln(out_dim) is uniform."""
    teacher_kl: float
    """Mean KL divergence of assignments from their mean, in nats: 0 means that every crop is assigned alike."""
    prototypes_used: float
    """Share of the prototypes in use: exp(entropy of the mean assignment) / out_dim, 0..1."""
    feature_std: float
    """Standard deviation of unit features over the batch, times sqrt(dim): 1 is spread evenly, 0 is one point."""
    rank: float
    """Effective rank of the features, exp(entropy of the singular values), RankMe, arXiv 2210.02885."""
    center_norm: float
    """Length of the center: it grows without end when it cannot keep up with the teacher."""
    loss_of_ln_k: float
    """DINO loss as a share of ln(out_dim): 1 is what a uniform assignment costs, and means that nothing is learnt."""

    def facts(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@torch.no_grad()
def look(assignments: Tensor, features: Tensor, *, center: Tensor, loss: float) -> Health:
    """assignments: the teacher's probabilities [n, out_dim]. features: its class tokens [n, dim] of the same crops.

    center: [out_dim]. loss: mean DINO loss of the last steps.
    """
    p = assignments.float()
    entropy = _entropy(p).mean().item()
    mean_entropy = _entropy(p.mean(dim=0)).item()
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    return Health(
        teacher_entropy=entropy,
        teacher_kl=mean_entropy - entropy,  # Σ p log(p/m) averaged over rows = H(mean) − mean H
        prototypes_used=math.exp(mean_entropy) / p.shape[1],
        feature_std=(unit.std(dim=0).square().mean().sqrt() * math.sqrt(unit.shape[1])).item(),
        rank=effective_rank(unit),
        center_norm=center.float().norm().item(),
        loss_of_ln_k=loss / math.log(p.shape[1]),
    )


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of [n, dim]."""
    values = torch.linalg.svdvals(features.float().cpu())
    share = values / values.sum().clamp(min=1e-12)
    return math.exp(_entropy(share).item())


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(dim=-1)
