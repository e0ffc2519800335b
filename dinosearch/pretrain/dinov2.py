"""What DINOv2 (arXiv 2304.07193) adds to DINO. So far: the KoLeo regulariser."""

import torch
from torch import Tensor
from torch.nn import functional


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
