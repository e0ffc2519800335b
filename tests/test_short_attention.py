"""Attention over few tokens: the numbers and names of timm's, in another layout."""

import copy

import pytest
import torch
from timm.layers import Attention

from dinosearch.pretrain.short_attention import ShortAttention, can_shorten


@pytest.mark.parametrize("bf16", [False, True])
def test_short_attention_gives_timms_outputs_and_gradients(bf16: bool) -> None:
    torch.manual_seed(0)
    plain = Attention(32, num_heads=4, qkv_bias=True)
    plain.fused_attn = False
    short = ShortAttention(copy.deepcopy(plain))
    tokens = torch.randn(6, 5, 32)
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
