"""Vectors of a ViT that keep what is above what: the patches' mean in each of some horizontal stripes, side by side.

Part-based pooling as in person re-identification (PCB, arXiv 1711.09349). An image and its mirror image, which training
makes alike, keep the same vector as far as their patches do; one turned upside down does not.
"""

from typing import Any

from torch import Tensor, nn

from dinosearch.errors import UsageError


class Stripes(nn.Module):
    """Tokens [n, n_tokens, dim], patches last and row by row → the mean of each stripe, [n, n_stripes, dim]."""

    def __init__(self, n_stripes: int, n_patches: int) -> None:
        super().__init__()
        self.n_stripes = n_stripes
        self.n_patches = n_patches

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, -self.n_patches :].unflatten(1, (self.n_stripes, -1)).mean(dim=2)


def pool_by_stripes(vit: nn.Module, n_stripes: int) -> None:
    """Let a timm backbone with average pooling give [n, n_stripes × dim]: each stripe's mean, normalised on its own.

    Raises UsageError where the stripes do not go with the model.
    """
    timm_vit: Any = vit
    n_rows = timm_vit.patch_embed.grid_size[0]
    if n_rows % n_stripes:
        raise UsageError(
            f"{n_rows} rows of patches cannot be cut into {n_stripes} stripes: choose a divisor of {n_rows}"
        )
    if not hasattr(timm_vit, "attn_pool"):
        raise UsageError(f"timm's {type(vit).__name__} cannot pool by stripes: choose 1 stripe")
    if timm_vit.global_pool != "avg" or timm_vit.attn_pool is not None:
        raise UsageError(
            f"stripes are of average pooling, not {timm_vit.global_pool!r}: choose 1 stripe or pooling avg"
        )
    # in place of timm's mean; its norm follows
    timm_vit.attn_pool = Stripes(n_stripes, timm_vit.patch_embed.num_patches)
    timm_vit.head = nn.Flatten(1)


def whole_mean(vit: nn.Module, tokens: Tensor) -> Tensor:
    """What timm makes of a backbone's tokens without stripes: [n, n_tokens, dim] → [n, dim], for any size of image."""
    timm_vit: Any = vit
    if isinstance(getattr(timm_vit, "attn_pool", None), Stripes):
        pooled: Tensor = timm_vit.fc_norm(tokens[:, timm_vit.num_prefix_tokens :].mean(dim=1))
    else:
        pooled = timm_vit.forward_head(tokens)
    return pooled
