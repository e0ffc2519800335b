"""Checkpoints of others: DINO, DINOv2 and DINOv3 files, released or left by training, as timm's vision transformers.

Knows layouts (names and shapes of tensors) and leaves conversion to timm's own filters. Runs nothing that a file holds.
"""

import argparse
import math
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import LARGEST_DEFAULT_SIZE, ModelFacts, create_vit, first_line, open_model

if TYPE_CHECKING:
    import torch

_PATCHES = "patch_embed.proj.weight"
_TREES = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "student")
"""Where checkpoints keep weights, best first: the teacher beats its student (arXiv:2104.14294, section 5.2)."""

_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1536, 40): "giant",
    (4096, 40): "7b",
}
"""(dim, depth) → the word in timm's name."""

_HEAD_DIMS = {"vit_huge_patch14_224": 80, "vit_7b_patch16_dinov3": 128}
"""What tensors don't tell: channels of an attention head, where they are not the 64 of DINO, DINOv2 and DINOv3."""


def read_released(path: Path, *, image_size: int | None) -> "tuple[torch.nn.Module, ModelFacts]":
    """A backbone from a checkpoint file, in eval mode and float32, and what turns images into its vectors.

    Reads DINO (backbone, or full checkpoint: its teacher), DINOv2 (with and without registers, also chunked blocks of
    training), DINOv3 ViTs, timm's layout and our own `weights.safetensors`; pickled or safetensors, by content.
    Files in timm's layout are taken for DINO's: their preprocessing is not in the tensors. Only a full name tells
    DINOv3 weights of satellite images (`…sat493m…`) apart. Registers, heads and sizes come from the shapes;
    DINOv3's rotary periods are timm's float32 ones, not the rounded copies in the file.

    image_size: side of the square in pixels, a multiple of the patch; None: the size the weights were made for if it
        is at most 256, else the nearest to 224. Position embeddings are resampled by timm.
    Raises DinosearchError when the file is damaged, holds code or holds no such vision transformer.
    """
    state = _backbone(_read(path), path)
    facts = _facts_beside(path) or _facts(_Layout.of(state, path), path)
    patch = state[_PATCHES].shape[-1]
    facts = _at_size(facts, square_for(image_size, facts.image_size, patch), patch)
    vit = create_vit(facts)
    try:
        vit.load_state_dict(_converted(state, vit, path))
    except (RuntimeError, KeyError, ValueError) as error:
        raise DinosearchError(
            f"{path} looks like {facts.arch} but does not fit it ({_mismatch(error)}). Download it again if it was "
            "released by DINO, DINOv2, DINOv3 or timm; other vision transformers are not read"
        ) from error
    return vit.eval(), facts


def _read(path: Path) -> Mapping[str, Any]:
    """Whatever mapping the file holds, as plain values and tensors on the CPU."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DinosearchError(f"{path} cannot be read ({error.strerror}). Name a .pth or .safetensors file") from error
    if not head:
        raise DinosearchError(f"{path} is empty. Download it again")
    if head.lstrip()[:1] == b"<":
        raise DinosearchError(f"{path} is a web page, not weights. Download the file itself, with its page's own link")
    if head.startswith(b"version https://git-lfs"):
        raise DinosearchError(f"{path} is a Git LFS pointer, not the weights. Fetch them: git lfs pull")
    tree = _read_safetensors(path) if head[8:9] == b"{" else _read_pickle(path)
    if not isinstance(tree, Mapping):
        raise DinosearchError(
            f"{path} holds a {type(tree).__name__}, not named tensors. Save them with torch.save(model.state_dict(), …)"
        )
    return tree


def _read_safetensors(path: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DinosearchError(
            f"{path} is damaged or incomplete ({first_line(error)}). Download or copy it again"
        ) from error


def _read_pickle(path: Path) -> object:
    import torch

    try:
        # DINO keeps its command line in every full checkpoint, as a Namespace: a bag of values without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _MALFORMED as error:
        code = re.search(r"GLOBAL ([\w.]+)|function ([\w.]+)|class ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise DinosearchError(
                f"{path} would run code to load ({next(filter(None, code.groups()))}), which is never done. Save its "
                "tensors alone, where you trust it: torch.save(model.state_dict(), …)"
            ) from error
        raise DinosearchError(
            f"{path} is no checkpoint, or is damaged or incomplete ({_reason(error)}). Expected a .pth or "
            ".safetensors file of DINO, DINOv2 or DINOv3; download or copy it again"
        ) from error


def _reason(error: BaseException) -> str:
    """What the parser met; torch's own first line advises to load the file unsafely."""
    if not isinstance(error, pickle.UnpicklingError):
        return first_line(error)
    told = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return told[1].strip() if told else "no pickled tensors"


