"""What a ViT looks at: the self-attention of its last block's heads, and the directions of its patch tokens.

The pictures of DINO (arXiv:2104.14294, figures 1 and 3) and of DINOv2 (arXiv:2304.07193, figure 1). Tensors in, arrays
and a picture out; reads no image files.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import ModelFolder, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MOST_TOKENS = 10_000
"""Their attention to each other takes a block's heads × 400 MB in float32."""
PANEL = 320
"""Least length of a panel's long side, in pixels."""
GAP, TITLE = 8, 22
SHADE = 0.75
"""How much an image is darkened where a head does not look."""
HEAT = ((0.0, (0, 0, 4)), (0.35, (120, 28, 109)), (0.65, (237, 105, 37)), (1.0, (252, 255, 164)))
"""Colours of attention from none to most, after matplotlib's inferno."""


@dataclass(frozen=True)
class Look:
    """One image through a ViT of `rows` × `columns` patches."""

    heads: np.ndarray
    """float32 [heads, rows, columns]: attention to each patch from the class token, or the mean of all patches' where
    they are what is pooled; the rest to 1 goes to the tokens that are no patches."""
    patches: np.ndarray
    """float32 [rows, columns, dim]: the normalised tokens that the last block leaves."""


def fitting_size(vit: "nn.Module", size: tuple[int, int], *, short_side: int) -> tuple[int, int]:
    """Width and height of an image of `size` when scaled to `short_side`, in whole patches.

    Raises DinosearchError when that is less than one patch, or more than can be looked at.
    """
    patch = _patch_side(vit)
    scale = short_side / min(size)
    width, height = (max(1, round(side * scale / patch)) * patch for side in size)
    if short_side < patch or width * height > MOST_TOKENS * patch**2:
        raise DinosearchError(
            f"{width}×{height} px are {width * height // patch**2} patches of {patch} px. "
            f"Choose a --size from {patch} on that makes at most {MOST_TOKENS}"
        )
    return width, height


def look(vit: "nn.Module", pixels: "Tensor") -> Look:
    """Run one normalised image [1, 3, height, width] through a timm backbone, which is set to that size.

    Position embeddings are resampled where there are more or fewer patches than the model was trained with.
    Raises DinosearchError for an architecture that cannot be set to another size or has no usual attention.
    """
    import torch

    timm_vit: Any = vit
    last = timm_vit.blocks[-1]
    _check_drawable(last.attn)
    patch = _patch_side(vit)
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    try:
        timm_vit.set_input_size((pixels.shape[2], pixels.shape[3]))
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise DinosearchError(
            f"this architecture takes one size only ({first_line(error)}). Choose a model of timm's vit_* architectures"
        ) from error
    seen: list[Tensor] = []
    hook = last.attn.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            # timm has one of both norms, for pooling by class token or by average: [1, prefix + rows × columns, dim]
            tokens = timm_vit.fc_norm(timm_vit.norm(_tokens(timm_vit, pixels)))
            n_prefix = tokens.shape[1] - rows * columns
            attention = attention_weights(last.attn, seen[0])[0]  # [heads, tokens, tokens]
            # the tokens that the image's vector is made of; with average pooling a class token was never trained
            asking = slice(0, 1) if timm_vit.global_pool == "token" else slice(n_prefix, None)
            heads = attention[:, asking, n_prefix:].mean(dim=1).reshape(-1, rows, columns).numpy()
    finally:
        hook.remove()
    return Look(heads, tokens[0, n_prefix:].reshape(rows, columns, -1).numpy())


