"""Attention maps and principal directions, against loops and numpy's definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dinosearch.errors import DinosearchError
from dinosearch.vit.attention import attention_weights, draw, fitting_size, look, principal_colours
from dinosearch.vit.folder import ModelFacts, create_vit, save_model

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FACTS = ModelFacts(arch="vit_tiny_patch16_224", arch_kwargs=SMALL, image_size=16)


def a_vit(**kwargs):
    torch.manual_seed(0)
    return create_vit(replace(FACTS, arch_kwargs=SMALL | kwargs)).eval()


def test_attention_is_the_softmax_of_queries_and_keys():
    layer = a_vit().blocks[-1].attn.requires_grad_(False)
    tokens = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    found = attention_weights(layer, tokens)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    for head in range(2):
        rows = slice(16 * head, 16 * head + 16)
        for i in range(5):
            query = weight[:32][rows] @ tokens[0, i] + bias[:32][rows]
            scores = [
                float(query @ (weight[32:64][rows] @ tokens[0, j] + bias[32:64][rows])) / math.sqrt(16)
                for j in range(5)
            ]
            total = sum(map(math.exp, scores))
            expected = [math.exp(score) / total for score in scores]
            assert found[0, head, i].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}])
def test_the_map_leaves_out_the_tokens_that_are_no_patches(kwargs):
    vit = a_vit(**kwargs)
    pixels = torch.randn(1, 3, 24, 40)
    found = look(vit, pixels)
    assert found.heads.shape == (2, 3, 5)
    assert found.patches.shape == (3, 5, 32)
    tokens = vit.forward_features(pixels)  # set to this size by now
    n_prefix = 1 + kwargs.get("reg_tokens", 0)
    assert found.patches.reshape(15, 32) == pytest.approx(tokens[0, n_prefix:].detach().numpy(), abs=1e-5)
    inside = vit.blocks[:-1](vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels))))
    whole = attention_weights(vit.blocks[-1].attn, vit.blocks[-1].norm1(inside))
    assert found.heads[1].ravel() == pytest.approx(whole[0, 1, 0, n_prefix:].detach().numpy(), abs=1e-6)


@pytest.mark.parametrize("class_token", [True, False])
def test_where_patches_are_pooled_the_mean_of_their_attention_is_taken(class_token):
    facts = replace(FACTS, arch_kwargs=SMALL | {"class_token": class_token}, pooling="avg")
    vit = create_vit(facts).eval()
    pixels = torch.randn(1, 3, 16, 32)
    found = look(vit, pixels)
    assert found.patches.shape == (2, 4, 32)
    norms = found.patches.std(axis=-1)
    assert norms == pytest.approx(np.ones_like(norms), abs=0.05)  # normalised, by the norm that is there
    inside = vit.blocks[:-1](vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels))))
    whole = attention_weights(vit.blocks[-1].attn, vit.blocks[-1].norm1(inside)).detach().numpy()
    expected = sum(whole[0, 1, i, -8:] for i in range(-8, 0)) / 8
    assert found.heads[1].ravel() == pytest.approx(expected, abs=1e-6)


def test_colours_are_the_directions_of_most_variance():
    random = np.random.default_rng(0)
    strong, weak = random.standard_normal((6, 7)), 0.1 * random.standard_normal((6, 7))
    patches = np.zeros((6, 7, 8), dtype=np.float32)
    patches[..., 3], patches[..., 5] = strong, weak
    colours = principal_colours(patches)
    assert colours.shape == (6, 7, 3)
    assert np.corrcoef(colours[..., 0].ravel(), strong.ravel())[0, 1] > 0.98
    assert np.corrcoef(colours[..., 1].ravel(), weak.ravel())[0, 1] > 0.95
    assert principal_colours(patches[:1, :2]).shape == (1, 2, 3)  # fewer patches than colours


def test_any_shape_becomes_whole_patches_of_about_its_own():
    vit = a_vit()
    assert fitting_size(vit, (640, 427), short_side=32) == (48, 32)
    assert fitting_size(vit, (1, 1000), short_side=8) == (8, 8000)
    for size, short_side in (((10, 10), 4), ((1, 3000), 32)):
        with pytest.raises(DinosearchError, match="--size"):
            fitting_size(vit, size, short_side=short_side)


def test_an_architecture_that_cannot_be_drawn_says_so():
    facts = ModelFacts(
        arch="vit_small_patch16_dinov3",
        arch_kwargs={"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2},
        image_size=32,
    )
    with pytest.raises(DinosearchError, match="cannot be drawn"):
        look(create_vit(facts).eval(), torch.randn(1, 3, 32, 32))


def test_the_picture_has_a_panel_for_each_head(tmp_path, photos):
    vit = a_vit()
    model = save_model(tmp_path / "tiny", vit, FACTS, trained={})
    drawn = draw(model, photos[0], short_side=32)
    panels = np.asarray(drawn)
    assert drawn.mode == "RGB"
    assert drawn.width > 3 * 48 * 6  # image, patch tokens, mean; below them the two heads
    assert len(np.unique(panels.reshape(-1, 3), axis=0)) > 1000
    assert draw(model, Image.new("RGB", (5, 90)), short_side=16).height > 16 * 18