_MALFORMED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What torch.load raises on bytes that are not a checkpoint: its parser trusts them."""


def _backbone(tree: Mapping[str, Any], path: Path) -> "dict[str, torch.Tensor]":
    """The backbone's tensors under their own names: wrappers stripped, projection and classification heads dropped."""
    import torch

    while inner := next((tree[name] for name in _TREES if isinstance(tree.get(name), Mapping)), None):
        tree = inner
    tensors = {name: tensor for name, tensor in tree.items() if isinstance(tensor, torch.Tensor)}
    prefixes = [name.removesuffix(_PATCHES) for name in tensors if name.endswith(_PATCHES)]
    if not prefixes:
        raise DinosearchError(f"{path} {_what_else(tensors)}. Expected a vision transformer of DINO, DINOv2 or DINOv3")
    teachers = [prefix for prefix in prefixes if re.search("teacher|momentum", prefix)]
    prefix = (teachers or prefixes)[0]
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(("head.", "head_dist.")):
            # DINOv2 trains blocks in chunks, blocks.<chunk>.<block>, where <block> counts through all of them.
            state[re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name.removeprefix(prefix))] = tensor
    return state


def _what_else(tensors: "Mapping[str, torch.Tensor]") -> str:
    names = " ".join(tensors)
    if "embeddings.patch_embeddings" in names:
        return "is in the layout of transformers (use --model timm:<name>, or the .pth that its authors released)"
    if "patch_embed.proj.0.0.weight" in names:
        return "holds an XCiT"
    if "downsample_layers." in names or "stages." in names:
        return "holds a ConvNeXt"
    if "layer1.0.conv1.weight" in names:
        return "holds a ResNet"
    shown = ", ".join(list(tensors)[:2])
    return f"holds other tensors ({shown})" if shown else "holds no tensors"


@dataclass(frozen=True)
class _Layout:
    """What names and shapes tell of a vision transformer."""

    dim: int
    depth: int
    patch: int
    n_registers: int
    n_hidden: int
    """Rows of the MLP's first layer; of the gate's half if it is split, of both if it is packed."""
    gated: bool
    layer_scale: bool
    grid: int | None
    """Side of the grid of position embeddings; None: rotary, as in DINOv3."""
    class_position: bool
    """Whether the class token has a position embedding in the converted weights."""
    head_dim: int | None
    qkv_bias: bool
    """Whether DINOv3's bias of queries and values is anything but zero."""

    @classmethod
    def of(cls, state: "Mapping[str, torch.Tensor]", path: Path) -> "_Layout":
        dim, n_channels, patch, patch_width = _shape(state, _PATCHES, 4, path)
        if n_channels != 3 or patch != patch_width:
            raise DinosearchError(
                f"{path} expects {n_channels} channels in patches of {patch}×{patch_width}. "
                "Choose weights for RGB images and square patches"
            )
        blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        if not blocks or blocks != set(range(len(blocks))):
            raise DinosearchError(
                f"{path} lacks blocks of its transformer (it has {sorted(blocks)}). Download or copy it again"
            )
        registers = next((state[n] for n in ("register_tokens", "storage_tokens", "reg_token") if n in state), None)
        first = next((n for n in ("w12", "w1", "fc1_g", "fc1") if f"blocks.0.mlp.{n}.weight" in state), "fc1")
        n_hidden = _shape(state, f"blocks.0.mlp.{first}.weight", 2, path)[0]
        last = "w3" if first in ("w12", "w1") else "fc2"
        n_read = _shape(state, f"blocks.0.mlp.{last}.weight", 2, path)[1]
        grid, class_position = _grid(state, path)
        periods = state.get("rope_embed.periods")
        return cls(
            dim=dim,
            depth=len(blocks),
            patch=patch,
            n_registers=registers.shape[1] if registers is not None else 0,
            n_hidden=n_hidden,
            gated=first in ("w1", "fc1_g") or n_hidden == 2 * n_read,
            layer_scale="blocks.0.ls1.gamma" in state,
            grid=grid,
            class_position=class_position and "register_tokens" not in state,
            head_dim=4 * len(periods) if periods is not None else None,
            qkv_bias=_has_bias(state, path),
        )


