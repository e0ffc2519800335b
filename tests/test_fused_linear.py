"""Linear layers with LayerNorm, bias and GELU on the way: the numbers and gradients of the layers one by one."""

import copy

import pytest
import torch
from timm.layers import GluMlp, LayerNorm, LayerNormFp32, Mlp
from torch import nn

from dinosearch.pretrain import fused_linear
from dinosearch.pretrain.fused_linear import can_fuse, linear, normed_linear, normed_mlp


@pytest.fixture(params=["oneDNN", "no oneDNN"])
def with_and_without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no oneDNN":
        monkeypatch.setattr(fused_linear, "_has_pointwise", lambda _: False)


def layers() -> nn.Module:
    """As in a trained block: weights of LayerNorm that are not 1, and biases that are not 0."""
    torch.manual_seed(0)
    made = nn.ModuleDict({"norm": nn.LayerNorm(48, eps=1e-6), "linear": nn.Linear(48, 80), "mlp": Mlp(48, 96)})
    for parameter in made.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter is made["norm"].weight else 0.0, std=0.2)
    return made


@pytest.mark.usefixtures("with_and_without")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("which", ["linear", "normed_linear", "normed_mlp"])
def test_outputs_and_gradients_are_those_of_the_layers(which: str, bf16: bool) -> None:
    plain = layers()
    fused = copy.deepcopy(plain)

    def one_by_one(x):
        x = x if which == "linear" else plain["norm"](x)
        return plain["mlp"](x) if which == "normed_mlp" else plain["linear"](x)

    def at_once(x):
        if which == "linear":
            return linear(x, fused["linear"])
        if which == "normed_linear":
            return normed_linear(x, fused["norm"], fused["linear"].weight, fused["linear"].bias)
        return normed_mlp(x, fused["norm"], fused["mlp"])

    rows = 3 * torch.randn(500, 48) + 1
    found = []
    for function, module in ((one_by_one, plain), (at_once, fused)):
        x = rows.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = function(x)
            with torch.no_grad():
                unasked = function(x)
        assert out.dtype == (torch.bfloat16 if bf16 else torch.float32)
        (out.float() * torch.linspace(-1, 1, out.shape[1])).sum().backward()
        found.append([x.grad, out.detach().float(), unasked.float(), *(p.grad for p in module.parameters())])
    tolerance = 2e-2 if bf16 else 1e-5  # bf16 keeps 8 bits
    for alone, together in zip(*found, strict=True):
        assert (alone is None) == (together is None)
        if alone is not None:
            assert together.dtype == torch.float32
            torch.testing.assert_close(together, alone, rtol=0, atol=tolerance * alone.abs().max().item())


def test_what_is_not_plain_is_left_to_torch() -> None:
    norm = nn.LayerNorm(8)
    assert can_fuse(LayerNorm(8), nn.Linear(8, 4))
    assert can_fuse(norm, nn.Linear(8, 4))
    assert can_fuse(norm, Mlp(8, 16))
    assert not can_fuse(norm, nn.Linear(8, 4, bias=False))
    assert not can_fuse(norm, Mlp(8, 16, drop=0.1))
    assert not can_fuse(norm, Mlp(8, 16, act_layer=nn.ReLU))
    assert not can_fuse(norm, Mlp(8, 16, act_layer=lambda: nn.GELU(approximate="tanh")))
    assert not can_fuse(norm, Mlp(8, 16, bias=False))
    assert not can_fuse(norm, Mlp(8, 16, norm_layer=nn.LayerNorm))
    assert not can_fuse(nn.LayerNorm(8, bias=False), nn.Linear(8, 4))
    assert not can_fuse(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4))
    assert not can_fuse(LayerNormFp32(8), nn.Linear(8, 4))
    assert not can_fuse(nn.RMSNorm(8), nn.Linear(8, 4))
    assert not can_fuse(norm, nn.Identity())
    assert not can_fuse(norm, GluMlp(8, 16, act_layer=nn.GELU))
