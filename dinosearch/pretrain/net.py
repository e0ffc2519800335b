"""A backbone and the heads that a method puts on it. Knows no loss and no optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinosearch.pretrain.packed import can_pack, has_class_feature, packed_class_tokens, packed_features
from dinosearch.pretrain.patch_projection import PatchProjection, can_project
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.short_attention import ShortAttention, can_shorten
from dinosearch.vit.folder import create_vit
from dinosearch.vit.stripes import whole_mean

FUSED_ATTENTION_TOKENS = 64
"""On a CPU, plain matrix products beat torch's fused attention on shorter sequences; its backward is slow there."""


class Net(nn.Module):
    """`backbone`, and the heads by the names that their method gives them: `head` in most."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module], *, parts: int = 1) -> None:
        """parts: what `FrugalBlocks` cannot cut goes through the backbone in so many parts, computed again on the way
        back.
        """
        super().__init__()
        self._parts = 1 if is_plain(backbone) else parts
        self.backbone: Any = backbone
        self.head: Any
        self.patch_head: Any
        self.mask_token: Any
        for name, head in heads.items():
            self.add_module(name, head)
        self._masks: Tensor | None = None
        if "mask_token" in heads:  # a hook, so that the backbone stays timm's, and is saved as such
            patch_embed: Any = backbone.patch_embed
            patch_embed.register_forward_hook(self._hide)

    def encode(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [n, 3, size, size] → features [n, dim], patch tokens [n, n_patches, dim].

        Features are of the whole crop, also where the backbone's vectors have stripes: what a local crop shows lies
        in no stripe of the image.
        masks: bool [n, rows, columns], patches to hide; a method that does so has a head called `mask_token`.
        """
        tokens = self._tokens(images, masks)
        return whole_mean(self.backbone, tokens), tokens[:, self.backbone.num_prefix_tokens :]

    def encode_sizes(self, *crops: Tensor) -> Tensor:
        """Features [n, dim] as `encode` gives them, of crops [n_i, 3, size_i, size_i] of several sizes in turn."""
        if not can_pack(self.backbone):
            of_sizes = [self._tokens(images) for images in crops]
        elif has_class_feature(self.backbone):
            of_sizes = [packed_class_tokens(self.backbone, crops)[:, None]]
        else:
            of_sizes = packed_features(self.backbone, crops)
        return torch.cat([whole_mean(self.backbone, tokens) for tokens in of_sizes])

    def _tokens(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """All tokens of the last block [n, n_tokens, dim]."""
        if self._parts == 1:
            return self._through(images, masks)
        hidden = [None] * self._parts if masks is None else masks.tensor_split(self._parts)
        parts = zip(images.tensor_split(self._parts), hidden, strict=True)
        return torch.cat([_recomputed(self._through, part, mask) for part, mask in parts if len(part)])

    def _through(self, images: Tensor, masks: Tensor | None) -> Tensor:
        self._masks = masks
        tokens = self.backbone.forward_features(images)
        self._masks = None
        return tokens

    def _hide(self, _module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:
        return patches if self._masks is None else self.mask_token(patches, self._masks)


class MaskToken(nn.Module):
    """One learnt vector in place of hidden patches, before positions are added (BEiT, arXiv 2106.08254)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))

    def forward(self, patches: Tensor, masks: Tensor) -> Tensor:
        """patches: [n, rows, columns, dim]. masks: bool [n, rows, columns]."""
        return torch.where(masks[..., None], self.weight.to(patches.dtype), patches)


class FrugalBlocks(nn.Sequential):
    """A backbone's blocks that keep little for the backward pass and compute the rest again there.

    parts: cut the batch into so many, and hold what the blocks made of one part at a time; the loss still sees the
    whole batch, so that centering, Sinkhorn and KoLeo are what they are without. each: keep each block's input only.
    """

    def __init__(self, blocks: nn.Sequential, *, parts: int, each: bool) -> None:
        super().__init__(*blocks)
        self.parts = parts
        self.each = each

    def forward(self, tokens: Tensor) -> Tensor:
        if self.parts == 1:
            return self._through(tokens)
        made = [_recomputed(self._through, part) for part in tokens.chunk(self.parts)]
        return torch.cat(made)

    def _through(self, tokens: Tensor) -> Tensor:
        for block in self:
            tokens = _recomputed(block, tokens) if self.each else block(tokens)
        return tokens


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)


def is_plain(backbone: nn.Module) -> bool:
    """Its blocks take tokens and nothing else; those of Eva (DINOv3) take rotary positions beside them."""
    return isinstance(backbone, VisionTransformer)


def create_backbone(recipe: Recipe, *, drop_path_rate: float, device: torch.device) -> nn.Module:
    """A randomly initialised timm backbone that takes crops of every size."""
    facts = recipe.model_facts()
    # local crops are smaller than global ones: position embeddings are resampled on the way
    flexible = replace(facts, arch_kwargs=facts.arch_kwargs | {"dynamic_img_size": True})
    backbone: Any = create_vit(flexible, drop_path_rate=drop_path_rate)
    if recipe.uniform_drop_path and drop_path_rate > 0:  # timm's rate grows from 0 in the first block
        for block in backbone.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)
    if recipe.checkpoint_activations and not is_plain(backbone):
        backbone.set_grad_checkpointing(True)
    elif recipe.accumulate > 1 or recipe.checkpoint_activations:
        backbone.blocks = FrugalBlocks(backbone.blocks, parts=recipe.accumulate, each=recipe.checkpoint_activations)
    if device.type == "cpu" and can_project(getattr(backbone.patch_embed, "proj", None)):
        backbone.patch_embed.proj = PatchProjection(backbone.patch_embed.proj)
    n_tokens = (recipe.image_size // recipe.patch_size) ** 2
    if device.type == "cpu" and n_tokens <= FUSED_ATTENTION_TOKENS:
        holders: list[Any] = [m for m in backbone.modules() if hasattr(getattr(m, "attn", None), "fused_attn")]
        for holder in holders:
            holder.attn.fused_attn = False
            if can_shorten(holder.attn):
                holder.attn = ShortAttention(holder.attn)
    return backbone


def layer_of(name: str, *, n_blocks: int) -> int:
    """A parameter's depth in a `Net`: 0 for tokens, positions and patches, i + 1 for block i, n_blocks + 1 beyond.

    As DINOv2's param_groups.py counts, for layer-wise learning rates.
    """
    below = ("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed")
    parts = name.split(".")
    if any(part in below for part in parts):
        return 0
    if "blocks" in parts:
        return int(parts[parts.index("blocks") + 1]) + 1
    return n_blocks + 1