def _shape(state: "Mapping[str, torch.Tensor]", name: str, n_axes: int, path: Path) -> tuple[int, ...]:
    if name not in state or state[name].ndim != n_axes:
        raise DinosearchError(
            f"{path} lacks {name} with {n_axes} axes. Expected a vision transformer of DINO, DINOv2 or DINOv3"
        )
    return tuple(state[name].shape)


def _grid(state: "Mapping[str, torch.Tensor]", path: Path) -> tuple[int | None, bool]:
    """Side of the square grid of positions, and whether the class token has one of its own before them."""
    if "pos_embed" not in state:
        return None, False
    n_positions = _shape(state, "pos_embed", 3, path)[1]
    for n_class in (1, 0):
        side = math.isqrt(n_positions - n_class)
        if side and side * side == n_positions - n_class:
            return side, bool(n_class)
    raise DinosearchError(
        f"{path} has {n_positions} positions, which are no square grid. Choose weights trained on square images"
    )


def _has_bias(state: "Mapping[str, torch.Tensor]", path: Path) -> bool:
    """Whether a DINOv3 attention has a bias. Released weights carry one of zeros, which timm leaves out.

    Raises DinosearchError for keys with a bias: a rotation follows, so it counts, and timm has no place for it.
    """
    if "pos_embed" in state or "blocks.0.attn.q_bias" in state:
        return True
    found = False
    for name, bias in state.items():
        if name.endswith("attn.qkv.bias"):
            queries, keys, values = bias.float().chunk(3)
            masked = name.replace("qkv.bias", "qkv.bias_mask") in state
            if not masked and keys.any():
                raise DinosearchError(
                    f"{path} has a bias on attention keys, which timm's DINOv3 lacks. "
                    "Choose released weights, or ones trained with mask_k_bias"
                )
            found = found or bool(queries.any() or values.any())
    return found


def _facts_beside(path: Path) -> ModelFacts | None:
    """Our own weights say what they are in the file next to them."""
    if path.name == "weights.safetensors" and path.with_name("model.json").is_file():
        return open_model(path.parent).facts()
    return None


def _facts(layout: _Layout, path: Path) -> ModelFacts:
    """timm's name and arguments for a layout, and timm's preprocessing for its family."""
    import timm

    arch, family = _arch(layout)
    head_dim = layout.head_dim or _HEAD_DIMS.get(arch, 64)
    if layout.dim % head_dim:
        raise DinosearchError(
            f"{path} has vectors of {layout.dim}, which heads of {head_dim} do not divide, so their number cannot be "
            "told. Keep model.json beside weights.safetensors, or choose released weights"
        )
    arch_kwargs: dict[str, Any] = {
        "patch_size": layout.patch,
        "embed_dim": layout.dim,
        "depth": layout.depth,
        "num_heads": layout.dim // head_dim,
    }
    if layout.gated or layout.n_hidden != 4 * layout.dim:
        # timm multiplies and truncates: the next float up keeps 3 · (2/3) from becoming 1.
        arch_kwargs["mlp_ratio"] = math.nextafter(layout.n_hidden / layout.dim, math.inf)
    if layout.grid is None:
        arch_kwargs["num_reg_tokens"] = layout.n_registers
    elif layout.n_registers or not layout.class_position:
        arch_kwargs |= {"reg_tokens": layout.n_registers, "no_embed_class": not layout.class_position}
    if family.endswith(".lvd1689m") and "sat493m" in path.name:
        family = "vit_large_patch16_dinov3.sat493m"
    config = timm.get_pretrained_cfg(family)
    assert config is not None
    native = layout.grid * layout.patch if layout.grid else config.input_size[-1]
    red, green, blue = config.mean
    red_std, green_std, blue_std = config.std
    return ModelFacts(
        arch=arch,
        arch_kwargs=arch_kwargs,
        image_size=native,
        crop_pct=float(config.crop_pct),
        interpolation=config.interpolation,
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        pooling="token",
    )