def attention_weights(attention: "nn.Module", tokens: "Tensor") -> "Tensor":
    """softmax(q kᵀ / √d) of timm's attention: tokens [n, tokens, dim] → [n, heads, tokens, tokens].

    Worked out here since the fused kernels do not give it.
    """
    layer: Any = attention
    n, n_tokens, _ = tokens.shape
    q, k, _ = layer.qkv(tokens).reshape(n, n_tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return (layer.q_norm(q) @ layer.k_norm(k).transpose(-2, -1) * layer.scale).softmax(dim=-1)


def principal_colours(patches: np.ndarray) -> np.ndarray:
    """[rows, columns, dim] → uint8 [rows, columns, 3]: the three directions of most variance as red, green and blue."""
    rows, columns, dim = patches.shape
    centred = patches.reshape(-1, dim) - patches.reshape(-1, dim).mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    # a direction and its opposite are equally principal: let the largest part be positive, so that runs agree
    largest = np.abs(directions).argmax(axis=1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    values = np.zeros((rows * columns, 3), dtype=np.float32)
    values[:, : len(directions)] = centred @ directions.T
    low, high = np.percentile(values, [2, 98], axis=0)
    shares = (values - low) / np.maximum(high - low, 1e-9)
    return (255 * shares.clip(0, 1)).astype(np.uint8).reshape(rows, columns, 3)


def draw(model: ModelFolder, image: Image.Image, *, short_side: int) -> Image.Image:
    """The image, its patches' principal directions, the heads' mean attention and that of each head, side by side.

    image: RGB of any shape. Raises DinosearchError as `look` and `fitting_size` do.
    """
    import torch

    vit = model.load_vit()
    size = fitting_size(vit, image.size, short_side=short_side)
    seen = image.resize(size, Image.Resampling[model.interpolation.upper()])
    values = (np.asarray(seen, dtype=np.float32) / 255 - np.array(model.mean)) / np.array(model.std)
    found = look(vit, torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None])
    scale = max(1, round(PANEL / max(size)))
    large = seen.resize((size[0] * scale, size[1] * scale), Image.Resampling.BICUBIC)
    colours = Image.fromarray(principal_colours(found.patches)).resize(large.size, Image.Resampling.NEAREST)
    panels = [(f"{size[0]} x {size[1]} px", large), ("patch tokens (PCA)", colours)]
    panels.append(("mean of the heads", _heat(found.heads.mean(axis=0), large)))
    panels += [(f"head {i + 1}", _heat(head, large)) for i, head in enumerate(found.heads)]
    return _side_by_side(panels)


def _check_drawable(attention: "nn.Module") -> None:
    """Queries and keys must be made by one plain matrix: no rotary embeddings (DINOv3), no differential attention."""
    import torch

    if type(attention).__name__ != "Attention" or not isinstance(getattr(attention, "qkv", None), torch.nn.Linear):
        raise DinosearchError(
            f"the attention of this architecture ({type(attention).__name__}) cannot be drawn. "
            "Choose a model of DINO's or DINOv2's architecture, or one of your own"
        )


def _patch_side(vit: "nn.Module") -> int:
    embedding: Any = vit.patch_embed
    return int(embedding.patch_size[0])


def _tokens(vit: Any, pixels: "torch.Tensor") -> "torch.Tensor":
    """Those that the last block leaves, not normalised yet."""
    return vit.blocks(vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels))))


def _heat(attention: np.ndarray, image: Image.Image) -> Image.Image:
    """The image, dark where the attention is low, glowing where it is high."""
    top = np.quantile(attention, 0.995)  # one patch that takes all would leave the others black
    low = attention.min()
    shares = ((attention - low) / max(float(top - low), 1e-12)).clip(0, 1).astype(np.float32)
    large = np.asarray(Image.fromarray(shares).resize(image.size, Image.Resampling.BILINEAR))[..., None]
    stops = [stop for stop, _ in HEAT]
    glow = np.concatenate([np.interp(large, stops, [colour[i] for _, colour in HEAT]) for i in range(3)], axis=2)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    mixed = (1 - SHADE) * grey + SHADE * glow
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    width, height = panels[0][1].size
    n_columns = min(len(panels), 3 if len(panels) <= 6 else 4 if len(panels) <= 12 else 6)
    n_rows = -(-len(panels) // n_columns)
    sheet = Image.new("RGB", (n_columns * (width + GAP) + GAP, n_rows * (height + TITLE + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (title, panel) in enumerate(panels):
        left, top = GAP + i % n_columns * (width + GAP), GAP + i // n_columns * (height + TITLE + GAP)
        pen.text((left, top + 2), title, fill="#222222", font=font)
        sheet.paste(panel, (left, top + TITLE))
    return sheet
