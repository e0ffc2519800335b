"""How good the features are, without labels, and which look at them was the best. Knows no files and no schedule.

Two figures. Recall: does an image, distorted in one way, find itself among many that were distorted in another? It
falls when features collapse and rises when they become invariant. Rank: how many directions do the vectors of the
undistorted images use (RankMe, arXiv 2210.02885)? docs/health.md has measurements of both beside k-NN accuracy.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinosearch.pretrain.device import has_bf16
from dinosearch.pretrain.health import effective_rank
from dinosearch.pretrain.views import ViewSettings, multi_crop, normalise, resample

MOST_IMAGES = 512
"""Looked at; few enough to be cheap, and enough that guessing finds next to nothing."""
MOST_BATCHES = 8
"""As many batches of a step as a look may cost: it embeds three pictures of each image, about two steps' work."""
CHUNK = 256
"""Images embedded at once."""
CLEARLY = 3.0
"""Standard errors that the last look must be below the best one before the best weights are exported instead."""
LEAST_DIFFERENCE = 0.05
"""And at least so much, in recall or accuracy: features at the end of a schedule are worth more than their recall."""
PREFIX = "best."
"""Of the best weights in a checkpoint."""


@dataclass(frozen=True)
class Quality:
    """One look at the features."""

    recall_at_1: float
    """Share of images that are nearest to themselves under another distortion, 0..1."""
    rank: float
    """Effective rank of the vectors of undistorted images."""

    def facts(self) -> dict[str, float]:
        """By the names that metrics and reports use."""
        return {"recall_at_1": round(self.recall_at_1, 4), "embedding_rank": round(self.rank, 3)}


def sample_rows(n_images: int, *, batch_size: int) -> np.ndarray:
    """Which images every look of a run takes: evenly spread, int64 [n]."""
    n = min(n_images, MOST_IMAGES, MOST_BATCHES * batch_size)
    return np.arange(n) * n_images // n


@torch.no_grad()
def measure_quality(
    backbone: nn.Module, pixels: Tensor, aspect: Tensor, views: ViewSettings, *, device: torch.device, seed: int
) -> Quality:
    """Both figures of a backbone in eval mode, the same ones whenever it is the same.

    pixels: uint8 [n, channels, side, side], images squeezed into squares; aspect: [n], their width / height.
    views: as the run makes them; the two global crops are the distortions. seed: draws them.
    """
    assert not backbone.training
    crops = replace(views, n_local=0)
    generator = torch.Generator().manual_seed(seed)

    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            features = backbone(images)
        return nn.functional.normalize(features.float(), dim=1)

    firsts, seconds, plain = [], [], []
    for chunk, shape in zip(pixels.split(CHUNK), aspect.split(CHUNK), strict=True):
        first, second = multi_crop(chunk.to(device), shape, crops, generator=generator)[0]
        firsts.append(embed(first))
        seconds.append(embed(second))
        plain.append(embed(_undistorted(chunk.to(device), shape, views)))
    nearest = (torch.cat(firsts) @ torch.cat(seconds).T).argmax(dim=1)
    found = nearest == torch.arange(len(pixels), device=nearest.device)
    return Quality(recall_at_1=found.float().mean().item(), rank=effective_rank(torch.cat(plain)))


def _undistorted(pixels: Tensor, aspect: Tensor, views: ViewSettings) -> Tensor:
    """As an index will embed them: the centre, with the whole short side."""
    width, height = (1 / aspect).clamp(max=1), aspect.clamp(max=1)  # shares of the image
    box = torch.stack([(1 - width) / 2, (1 - height) / 2, width, height], dim=1)
    upright = torch.zeros(len(pixels), dtype=torch.bool)
    return normalise(resample(pixels.float() / 255, box, upright, size=views.global_size), views.mean, views.std)


@dataclass(frozen=True)
class Look:
    """What was measured at one step."""

    step: int
    score: float
    """Recall, or with `--select labels` the k-NN accuracy: 0..1."""
    n: int
    """Images that the score is a share of."""
    measured: dict[str, Any]
    """All figures of the look, by name."""

    def clearly_below(self, best: "Look") -> bool:
        """Worse by more than chance, and by enough to matter."""
        error = math.sqrt((self.score * (1 - self.score) + best.score * (1 - best.score)) / self.n)
        return best.score - self.score > max(LEAST_DIFFERENCE, CLEARLY * error)


class Best:
    """Keeps the backbone of the best look, and says which is exported, it or the last one.

    remembered, tensors: what `facts` and `tensors` gave for a checkpoint.
    """

    def __init__(
        self, remembered: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.look = Look(**remembered) if remembered else None
        self._weights = _below(tensors or {}, PREFIX) if remembered else {}

    def offer(self, look: Look, backbone: nn.Module) -> None:
        """Keep these weights if nothing before was better; later is better among equals."""
        if self.look is None or look.score >= self.look.score:
            self.look = look
            self._weights = {name: t.detach().clone().contiguous().cpu() for name, t in backbone.state_dict().items()}

    def forget_after(self, step: int) -> None:
        """What was learnt after `step` was given up, and is no candidate any more."""
        if self.look is not None and self.look.step > step:
            self.look, self._weights = None, {}

    def chosen(self, last: Look, backbone: nn.Module) -> tuple[Look, nn.Module]:
        """What to export at the end: the last look and its backbone, unless they are clearly below the best."""
        if self.look is None or not last.clearly_below(self.look):
            return last, backbone
        best = copy.deepcopy(backbone)
        best.load_state_dict(self._weights)
        return self.look, best

    def facts(self) -> dict[str, Any] | None:
        """For a checkpoint, as JSON keeps it."""
        return asdict(self.look) if self.look else None

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {PREFIX + name: tensor for name, tensor in self._weights.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