def _arch(layout: _Layout) -> tuple[str, str]:
    """timm's nearest architecture, to be corrected by arguments, and a name whose preprocessing is the family's."""
    import timm

    size = _SIZES.get((layout.dim, layout.depth), "small")
    if layout.grid is None:
        kind = f"patch16_dinov3{'_qkvb' if layout.qkv_bias else ''}"
        plus = "_plus" if layout.gated and size != "7b" else ""
        name, fallback = f"vit_{size}{plus}_{kind}", f"vit_small{'_plus' if layout.gated else ''}_{kind}"
        family = "vit_small_patch16_dinov3.lvd1689m"
    elif layout.layer_scale:
        kind = f"patch14{'_reg4' if layout.n_registers == 4 else ''}_dinov2"
        fallback = f"vit_{'giant' if layout.gated else 'small'}_{kind}"
        name = f"vit_{size}_{kind}" if layout.gated == (size == "giant") else fallback
        family = "vit_small_patch14_dinov2.lvd142m"
    else:
        name, fallback = f"vit_{size}_patch{layout.patch}_224", "vit_small_patch16_224"
        family = "vit_small_patch16_224.dino"
    return name if timm.is_model(name) else fallback, family


def square_for(wanted: int | None, native: int, patch: int) -> int:
    """The side asked for, else the native one if it is small, else the multiple of the patch nearest to 224.

    Raises DinosearchError for one that patches do not fill.
    """
    if wanted is None:
        return native if native <= LARGEST_DEFAULT_SIZE and native % patch == 0 else round(224 / patch) * patch
    if wanted < patch or wanted % patch:
        below = max(wanted // patch, 1) * patch
        raise DinosearchError(
            f"an image size of {wanted} px is no multiple of the model's patches of {patch} px. "
            f"Use --image-size {below} or {below + patch}"
        )
    return wanted


def _at_size(facts: ModelFacts, image_size: int, patch: int) -> ModelFacts:
    """With the greatest common divisor of stripes and rows of patches as stripes: so they can be cut."""
    stripes = math.gcd(facts.stripes, image_size // patch)
    kwargs = facts.arch_kwargs | {"img_size": image_size}
    return replace(facts, image_size=image_size, arch_kwargs=kwargs, stripes=stripes)


def _converted(state: "dict[str, torch.Tensor]", vit: "torch.nn.Module", path: Path) -> "dict[str, torch.Tensor]":
    """The tensors under timm's names, positions resampled to the model's grid, by timm's own filters."""
    import torch
    from timm.models import eva, vision_transformer

    broken = [name for name, tensor in state.items() if "mask" not in name and not torch.isfinite(tensor).all()]
    if broken:
        raise DinosearchError(f"{path} holds numbers that are not finite ({broken[0]}). Choose an earlier checkpoint")
    if isinstance(vit, eva.Eva):
        if "reg_token" not in state:
            # timm knows DINOv3 by these; training without them leaves them out.
            dim = state[_PATCHES].shape[0]
            state.setdefault("storage_tokens", torch.empty(1, 0, dim))
        if getattr(vit.blocks[0].attn, "q_bias", None) is None:
            state = {name: tensor for name, tensor in state.items() if not name.endswith("attn.qkv.bias")}
        converted = eva.checkpoint_filter_fn(state, vit)
        if vit.reg_token is None:
            converted.pop("reg_token", None)
        return converted
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        # timm knows DINOv2 by this token of its training, which some files leave out.
        state.setdefault("mask_token", torch.empty(0))
    if isinstance(vit, vision_transformer.VisionTransformer):
        return vision_transformer.checkpoint_filter_fn(state, vit)
    return state


def _mismatch(error: BaseException) -> str:
    """The part of torch's message that names a tensor."""
    lines = str(error).strip().splitlines()
    return (lines[1] if len(lines) > 1 else first_line(error)).strip()[:160]
