"""Self-attention over few tokens, laid out as a processor likes it. Knows timm's layer, and no images."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Shapes = Sequence[tuple[int, int]]
"""(n, n_tokens) of crops of each size, whose tokens lie one after another in one matrix."""


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
        self.qkv: nn.Linear
        self.proj: nn.Linear

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        assert (attn_mask, is_causal) == (None, False), "a backbone in training sees whole crops"
        n, n_tokens, _ = x.shape
        return self.proj(self.mix(self.qkv(x).flatten(0, 1), [(n, n_tokens)]).unflatten(0, (n, n_tokens)))

    def mix(self, qkv: Tensor, shapes: Shapes) -> Tensor:
        """Queries, keys and values [total, 3 × dim] of crops of several sizes → weighted values [total, dim]."""
        return _Mix.apply(qkv, shapes, self.num_heads, self.scale)

    def mix_first(self, first: Tensor, keys_values: Tensor, shapes: Shapes) -> Tensor:
        """The same for the first token of each crop alone: its query [n, dim], all [total, 2 × dim] → [n, dim]."""
        queries = (first * self.scale).split([n for n, _ in shapes])
        parts = keys_values.split([n * n_tokens for n, n_tokens in shapes])
        mixed = []
        for (n, n_tokens), query, part in zip(shapes, queries, parts, strict=True):
            heads = part.view(n, n_tokens, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            k, v = heads.reshape(2, n * self.num_heads, n_tokens, self.head_dim).unbind(0)
            weights = torch.bmm(query.reshape(n * self.num_heads, 1, -1), k.transpose(1, 2)).softmax(dim=-1)
            mixed.append(torch.bmm(weights, v).reshape(n, -1))
        return torch.cat(mixed)


class _Mix(torch.autograd.Function):
    """Softmax of scaled products of queries and keys, times values; every size reads and writes its own rows."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shapes: Shapes, num_heads: int, scale: float) -> Tensor:
        total, dim = len(qkv), qkv.shape[1] // 3
        mixed, kept, start = qkv.new_empty(total, dim), [], 0
        for n, n_tokens in shapes:
            rows = slice(start, start + n * n_tokens)
            heads = qkv.new_empty(3, n, num_heads, n_tokens, dim // num_heads)
            heads.copy_(qkv[rows].view(n, n_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4))
            q, k, v = heads.flatten(1, 2).unbind(0)  # [n × num_heads, n_tokens, head_dim]
            weights = _softmax(_scaled_bmm(q, k.transpose(1, 2), scale))
            by_head = torch.bmm(weights, v).view(n, num_heads, n_tokens, -1)
            mixed[rows].view(n, n_tokens, num_heads, -1).copy_(by_head.transpose(1, 2))
            kept += [heads, weights]
            start = rows.stop
        ctx.save_for_backward(*kept)
        ctx.shapes, ctx.scale = shapes, scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        total, dim = gradient.shape
        of_qkv, kept, start = gradient.new_empty(total, 3 * dim), ctx.saved_tensors, 0
        for (n, n_tokens), heads, weights in zip(ctx.shapes, kept[::2], kept[1::2], strict=True):
            rows, num_heads = slice(start, start + n * n_tokens), heads.shape[2]
            q, k, v = heads.flatten(1, 2).unbind(0)
            of_mixed = gradient[rows].view(n, n_tokens, num_heads, -1).transpose(1, 2).reshape(v.shape)
            of_weights = torch.bmm(of_mixed, v.transpose(1, 2))
            of_scores = _softmax_backward(of_weights, weights)
            of_heads = torch.empty_like(heads)
            of_q, of_k, of_v = of_heads.flatten(1, 2).unbind(0)
            _scaled_bmm(of_scores, k, ctx.scale, out=of_q)
            _scaled_bmm(of_scores.transpose(1, 2), q, ctx.scale, out=of_k)
            torch.bmm(weights.transpose(1, 2), of_mixed, out=of_v)
            of_qkv[rows].view(n, n_tokens, 3, num_heads, -1).copy_(of_heads.permute(1, 3, 0, 2, 4))
            start = rows.stop
        return of_qkv, None, None, None


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in the scores' type."""
    if _is_short_row(scores):
        return scores.float().softmax(dim=-1).to(scores.dtype)
    return scores.softmax(dim=-1)


def _softmax_backward(gradient: Tensor, softmax: Tensor) -> Tensor:
    """The gradient of the scores, of that of their softmax."""
    if _is_short_row(softmax):
        of_scores = torch.ops.aten._softmax_backward_data(gradient.float(), softmax.float(), -1, torch.float32)
        return of_scores.to(softmax.dtype)
    return torch.ops.aten._softmax_backward_data(gradient, softmax, -1, softmax.dtype)


def _is_short_row(x: Tensor) -> bool:
    """Its rows fill a vector of 512 bits in float32 but not in bf16: torch is 1.6 times as fast in float32 then, and in
    the backward pass 5 to 7 times (docs/benchmarks.md).
    """
    return x.dtype == torch.bfloat16 and 16 <= x.shape[-1] < 32


def _scaled_bmm(a: Tensor, b: Tensor, scale: float, *, out: Tensor | None = None) -> Tensor:
    """scale × a b, without another pass over it."""
    if out is None:
        out = a.new_empty(len(a), a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def can_shorten(attention: Any) -> bool:
    """It is timm's plain attention, with nothing between its projections: no norms, gate or dropout."""
    if type(attention) is not Attention or getattr(attention, "gate", None) is not None:
        return False
    between = [attention.q_norm, attention.k_norm, attention.norm, attention.attn_drop, attention.proj_drop]
    return all(isinstance(m, nn.Identity) or (isinstance(m, nn.Dropout) and m.p == 0) for m in between)
