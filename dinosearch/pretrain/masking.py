"""Which patches a student does not see: blocks, as BEiT (arXiv 2106.08254, algorithm 1) and DINOv2 draw them.

All images of a batch at once, on the CPU, so that shapes are equal in every step and nothing waits for a GPU.
"""

import math

import torch
from torch import Tensor

ASPECT_RANGE = (0.3, 1 / 0.3)
"""Height / width of a block."""
LEAST_PATCHES = 4
"""In a block, unless fewer are left to mask."""
LARGEST_BLOCK = 0.5
"""Share of the patches that one block may cover."""
TRIES = 10
"""After so many blocks in a row that do not fit, an image is left with fewer patches masked."""


def patches_to_mask(
    n_images: int, n_patches: int, *, probability: float, ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """How many patches to mask in each image, [n_images]; 0 in all but a share `probability`.

    The range of ratios is cut into as many parts as images are masked, and each draws from its own: so the sum hardly
    varies. Source: DINOv2's collate.py.
    """
    n_masked = int(n_images * probability)
    low, high = ratio
    drawn = torch.rand(n_masked, generator=generator, dtype=torch.float64)
    place = (torch.arange(n_masked) + drawn) / max(n_masked, 1)
    counts = torch.zeros(n_images, dtype=torch.long)
    counts[:n_masked] = (n_patches * (low + place * (high - low))).long()
    return counts[torch.randperm(n_images, generator=generator)]


def most_masked(n_images: int, n_patches: int, *, probability: float, ratio: tuple[float, float]) -> int:
    """The largest sum that `patches_to_mask` can have."""
    n_masked = int(n_images * probability)
    low, high = ratio
    return sum(int(n_patches * (low + (i + 1) / n_masked * (high - low))) for i in range(n_masked))


def block_masks(counts: Tensor, grid: int, *, generator: torch.Generator) -> Tensor:
    """Masks [n, grid, grid], true where a patch is hidden: blocks that together cover at most counts[i] patches.

    Areas and aspect ratios are drawn until the count is reached or nothing fits any more.
    """
    masks = torch.zeros(len(counts), grid, grid, dtype=torch.bool)
    left = counts.clone()
    failed = torch.zeros_like(counts)
    line = torch.arange(grid)
    low, high = (math.log(limit) for limit in ASPECT_RANGE)
    while len(at := ((left > 0) & (failed < TRIES)).nonzero()[:, 0]):
        area, aspect, vertical, horizontal = torch.rand(4, len(at), generator=generator)
        most = left[at].clamp(max=int(LARGEST_BLOCK * grid * grid))
        area = LEAST_PATCHES + area * (most - LEAST_PATCHES)
        aspect = torch.exp(low + aspect * (high - low))
        height, width = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
        top, start = (vertical * (grid - height + 1)).floor(), (horizontal * (grid - width + 1)).floor()
        rows = (line >= top[:, None]) & (line < (top + height)[:, None])  # [n, grid]
        columns = (line >= start[:, None]) & (line < (start + width)[:, None])
        blocks = rows[:, :, None] & columns[:, None, :]
        n_new = (blocks & ~masks[at]).sum(dim=(1, 2))
        fits = (height < grid) & (width < grid) & (n_new > 0) & (n_new <= most)
        masks[at] |= blocks & fits[:, None, None]
        left[at] -= n_new * fits
        failed[at] = torch.where(fits, 0, failed[at] + 1)
    return masks


def masked_places(masks: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
    """Where patches are hidden: indices [size] into masks.flatten(), and a weight [size] for each.

    A patch weighs one over the number hidden in its image, so that all masked images count alike. What is left of
    `size` points at patch 0 with weight 0. Source: DINOv2's collate.py.
    """
    per_image = masks.flatten(1).sum(dim=1, keepdim=True).clamp(min=1)
    found = masks.flatten().nonzero()[:, 0]
    indices = torch.zeros(size, dtype=torch.long)
    weights = torch.zeros(size)
    indices[: len(found)] = found
    weights[: len(found)] = (1 / per_image).expand(-1, masks[0].numel()).flatten()[found]
    return indices, weights
