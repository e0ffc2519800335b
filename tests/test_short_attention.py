"""Attention over few tokens: the numbers and names of timm's, in another layout; and crops of several sizes packed."""

import copy

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

from dinosearch.pretrain.net import Net, create_backbone
from dinosearch.pretrain.packed import can_pack
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.short_attention import ShortAttention, _scaled_bmm, _softmax, _softmax_backward, can_shorten


@pytest.mark.parametrize("n_tokens", [5, 17, 40])  # 16 to 31 have a softmax of their own in bf16
@pytest.mark.parametrize("bf16", [False, True])
def test_short_attention_gives_timms_outputs_and_gradients(bf16: bool, n_tokens: int) -> None:
    torch.manual_seed(0)
    plain = Attention(32, num_heads=4, qkv_bias=True)
    plain.fused_attn = False
    short = ShortAttention(copy.deepcopy(plain))
    tokens = torch.randn(6, n_tokens, 32)
    found = []
    for layer in (plain, short):
        x = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = layer(x)
        out.float().square().sum().backward()
        found.append((out.detach().float(), x.grad, *(p.grad for p in layer.parameters())))
    tolerance = 1e-2 if bf16 else 1e-5  # bf16 keeps 8 bits
    for from_plain, from_short in zip(*found, strict=True):
        torch.testing.assert_close(from_short, from_plain, atol=tolerance * from_plain.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_memory_held_before_is_in_no_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 17, 8).to(dtype), torch.randn(6, 8, 17).to(dtype)
    held = torch.full((6, 17, 17), torch.nan, dtype=dtype)
    torch.testing.assert_close(_scaled_bmm(a, b, 0.25, out=held), 0.25 * (a @ b))


@pytest.mark.parametrize("n_tokens", [5, 16, 17, 31, 32])
def test_a_softmax_in_bf16_is_rounded_once(n_tokens: int) -> None:
    torch.manual_seed(0)
    scores = (3 * torch.randn(64, n_tokens, n_tokens)).bfloat16()
    softmax = _softmax(scores)
    assert softmax.dtype == torch.bfloat16
    torch.testing.assert_close(softmax, scores.double().softmax(dim=-1).bfloat16(), rtol=2**-7, atol=1e-9)
    gradient = torch.randn(64, n_tokens, n_tokens).bfloat16()
    exact = softmax.double() * (gradient.double() - (softmax.double() * gradient.double()).sum(dim=-1, keepdim=True))
    found = _softmax_backward(gradient, softmax)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=1e-6)


def test_short_attention_keeps_timms_parameters_under_their_names() -> None:
    plain = Attention(16, num_heads=2, qkv_bias=True)
    before = plain.state_dict()
    after = ShortAttention(plain).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_attention_with_more_in_it_stays_timms() -> None:
    assert can_shorten(Attention(16, num_heads=2))
    assert not can_shorten(Attention(16, num_heads=2, qk_norm=True, norm_layer=torch.nn.LayerNorm))
    assert not can_shorten(Attention(16, num_heads=2, attn_drop=0.1))
    assert not can_shorten(Attention(16, num_heads=2, gated=True))


@pytest.mark.parametrize(("pooling", "stripes"), [("token", 1), ("avg", 1), ("avg", 2)])
def test_packed_sizes_give_the_features_and_gradients_of_each_by_itself(pooling: str, stripes: int) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}
    recipe = Recipe("vit_tiny_patch16_224", sizes, 28, 7, pooling=pooling, stripes=stripes)
    net = Net(create_backbone(recipe, drop_path_rate=0.0, device=torch.device("cpu")), {})
    assert can_pack(net.backbone)
    crops = [torch.randn(6, 3, 28, 28), torch.randn(12, 3, 14, 14)]
    weights = torch.randn(18, 32)
    made = []
    for features in (net.encode_sizes(*crops), torch.cat([net.encode(images)[0] for images in crops])):
        made.append([features, *torch.autograd.grad((features * weights).sum(), list(net.parameters()))])
    for packed, alone in zip(*made, strict=True):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5 * max(1.0, alone.abs().max().item()))


def test_a_distilled_deit_is_more_than_its_class_token() -> None:
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    recipe = Recipe("deit_tiny_distilled_patch16_224", sizes, 28, 7, pooling="token")
    net = Net(create_backbone(recipe, drop_path_rate=0.0, device=torch.device("cpu")), {}).eval()
    crops = [torch.randn(4, 3, 28, 28), torch.randn(4, 3, 14, 14)]
    torch.testing.assert_close(net.encode_sizes(*crops), torch.cat([net.encode(images)[0] for images in crops]))


def test_bf16_leaves_of_class_tokens_what_autocast_leaves() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 2}
    recipe = Recipe("vit_tiny_patch16_224", sizes, 28, 7, pooling="token")
    net = Net(create_backbone(recipe, drop_path_rate=0.0, device=torch.device("cpu")), {})
    crops = [torch.randn(32, 3, 28, 28), torch.randn(64, 3, 14, 14)]
    weights = torch.randn(96, 64)

    def made(*, bf16: bool, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = net.encode_sizes(*crops) if packed else torch.cat([net.encode(images)[0] for images in crops])
        gradients = torch.autograd.grad((features * weights).sum(), list(net.parameters()))
        return features.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    (features, gradients), by_torch = made(bf16=False, packed=False), made(bf16=True, packed=False)
    packed = made(bf16=True, packed=True)
    assert packed[0].dtype == torch.float32
    signal = (features - features.mean(dim=0)).norm()
    assert (packed[0] - features).norm() < 2 * (by_torch[0] - features).norm() < 0.05 * signal
    assert (packed[1] - gradients).norm() < 2 * (by_torch[1] - gradients).norm() < 0.05 * gradients.norm()


@pytest.mark.parametrize(
    ("changes", "drop_path_rate", "device"),
    [
        ({}, 0.1, "cpu"),
        ({}, 0.0, "cuda"),
        ({"accumulate": 2}, 0.0, "cpu"),
        ({"checkpoint_activations": True}, 0.0, "cpu"),
    ],
)
def test_what_cannot_be_packed_goes_size_by_size(changes: dict, drop_path_rate: float, device: str) -> None:
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    recipe = Recipe("vit_tiny_patch16_224", sizes, 28, 7, **changes)
    net = Net(create_backbone(recipe, drop_path_rate=drop_path_rate, device=torch.device(device)), {}).eval()
    assert not can_pack(net.backbone)
    crops = [torch.randn(4, 3, 28, 28), torch.randn(4, 3, 14, 14)]
    alone = torch.cat([net.encode(images)[0] for images in crops])
    torch.testing.assert_close(net.encode_sizes(*crops), alone)


def test_a_backbone_that_computes_otherwise_is_not_packed() -> None:
    class Other(VisionTransformer):
        def forward_features(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return super().forward_features(x, *args, **kwargs) + 1

    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    recipe = Recipe("vit_tiny_patch16_224", sizes, 28, 7)
    net = Net(create_backbone(recipe, drop_path_rate=0.0, device=torch.device("cpu")), {}).eval()
    crops = [torch.randn(4, 3, 28, 28), torch.randn(4, 3, 14, 14)]
    plain = net.encode_sizes(*crops)
    net.backbone.__class__ = Other
    torch.testing.assert_close(net.encode_sizes(*crops), plain + 1)
    assert not can_pack(timm.create_model("vit_small_patch16_dinov3", img_size=32))
