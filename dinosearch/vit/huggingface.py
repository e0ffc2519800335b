"""A ViT's tensors under the names of Hugging Face transformers, with the configuration that says how to use them.

Knows three architectures there: `vit` (no registers, no LayerScale: DINO's), `dinov2` and `dinov2_with_registers`. All
others go in as `timm_wrapper`, timm's own module within transformers, which needs timm beside it.
Imports no transformers; what it writes is compared with the source by who calls it.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinosearch.vit.folder import ModelFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESAMPLING = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, as transformers has them."""


def write_huggingface(model: ModelFolder, vit: "torch.nn.Module", folder: Path) -> str | None:
    """Write config.json, model.safetensors and preprocessor_config.json; `pooler_output` is the model's vector.

    But for stripes, of which transformers knows nothing: `last_hidden_state` has the patches that they are means of.
    vit: the model's own, as `ModelFolder.load_vit` gives it. Returns why it is none of transformers' own architectures,
    if it is not.
    """
    from safetensors.torch import save_file

    foreign = _why_foreign(model, vit)
    config, tensors = _wrapped(model, vit) if foreign else _converted(vit)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    preprocessing = json.dumps(_preprocessing(model), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(preprocessing, encoding="utf-8")
    return foreign


def _why_foreign(model: ModelFolder, vit: Any) -> str | None:
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import nn

    def plain(block: Any) -> bool:
        attention, mlp = block.attn, block.mlp
        return (
            type(block) is Block
            and type(attention) is Attention
            and type(mlp) is Mlp
            and all(isinstance(m, nn.Identity) for m in (attention.q_norm, attention.norm, mlp.norm))
            and getattr(attention, "gate", None) is None
            and type(mlp.act) is nn.GELU
            and mlp.act.approximate == "none"
            and type(block.norm1) is type(vit.norm)
            and attention.qkv.bias is not None
        )

    if type(vit) is not VisionTransformer or type(vit.patch_embed) is not PatchEmbed:
        return f"timm's {type(vit).__name__} is none of its ViT, Dinov2 or Dinov2WithRegisters"
    if model.pooling != "token" or vit.cls_token is None:
        return "its vector is the class token's, this model's is not"
    if vit.pos_embed is None or not isinstance(vit.norm_pre, nn.Identity) or not isinstance(vit.norm, nn.LayerNorm):
        return "its position embeddings or norms are others"
    if not all(map(plain, vit.blocks)):
        return "its blocks are others than this model's (activation, gates, normalised queries or SwiGLU)"
    return None


def _wrapped(model: ModelFolder, vit: Any) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    side = model.image_size
    config = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": model.arch.split(".")[0],  # what comes behind a dot names weights
        "model_args": model.arch_kwargs | {"global_pool": model.pooling},
        "num_features": vit.num_features,
        "num_classes": 0,
        "do_pooling": True,
        "pretrained_cfg": {
            "input_size": [model.channels, side, side],
            "interpolation": model.interpolation,
            "crop_pct": model.crop_pct,
            "mean": list(model.mean),
            "std": list(model.std),
            "num_classes": 0,
        },
        "torch_dtype": "float32",
    }
    return config, {f"timm_model.{name}": tensor for name, tensor in vit.state_dict().items()}


def _converted(vit: Any) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    import torch

    state = vit.state_dict()
    block = vit.blocks[0]
    dim, n_registers = vit.embed_dim, vit.num_reg_tokens
    scaled = hasattr(block.ls1, "gamma")
    model_type = "dinov2_with_registers" if n_registers else "dinov2" if scaled else "vit"
    side = list(vit.patch_embed.img_size)
    patch = list(vit.patch_embed.patch_size)
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm.eps,
        "image_size": side[0] if side[0] == side[1] else side,
        "patch_size": patch[0] if patch[0] == patch[1] else patch,
        "num_channels": vit.patch_embed.proj.in_channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    tensors = {
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    } | _embeddings(vit, n_registers)
    for name, tensor in state.items():
        if name.startswith("blocks."):
            tensors |= _block_tensors(name, tensor, with_mlp_names=model_type != "vit")
    hidden = block.mlp.fc1.out_features
    if model_type == "vit":
        config |= {"architectures": ["ViTModel"], "intermediate_size": hidden}
        # ViT pools through a dense layer and an activation: the identity, so that its output is our vector
        config |= {"pooler_act": "linear", "pooler_output_size": dim}
        tensors |= {"pooler.dense.weight": torch.eye(dim), "pooler.dense.bias": torch.zeros(dim)}
    else:
        ratio = hidden / dim
        name = "Dinov2WithRegistersModel" if n_registers else "Dinov2Model"
        config |= {"architectures": [name], "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}
        config |= {"num_register_tokens": n_registers} if n_registers else {}
        tensors["embeddings.mask_token"] = torch.zeros(1, dim)  # of training; nothing is masked later
        for i in range(0 if scaled else len(vit.blocks)):  # registers without LayerScale: a scale of 1
            tensors |= {f"encoder.layer.{i}.layer_scale{n}.lambda1": torch.ones(dim) for n in (1, 2)}
    return config, tensors


def _embeddings(vit: Any, n_registers: int) -> dict[str, "Tensor"]:
    """Class, register and position tensors. Theirs has a position for the class token and none for registers."""
    import torch

    positions, class_token = vit.pos_embed, vit.cls_token
    n_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    own = positions[:, :n_prefix]
    class_position = own[:, :1] if n_prefix else torch.zeros_like(class_token)
    tensors = {
        "embeddings.cls_token": class_token,
        "embeddings.position_embeddings": torch.cat([class_position, positions[:, n_prefix:]], dim=1),
    }
    if n_registers:
        tensors["embeddings.register_tokens"] = vit.reg_token + own[:, 1:] if n_prefix else vit.reg_token
    return tensors


def _block_tensors(name: str, tensor: "Tensor", *, with_mlp_names: bool) -> dict[str, "Tensor"]:
    """One of timm's tensors of a block → theirs. Both libraries' versions read this layout, the oldest."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias|\.gamma)", name)
    assert found, name
    layer, part, kind = f"encoder.layer.{found[1]}", found[2], found[3]
    if part == "attn.qkv":
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{layer}.attention.attention.{word}{kind}": piece for word, piece in parts}
    if kind == ".gamma":
        return {f"{layer}.layer_scale{part[-1]}.lambda1": tensor}
    words = {"attn.proj": "attention.output.dense"} | (
        {}
        if with_mlp_names
        else {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }
    )
    return {f"{layer}.{words.get(part, part)}{kind}": tensor}


def _preprocessing(model: ModelFolder) -> dict[str, Any]:
    """For AutoImageProcessor. Padding ("fit": "pad") has no word there: the square is then made by squashing."""
    side = model.image_size
    cropped = model.fit == "crop"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / model.crop_pct)} if cropped else {"height": side, "width": side},
        "resample": _RESAMPLING[model.interpolation],
        "do_center_crop": cropped,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }
