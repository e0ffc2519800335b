"""Every layout is compared with the original forward pass, written here as plain tensor operations."""

import argparse
import math
import os
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import ModelFacts, create_vit, save_model
from dinosearch.vit.released import read_released

DIM, DEPTH, PATCH, GRID = 128, 3, 4, 4
SIZE = PATCH * GRID


def tensors(shapes, seed=0, scale=0.2):
    """Random tensors big enough that a wrong order of operations shows."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}


def block_shapes(prefix, *, dim, layer_scale=False, mlp="mlp", hidden=None):
    hidden = hidden or 4 * dim
    shapes = {
        f"{prefix}norm1.weight": (dim,),
        f"{prefix}norm1.bias": (dim,),
        f"{prefix}attn.qkv.weight": (3 * dim, dim),
        f"{prefix}attn.qkv.bias": (3 * dim,),
        f"{prefix}attn.proj.weight": (dim, dim),
        f"{prefix}attn.proj.bias": (dim,),
        f"{prefix}norm2.weight": (dim,),
        f"{prefix}norm2.bias": (dim,),
    }
    layers = {
        "mlp": {"fc1": (hidden, dim), "fc2": (dim, hidden)},
        "packed": {"w12": (2 * hidden, dim), "w3": (dim, hidden)},
        "split": {"w1": (hidden, dim), "w2": (hidden, dim), "w3": (dim, hidden)},
    }[mlp]
    for layer, shape in layers.items():
        shapes[f"{prefix}mlp.{layer}.weight"] = shape
        shapes[f"{prefix}mlp.{layer}.bias"] = shape[:1]
    if layer_scale:
        shapes |= {f"{prefix}ls1.gamma": (dim,), f"{prefix}ls2.gamma": (dim,)}
    return shapes


def backbone_shapes(*, dim=DIM, depth=DEPTH, patch=PATCH, extra, **block):
    shapes = {
        "cls_token": (1, 1, dim),
        **extra,
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}.", dim=dim, **block)
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def dino_shapes(*, dim=DIM, grid=GRID, **kwargs):
    return backbone_shapes(dim=dim, extra={"pos_embed": (1, 1 + grid * grid, dim)}, **kwargs)


def dinov2_shapes(*, dim=DIM, grid=GRID, registers=0, **kwargs):
    extra = {"pos_embed": (1, 1 + grid * grid, dim)}
    if registers:
        extra["register_tokens"] = (1, registers, dim)
    return backbone_shapes(dim=dim, extra=extra | {"mask_token": (1, dim)}, layer_scale=True, **kwargs)


def dinov3_shapes(*, dim=DIM, registers=4, **kwargs):
    extra = {"storage_tokens": (1, registers, dim)} if registers else {}
    return backbone_shapes(dim=dim, extra=extra | {"mask_token": (1, dim)}, layer_scale=True, **kwargs)


def dinov3_tensors(*, dim=DIM, heads=DIM // 64, depth=DEPTH, bias=0.0, seed=0, **kwargs):
    """DINOv3 releases: rotary periods, and a mask that takes the bias from the keys."""
    state = tensors(dinov3_shapes(dim=dim, depth=depth, **kwargs), seed)
    quarter = dim // heads // 4
    state["rope_embed.periods"] = 100 ** (2 * torch.arange(quarter).float() / (dim // heads // 2))
    for i in range(depth):
        state[f"blocks.{i}.attn.qkv.bias"] *= bias
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim)
    return state


def patches_of(state, images):
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    return F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)  # [n, patches, dim]


def layer_norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def run_blocks(state, x, *, heads, eps, rotate=None):
    """Pre-norm attention and MLP, as in all three papers; the class token of the last norm."""
    n, n_tokens, dim = x.shape
    depth = 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name)))
    for i in range(depth):
        b = f"blocks.{i}."
        bias = state[f"{b}attn.qkv.bias"] * state.get(f"{b}attn.qkv.bias_mask", torch.ones(3 * dim))
        qkv = F.linear(layer_norm(state, f"{b}norm1", x, eps), state[f"{b}attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(n, n_tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(dim // heads)).softmax(-1)
        mixed = linear(state, f"{b}attn.proj", (attention @ v).transpose(1, 2).reshape(n, n_tokens, dim))
        x = x + mixed * state.get(f"{b}ls1.gamma", torch.ones(dim))
        h = layer_norm(state, f"{b}norm2", x, eps)
        if f"{b}mlp.w12.weight" in state:
            gate, value = linear(state, f"{b}mlp.w12", h).chunk(2, dim=-1)
            h = linear(state, f"{b}mlp.w3", F.silu(gate) * value)
        elif f"{b}mlp.w1.weight" in state:
            h = linear(state, f"{b}mlp.w3", F.silu(linear(state, f"{b}mlp.w1", h)) * linear(state, f"{b}mlp.w2", h))
        else:
            h = linear(state, f"{b}mlp.fc2", F.gelu(linear(state, f"{b}mlp.fc1", h)))
        x = x + h * state.get(f"{b}ls2.gamma", torch.ones(dim))
    return layer_norm(state, "norm", x, eps)[:, 0]


def dino_vectors(state, images, *, heads=DIM // 64, positions=None):
    """DINO and DINOv2: class token and patches get positions; registers slip in between, without any."""
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches_of(state, images)], dim=1)
    x = x + (state["pos_embed"] if positions is None else positions)
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(images), -1, -1), x[:, 1:]], dim=1)
    return run_blocks(state, x, heads=heads, eps=1e-6)


def dinov3_vectors(state, images, *, heads=DIM // 64):
    """DINOv3: no added positions; queries and keys of patches rotate by their place in -1..1, row and column apart."""
    patches = patches_of(state, images)
    prefix = [state["cls_token"], state["storage_tokens"]] if "storage_tokens" in state else [state["cls_token"]]
    x = torch.cat([*(token.expand(len(images), -1, -1) for token in prefix), patches], dim=1)
    side = math.isqrt(patches.shape[1])
    place = 2 * (torch.arange(side) + 0.5) / side - 1
    places = torch.stack(torch.meshgrid(place, place, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = (2 * math.pi * places[:, :, None] / state["rope_embed.periods"]).flatten(1).tile(2)  # [patches, head_dim]
    n_prefix = x.shape[1] - len(angles)

    def rotate(z):
        half = z.shape[-1] // 2
        turned = torch.cat([-z[..., half:], z[..., :half]], dim=-1)
        rotated = z[:, :, n_prefix:] * angles.cos() + turned[:, :, n_prefix:] * angles.sin()
        return torch.cat([z[:, :, :n_prefix], rotated], dim=2)

    return run_blocks(state, x, heads=heads, eps=1e-5, rotate=rotate)


def images(size=SIZE, n=3):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def assert_same_vectors(vit, expected, *, size=SIZE):
    with torch.inference_mode():
        found = vit(images(size))
    assert found.shape == expected.shape
    assert F.cosine_similarity(found, expected).min() > 1 - 1e-6
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def write(path, content):
    torch.save(content, path)
    return path


def test_dino_backbone_matches_the_original_forward_pass(tmp_path):
    state = tensors(dino_shapes())
    vit, facts = read_released(write(tmp_path / "dino.pth", state), image_size=None)
    assert not vit.training
    assert (facts.image_size, facts.crop_pct, facts.interpolation, facts.pooling) == (SIZE, 0.9, "bicubic", "token")
    assert_same_vectors(vit, dino_vectors(state, images()))


def test_full_dino_checkpoint_gives_its_teacher(tmp_path):
    student, teacher = tensors(dino_shapes(), seed=1), tensors(dino_shapes(), seed=2)
    head = tensors({"mlp.0.weight": (8, DIM), "last_layer.weight_g": (16, 1), "last_layer.weight_v": (16, 8)})
    checkpoint = {
        "student": {
            **{f"module.backbone.{name}": t for name, t in student.items()},
            **{f"module.head.{name}": t for name, t in head.items()},
        },
        "teacher": {
            **{f"backbone.{name}": t for name, t in teacher.items()},
            **{f"head.{name}": t for name, t in head.items()},
        },
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=PATCH, lr=0.0005, use_fp16=True),
        "dino_loss": {"center": torch.zeros(1, 16)},
        "fp16_scaler": {"scale": 65536.0, "growth_interval": 2000},
    }
    path = write(tmp_path / "checkpoint.pth", checkpoint)
    assert_same_vectors(read_released(path, image_size=None)[0], dino_vectors(teacher, images()))
    del checkpoint["teacher"]
    path = write(tmp_path / "student.pth", checkpoint)
    assert_same_vectors(read_released(path, image_size=None)[0], dino_vectors(student, images()))


def test_a_flat_mix_of_student_and_momentum_encoder_gives_the_momentum_encoder(tmp_path):
    student, teacher = tensors(dino_shapes(), seed=1), tensors(dino_shapes(), seed=2)
    mixed = {f"backbone.{name}": t for name, t in student.items()}
    mixed |= {f"momentum_backbone.{name}": t for name, t in teacher.items()}
    path = write(tmp_path / "last.pt", {"state_dict": mixed, "epoch": 3})
    assert_same_vectors(read_released(path, image_size=None)[0], dino_vectors(teacher, images()))


@pytest.mark.parametrize(
    ("wrapper", "kept", "other"),
    [
        (None, "backbone.", "head."),
        (None, "module.backbone.", "module.head."),
        ("state_dict", "backbone.", "classifier."),  # solo-learn, its classifier trained online
        ("state_dict", "momentum_backbone.", "backbone."),
        ("state_dict", "teacher_backbone.vit.", "student_backbone.vit."),  # lightly
        ("state_dict", "model.teacher.backbone.", "model.student.backbone."),
        (None, "_model.", "_pool."),  # lightly-train, --part model or embedding_model
        ("model", "wrapped_model._model.", "pool."),
        ("model_state_dict", "", ""),
    ],
)
def test_state_dicts_of_other_libraries_are_unwrapped(tmp_path, wrapper, kept, other):
    state, wrong = tensors(dinov2_shapes(registers=4), seed=1), tensors(dinov2_shapes(registers=4), seed=2)
    if "backbone" not in other:
        wrong = tensors({"0.weight": (8, DIM)}) if kept else {}
    mixed = {f"{other}{name}": t for name, t in wrong.items()} | {f"{kept}{name}": t for name, t in state.items()}
    path = write(tmp_path / "last.ckpt", {wrapper: mixed, "epoch": 3, "hyper_parameters": {}} if wrapper else mixed)
    assert_same_vectors(read_released(path, image_size=None)[0], dino_vectors(state, images()))


@pytest.mark.parametrize("registers", [0, 4, 2])
@pytest.mark.parametrize("mlp", ["mlp", "packed"])
def test_dinov2_matches_the_original_forward_pass(tmp_path, registers, mlp):
    hidden = {"mlp": 4 * DIM, "packed": 344}[mlp]  # two thirds of four times the width, up to a multiple of 8
    state = tensors(dinov2_shapes(registers=registers, mlp=mlp, hidden=hidden))
    vit, facts = read_released(write(tmp_path / "dinov2.pth", state), image_size=None)
    assert facts.crop_pct == 1.0
    assert_same_vectors(vit, dino_vectors(state, images()))


def test_dinov2_without_its_mask_token_still_gets_registers_right(tmp_path):
    state = tensors(dinov2_shapes(registers=4))
    del state["mask_token"]
    vit, _ = read_released(write(tmp_path / "dinov2.bin", state), image_size=None)
    assert_same_vectors(vit, dino_vectors(state, images()))


def test_blocks_of_dinov2_training_are_unchunked(tmp_path):
    state = tensors(dinov2_shapes(registers=4, depth=4))
    chunked = {re.sub(r"^blocks\.(\d)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", k): v for k, v in state.items()}
    assert "blocks.1.3.norm1.weight" in chunked
    teacher = {f"backbone.{name}": t for name, t in chunked.items()}
    teacher |= tensors({"dino_head.mlp.0.weight": (8, DIM), "ibot_head.mlp.0.weight": (8, DIM)})
    path = write(tmp_path / "teacher_checkpoint.pth", {"teacher": teacher})
    assert_same_vectors(read_released(path, image_size=None)[0], dino_vectors(state, images()))


@pytest.mark.parametrize(("mlp", "hidden"), [("mlp", None), ("split", 4 * DIM), ("split", 3 * DIM)])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_dinov3_matches_the_original_forward_pass(tmp_path, capsys, mlp, hidden, bias):
    state = dinov3_tensors(bias=bias, mlp=mlp, hidden=hidden)
    vit, facts = read_released(write(tmp_path / "dinov3.pth", state), image_size=64)
    assert facts.crop_pct == 1.0
    assert facts.arch.endswith("_qkvb") == bool(bias)
    assert_same_vectors(vit, dinov3_vectors(state, images(64)), size=64)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("registers", [0, 1])
def test_dinov3_with_other_counts_of_registers_and_wider_heads(tmp_path, registers):
    state = dinov3_tensors(registers=registers, heads=1)  # one head of 128, as in the 7B
    state["local_cls_norm.weight"] = torch.ones(DIM)
    state["local_cls_norm.bias"] = torch.ones(DIM)
    vit, _ = read_released(write(tmp_path / "dinov3.pth", {"teacher": state}), image_size=64)
    assert_same_vectors(vit, dinov3_vectors(state, images(64), heads=1), size=64)


def test_dinov3_in_safetensors_under_any_suffix(tmp_path):
    state = dinov3_tensors(mlp="split", hidden=4 * DIM, patch=16)
    for name in ("model.safetensors", "model.bin"):
        save_file(state, tmp_path / name)
        vit, facts = read_released(tmp_path / name, image_size=None)
        assert facts.image_size == 256
        assert_same_vectors(vit, dinov3_vectors(state, images(256)), size=256)


def test_a_biased_key_is_refused_where_timm_has_no_place_for_it(tmp_path):
    state = {name: t for name, t in dinov3_tensors(bias=1.0).items() if "bias_mask" not in name}
    with pytest.raises(DinosearchError, match=r"bias on attention keys.*mask_k_bias"):
        read_released(write(tmp_path / "dinov3.pth", state), image_size=None)


@pytest.mark.parametrize(
    ("arch", "size"),
    [("vit_small_patch14_reg4_dinov2", 56), ("vit_small_patch16_dinov3_qkvb", 64), ("deit3_small_patch16_224", 64)],
)
def test_timm_layout_round_trips(tmp_path, arch, size):
    vit = timm.create_model(arch, num_classes=5, img_size=size, global_pool="token", depth=2).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    path = write(tmp_path / "model.pt", {"state_dict": vit.state_dict()})
    read, _ = read_released(path, image_size=size)
    vit.reset_classifier(0)
    with torch.inference_mode():
        expected = vit(images(size))
    assert_same_vectors(read, expected, size=size)


def test_own_weights_are_read_with_the_facts_beside_them(tmp_path):
    kwargs = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
    facts = ModelFacts(arch="vit_tiny_patch16_224", arch_kwargs=kwargs, image_size=28, fit="pad", mean=(0.5, 0.5, 0.5))
    vit = create_vit(facts).eval()
    model = save_model(tmp_path / "own", vit, facts, trained={})
    read, read_facts = read_released(model.weights_path, image_size=None)
    assert read_facts == facts
    assert torch.equal(read(images(28)), vit(images(28)))
    _, larger = read_released(model.weights_path, image_size=56)
    assert (larger.image_size, larger.arch_kwargs["img_size"], larger.fit) == (56, 56, "pad")


def test_positions_are_resampled_to_the_size_asked_for(tmp_path):
    state = tensors(dinov2_shapes(registers=4, grid=6))
    path = write(tmp_path / "dinov2.pth", state)
    vit, facts = read_released(path, image_size=32)
    assert facts.image_size == facts.arch_kwargs["img_size"] == 32
    # DINOv2 with registers resamples at run time: antialiased, and no offset.
    grid = state["pos_embed"][:, 1:].reshape(1, 6, 6, DIM).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 64, DIM)
    positions = torch.cat([state["pos_embed"][:, :1], grid], dim=1)
    assert_same_vectors(vit, dino_vectors(state, images(32), positions=positions), size=32)


def test_half_precision_is_read_as_float32(tmp_path):
    state = {name: t.bfloat16() for name, t in tensors(dino_shapes()).items()}
    vit, _ = read_released(write(tmp_path / "half.pth", state), image_size=None)
    assert {p.dtype for p in vit.parameters()} == {torch.float32}
    assert_same_vectors(vit, dino_vectors({name: t.float() for name, t in state.items()}, images()))


RELEASES = {
    "vit_small_patch16_224.dino": (dino_shapes, {"dim": 384, "depth": 12, "patch": 16, "grid": 14}),
    "vit_small_patch8_224.dino": (dino_shapes, {"dim": 384, "depth": 12, "patch": 8, "grid": 28}),
    "vit_base_patch16_224.dino": (dino_shapes, {"dim": 768, "depth": 12, "patch": 16, "grid": 14}),
    "vit_base_patch8_224.dino": (dino_shapes, {"dim": 768, "depth": 12, "patch": 8, "grid": 28}),
    "vit_small_patch14_dinov2.lvd142m": (dinov2_shapes, {"dim": 384, "depth": 12, "patch": 14, "grid": 37}),
    "vit_large_patch14_reg4_dinov2.lvd142m": (
        dinov2_shapes,
        {"dim": 1024, "depth": 24, "patch": 14, "grid": 37, "registers": 4},
    ),
    "vit_giant_patch14_reg4_dinov2.lvd142m": (
        dinov2_shapes,
        {"dim": 1536, "depth": 40, "patch": 14, "grid": 37, "registers": 4, "mlp": "packed", "hidden": 4096},
    ),
    "vit_small_patch16_dinov3.lvd1689m": (dinov3_shapes, {"dim": 384, "depth": 12, "patch": 16}),
    "vit_small_plus_patch16_dinov3.lvd1689m": (
        dinov3_shapes,
        {"dim": 384, "depth": 12, "patch": 16, "mlp": "split", "hidden": 1536},
    ),
    "vit_large_patch16_dinov3.sat493m": (dinov3_shapes, {"dim": 1024, "depth": 24, "patch": 16}),
    "vit_huge_plus_patch16_dinov3.lvd1689m": (
        dinov3_shapes,
        {"dim": 1280, "depth": 32, "patch": 16, "mlp": "split", "hidden": 5120},
    ),
    "vit_7b_patch16_dinov3.lvd1689m": (
        dinov3_shapes,
        {"dim": 4096, "depth": 40, "patch": 16, "mlp": "split", "hidden": 8192},
    ),
}


SLOW = ("vit_giant", "vit_huge", "vit_7b")  # billions of numbers to look at


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith(SLOW) else n for n in RELEASES]
)
@pytest.mark.filterwarnings("ignore:.*is a no-op")
def test_released_layouts_become_timms_model_of_that_name(tmp_path, name):
    shapes, sizes = RELEASES[name]
    # One number, seen as tensors of full size: the file is small, and nothing large is computed.
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes(**sizes).items()}
    path = write(tmp_path / f"{name}-deadbeef.pth", state)
    with torch.device("meta"):
        vit, facts = read_released(path, image_size=None)
        expected = timm.create_model(name, num_classes=0, global_pool="token", img_size=facts.image_size)
    config = timm.get_pretrained_cfg(name)
    assert facts.arch == name.split(".")[0]
    assert facts.image_size == (224 if config.input_size[-1] > 256 else config.input_size[-1])
    assert (facts.crop_pct, facts.interpolation) == (config.crop_pct, config.interpolation)
    assert (facts.mean, facts.std) == (config.mean, config.std)
    assert {k: t.shape for k, t in vit.state_dict().items()} == {k: t.shape for k, t in expected.state_dict().items()}
    assert vit.blocks[0].attn.num_heads == expected.blocks[0].attn.num_heads


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Kind → (file, what its message says)."""
    flat = tensors(dino_shapes())
    whole = write(folder / "whole.pth", flat).read_bytes()
    save_file(flat, folder / "whole.safetensors")
    whole_safe = (folder / "whole.safetensors").read_bytes()

    def put(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    def without(*names):
        return {k: v for k, v in flat.items() if not k.startswith(names)}

    return {
        "code": (write(folder / "code.pth", {"teacher": Exploit()}), r"run code.*(posix|nt)\.mkdir.*state_dict"),
        "module": (write(folder / "module.pth", torch.nn.Linear(2, 2)), "run code.*Linear.*state_dict"),
        "truncated": (put("truncated.pth", whole[:-2000]), "damaged or incomplete.*again"),
        "half": (put("half.pth", whole[: len(whole) // 2]), "damaged or incomplete.*again"),
        "truncated safetensors": (put("t.safetensors", whole_safe[:-2000]), "damaged or incomplete.*again"),
        "noise": (put("noise.pth", bytes(range(256)) * 40), "no checkpoint.*again"),
        "text": (put("text.pth", b"hello there\n" * 20), "no checkpoint.*again"),
        "web page": (put("page.pth", b"\n<!DOCTYPE html><html>404 Not Found</html>"), "web page.*Download"),
        "lfs": (put("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        "empty": (put("empty.pth", b""), "empty.*Download"),
        "folder": (folder, "cannot be read"),
        "missing": (folder / "nowhere.pth", "cannot be read"),
        "list": (write(folder / "list.pth", [torch.zeros(2)]), "holds a list.*state_dict"),
        "no tensors": (write(folder / "nothing.pth", {"epoch": 3}), "holds no tensors.*Expected"),
        "resnet": (
            write(folder / "resnet.pth", {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}),
            "holds a ResNet.*Expected",
        ),
        "convnext": (
            write(folder / "convnext.pth", {"downsample_layers.0.0.weight": torch.zeros(1)}),
            "holds a ConvNeXt.*Expected",
        ),
        "xcit": (write(folder / "xcit.pth", {"patch_embed.proj.0.0.weight": torch.zeros(1)}), "holds an XCiT"),
        "linear head": (
            write(folder / "linear.pth", {"state_dict": {"module.linear.weight": torch.zeros(1)}}),
            r"other tensors \(module.linear.weight\)",
        ),
        "transformers": (
            write(folder / "hf.pth", {"embeddings.patch_embeddings.projection.weight": torch.zeros(1)}),
            "layout of transformers.*timm:",
        ),
        "block gone": (write(folder / "gone.pth", without("blocks.1.")), r"lacks blocks.*\[0, 2\].*again"),
        "norm gone": (write(folder / "norm.pth", without("norm.")), "does not fit.*norm.weight.*again"),
        "mlp gone": (write(folder / "mlp.pth", without("blocks.0.mlp.fc1")), "lacks blocks.0.mlp.fc1.weight"),
        "depth image": (
            write(folder / "rgbd.pth", flat | {"patch_embed.proj.weight": torch.zeros(DIM, 4, PATCH, PATCH)}),
            "4 channels.*RGB",
        ),
        "oblong": (
            write(folder / "oblong.pth", flat | {"pos_embed": torch.zeros(1, 1 + 6, DIM)}),
            "no square grid.*square images",
        ),
        "odd width": (write(folder / "odd.pth", tensors(dino_shapes(dim=96))), "heads of 64.*model.json"),
        "not finite": (
            write(folder / "nan.pth", flat | {"norm.weight": torch.full((DIM,), torch.nan)}),
            r"not finite \(norm.weight\).*earlier",
        ),
        "clip": (
            write(folder / "clip.pth", flat | {"norm_pre.weight": torch.zeros(DIM)}),
            "does not fit.*norm_pre.weight",
        ),
    }


def test_files_that_cannot_be_used_say_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, (path, message) in broken_files(tmp_path).items():
        with pytest.raises(DinosearchError) as raised:
            read_released(path, image_size=None)
        assert re.search(message, str(raised.value)), f"{kind}: {raised.value}"
        assert "\n" not in str(raised.value), kind
        assert str(path) in str(raised.value), kind
        assert "weights_only" not in str(raised.value), kind
    assert not Path("exploited").exists()


@pytest.mark.parametrize("cut", [100, 1000, 5000])
def test_a_checkpoint_cut_or_altered_anywhere_raises_nothing_but_our_error(tmp_path, cut):
    data = bytearray(write(tmp_path / "whole.pth", tensors(dino_shapes())).read_bytes())
    for position in range(0, min(len(data), 4000), 160):
        data[position] ^= 0xFF
    (tmp_path / "altered.pth").write_bytes(data[: len(data) - cut])
    with pytest.raises(DinosearchError):
        read_released(tmp_path / "altered.pth", image_size=None)


@pytest.mark.parametrize(("size", "advice"), [(18, "16 or 20"), (3, "4 or 8"), (0, "4 or 8"), (-4, "4 or 8")])
def test_an_image_size_that_patches_do_not_divide_is_refused(tmp_path, size, advice):
    path = write(tmp_path / "dino.pth", tensors(dino_shapes()))
    with pytest.raises(DinosearchError, match=f"patches of 4 px. Use --image-size {advice}"):
        read_released(path, image_size=size)
