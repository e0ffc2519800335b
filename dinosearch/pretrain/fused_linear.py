"""Linear layers of a ViT with what lies around them in one pass over memory. Knows timm's layers, and no images.

On a processor a step waits for memory as much as for products. Torch writes a layer's bias over its whole output before
it multiplies, casts what LayerNorm made, and reads all tokens twice more for the gradients of LayerNorm's weights; here
the bias is added on the way (by oneDNN, where torch has it), and those weights are part of the layer's own.
"""

import functools
from typing import Any

import torch
from timm.layers import GELU, LayerNorm, Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(x: Tensor, layer: Any) -> Tensor:
    """What the nn.Linear `layer` makes of x [n, in_features]: [n, out_features], under autocast in its type."""
    if torch.compiler.is_compiling():
        return layer(x)
    return _Linear.apply(x, layer.weight, layer.bias)


def normed_linear(x: Tensor, norm: Any, weight: Tensor, bias: Tensor) -> Tensor:
    """What an nn.LayerNorm and then a linear layer [out_features, dim] make of x [n, dim]: [n, out_features]."""
    if torch.compiler.is_compiling():
        return functional.linear(norm(x), weight, bias)
    return _NormedLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)


def normed_mlp(x: Tensor, norm: Any, mlp: Any) -> Tensor:
    """What an nn.LayerNorm and then timm's plain `Mlp` make of x [n, dim]."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear(mlp.act(normed_linear(x, norm, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2)
    # nobody asks for what was before GELU
    hidden = _normed_product(x, norm.weight, norm.bias, norm.eps, mlp.fc1.weight, mlp.fc1.bias, gelu=True)[0]
    return linear(hidden, mlp.fc2)


def can_fuse(norm: Any, layer: Any) -> bool:
    """These are a LayerNorm with weights and a linear layer with a bias, or timm's MLP of such layers around GELU."""
    if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    if type(layer) is nn.Linear:
        return layer.bias is not None
    if type(layer) is not Mlp:
        return False
    between = [layer.drop1, layer.norm, layer.drop2]
    return (
        all(type(part) is nn.Linear and part.bias is not None for part in (layer.fc1, layer.fc2))
        and type(layer.act) in (nn.GELU, GELU)
        and getattr(layer.act, "approximate", "none") == "none"
        and all(isinstance(m, nn.Identity) or (isinstance(m, nn.Dropout) and m.p == 0) for m in between)
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = _dtype(x)
        x, cast = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, cast)
        return _product(x, cast, bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ weight, *_of_weights(x, gradient)


class _NormedLinear(torch.autograd.Function):
    """(n γ + β) Wᵀ + b, n what LayerNorm makes of x without weights, as n (W γ)ᵀ + (W β + b).

    So gradients of γ and β come from the weight's, not from all tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
        product, normed, mean, rstd, scaled = _normed_product(x, gamma, beta, eps, weight, bias)
        ctx.save_for_backward(x, gamma, beta, weight, normed, mean, rstd, scaled)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor, Tensor]:
        x, gamma, beta, weight, normed, mean, rstd, scaled = ctx.saved_tensors
        (gradient,) = gradients
        of_normed = (gradient @ scaled).to(x.dtype)
        of_x = torch.ops.aten.native_layer_norm_backward(
            of_normed, x, [x.shape[-1]], mean, rstd, *_no_weights(x.shape[-1]), [True, False, False]
        )[0]
        of_scaled, of_bias = _of_weights(normed, gradient)
        of_gamma = (of_scaled * weight).sum(dim=0)
        of_weight = torch.addr(of_scaled * gamma, of_bias, beta)
        return of_x, of_gamma, of_bias @ weight, None, of_weight, of_bias


def _normed_product(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, weight: Tensor, bias: Tensor, *, gelu: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product, and on the way to it: x normed, its mean and reciprocal deviation, and the weight times gamma."""
    dtype, dim = _dtype(x), x.shape[-1]
    normed, mean, rstd = torch.native_layer_norm(x, [dim], *_no_weights(dim), eps)
    normed, scaled = normed.to(dtype), (weight * gamma).to(dtype)
    product = _product(normed, scaled, torch.addmv(bias, weight, beta).to(dtype), gelu=gelu)
    return product, normed, mean, rstd, scaled


def _dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _no_weights(dim: int) -> tuple[Tensor, Tensor]:
    """Those of a LayerNorm that does nothing more; with these, and only so, torch keeps float32 statistics of bf16."""
    return torch.ones(dim), torch.zeros(dim)


def _of_weights(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a weight [out_features, in_features] and a bias, float32, of inputs x and of the output's."""
    # The narrower matrix first, and the bias's sum as a product: a fifth and a third faster (docs/benchmarks.md).
    of_weight = gradient.t() @ x if gradient.shape[1] <= x.shape[1] else (x.t() @ gradient).t()
    return of_weight.float(), (gradient.new_ones(1, len(gradient)) @ gradient)[0].float()


def _product(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, and GELU of it."""
    if _has_pointwise(x.dtype):
        then: Any = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *then)
    product = functional.linear(x, weight, bias)
    return functional.gelu(product) if gelu else product


@functools.cache
def _has_pointwise(dtype: torch.dtype) -> bool:
    """Torch has oneDNN's product with a bias under the name that its own compiler uses; no public one leads there."""
    x = torch.arange(6, dtype=dtype).view(2, 3)
    weight, bias = torch.ones(4, 3, dtype=dtype), torch.arange(4, dtype=dtype)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, functional.linear(x, weight, bias))
