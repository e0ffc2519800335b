"""A ViT's blocks over crops of several sizes with all tokens in one matrix, as a processor likes it. Knows no heads.

So a weight's gradient is one product, not one for each size and their sum. And where a crop's feature is its class
token, the last block asks for no other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dinosearch.pretrain.fused_linear import can_fuse, linear, normed_linear, normed_mlp
from dinosearch.pretrain.short_attention import Shapes, ShortAttention


def can_pack(backbone: Any) -> bool:
    """Its blocks are timm's plain ones, biases and GELU included, with attention that knows whose tokens are whose.

    They drop none at random. Hooks on the layers in a block would not be called.
    """
    if type(backbone).forward_features is not VisionTransformer.forward_features:
        return False
    drops = [backbone.patch_drop, *(getattr(b, f"drop_path{i}", None) for b in backbone.blocks for i in (1, 2))]
    return (
        type(backbone.blocks) is nn.Sequential
        and all(_is_plain(block) for block in backbone.blocks)
        and all(type(drop) is nn.Identity for drop in drops)
    )


def _is_plain(block: Any) -> bool:
    return (
        type(block) is Block
        and isinstance(block.attn, ShortAttention)
        and can_fuse(block.norm1, block.attn.qkv)
        and can_fuse(block.norm2, block.mlp)
        and can_fuse(block.norm2, block.attn.proj)  # its bias; this norm is not before it
    )


def has_class_feature(backbone: Any) -> bool:
    """A crop's feature is made of its class token, the first, and of nothing else."""
    own = any(
        getattr(type(backbone), name) is not getattr(VisionTransformer, name) for name in ("pool", "forward_head")
    )
    return not own and backbone.global_pool == "token" and backbone.attn_pool is None


def packed_features(backbone: Any, crops: Sequence[Tensor]) -> list[Tensor]:
    """`forward_features` of crops of each size, [n, n_tokens, dim]."""
    tokens, shapes = _embedded(backbone, crops)
    for block in backbone.blocks:
        tokens = _through(block, tokens, shapes)
    parts = backbone.norm(tokens).split([n * n_tokens for n, n_tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def packed_class_tokens(backbone: Any, crops: Sequence[Tensor]) -> Tensor:
    """The class tokens of `forward_features` of crops of each size in turn, [n, dim].

    Under autocast sums of tokens are kept in its type as well, which is half the memory to go through and adds half to
    the rounding of its products; but not with LayerScale, of whose small shares bfloat16 would lose too much.
    """
    tokens, shapes = _embedded(backbone, crops)
    if torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
    for block in backbone.blocks[:-1]:
        tokens = _through(block, tokens, shapes)
    return backbone.norm(_first_through(backbone.blocks[-1], tokens, shapes))


def _embedded(backbone: Any, crops: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
    """Tokens [total, dim] as the first block gets them."""
    embedded = [backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images))) for images in crops]
    shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
    return torch.cat([tokens.flatten(0, 1) for tokens in embedded]), shapes


def _through(block: Any, tokens: Tensor, shapes: Shapes) -> Tensor:
    attention = block.attn
    qkv = normed_linear(tokens, block.norm1, attention.qkv.weight, attention.qkv.bias)
    tokens = tokens + block.ls1(linear(attention.mix(qkv, shapes), attention.proj))
    return tokens + block.ls2(normed_mlp(tokens, block.norm2, block.mlp))


def _first_through(block: Any, tokens: Tensor, shapes: Shapes) -> Tensor:
    """What a block makes of the first token of each crop, float32 [n, dim]: the others have but to be looked at."""
    parts = tokens.split([n * n_tokens for n, n_tokens in shapes])
    first = torch.cat([part.unflatten(0, shape)[:, 0] for part, shape in zip(parts, shapes, strict=True)]).float()
    attention, dim = block.attn, tokens.shape[1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = normed_linear(first, block.norm1, weight[:dim], bias[:dim])
    keys_values = normed_linear(tokens, block.norm1, weight[dim:], bias[dim:])
    first = first + block.ls1(linear(attention.mix_first(query, keys_values, shapes), attention.proj))
    return first + block.ls2(normed_mlp(first, block.norm2, block.mlp))
