"""Self-attention over few tokens, laid out as a processor likes it. Knows timm's layer, and no images."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn


class ShortAttention(nn.Module):
    """A timm `Attention` by the same parameters under the same names: tokens [n, n_tokens, dim] → the same numbers.

    timm multiplies queries and keys as they lie in the projection's output, strided, which a processor's batched
    product copies row by row. Here they are put side by side once, for all heads of all images together.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attention.num_heads, attention.head_dim, attention.scale
        for name, layer in attention.named_children():
            self.add_module(name, layer)
        self.qkv: nn.Module
        self.proj: nn.Module

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        assert (attn_mask, is_causal) == (None, False), "a backbone in training sees whole crops"
        return self.proj(self._mix(self.qkv(x)))

    def packed(self, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens [total, dim] of crops of several sizes, one after another: shapes (n, n_tokens) of each size."""
        parts = self.qkv(x).split([n * n_tokens for n, n_tokens in shapes])
        mixed = [self._mix(part.unflatten(0, shape)) for part, shape in zip(parts, shapes, strict=True)]
        return self.proj(torch.cat([part.flatten(0, 1) for part in mixed]))

    def _mix(self, qkv: Tensor) -> Tensor:
        """[n, n_tokens, 3 × dim] → the heads' weighted values [n, n_tokens, dim]."""
        n, n_tokens, _ = qkv.shape
        heads = qkv.reshape(n, n_tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = heads.reshape(3, n * self.num_heads, n_tokens, self.head_dim).unbind(0)  # copies, once
        weights = torch.bmm(q * self.scale, k.transpose(1, 2)).softmax(dim=-1, dtype=torch.float32)
        mixed = torch.bmm(weights.to(v.dtype), v).unflatten(0, (n, self.num_heads))
        return mixed.transpose(1, 2).reshape(n, n_tokens, -1)


def can_shorten(attention: Any) -> bool:
    """It is timm's plain attention, with nothing between its projections: no norms, gate or dropout."""
    if type(attention) is not Attention or getattr(attention, "gate", None) is not None:
        return False
    between = [attention.q_norm, attention.k_norm, attention.norm, attention.attn_drop, attention.proj_drop]
    return all(isinstance(m, nn.Identity) or (isinstance(m, nn.Dropout) and m.p == 0) for m in between)
