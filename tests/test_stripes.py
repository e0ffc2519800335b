"""Vectors by horizontal stripes against their definition, and what timm and other models make of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinosearch.errors import UsageError
from dinosearch.pretrain.net import Net
from dinosearch.vit.folder import ModelFacts, create_vit, open_model, save_model

FACTS = ModelFacts(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False},
    image_size=16,
    pooling="avg",
    stripes=4,
)


def random_vit(facts: ModelFacts) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = create_vit(facts).eval()
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit


@pytest.mark.parametrize("arch_kwargs", [{}, {"class_token": True, "reg_tokens": 2}])
@pytest.mark.parametrize("n_stripes", [2, 4])
def test_a_vector_is_the_normalised_means_of_the_rows_from_top_to_bottom(n_stripes: int, arch_kwargs: dict) -> None:
    facts = replace(FACTS, stripes=n_stripes, arch_kwargs=FACTS.arch_kwargs | arch_kwargs)
    vit = random_vit(facts)
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        vectors, tokens = vit(images), vit.forward_features(images)
        patches = tokens[:, vit.num_prefix_tokens :].reshape(3, 4, 4, 32)
        for image in range(3):
            for stripe in range(n_stripes):
                n_rows = 4 // n_stripes
                rows = patches[image, stripe * n_rows : (stripe + 1) * n_rows].reshape(-1, 32)
                expected = vit.fc_norm(rows.mean(dim=0))
                found = vectors[image, stripe * 32 : (stripe + 1) * 32]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_builds_of_a_vit_take_them() -> None:
    """DINOv3's, which timm has as another class."""
    facts = ModelFacts("vit_small_patch16_dinov3", {"depth": 1, "img_size": 64}, 64, pooling="avg", stripes=2)
    vit = random_vit(facts)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        patches = vit.forward_features(images)[:, vit.num_prefix_tokens :]
        expected = vit.fc_norm(patches.reshape(2, 2, 8, -1).mean(dim=2)).flatten(1)
        torch.testing.assert_close(vit(images), expected, rtol=1e-5, atol=1e-6)


def test_what_is_learnt_is_the_mean_of_crops_of_any_size() -> None:
    flexible = replace(FACTS, arch_kwargs=FACTS.arch_kwargs | {"dynamic_img_size": True})
    striped, plain = random_vit(flexible), random_vit(replace(flexible, stripes=1))
    assert striped.state_dict().keys() == plain.state_dict().keys()
    for side in (16, 8):
        crops = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            features, patches = Net(striped, {}).encode(crops)
            assert torch.equal(features, plain(crops))
        assert patches.shape == (2, (side // 4) ** 2, 32)


def test_a_folder_keeps_them(tmp_path: Path) -> None:
    vit = random_vit(FACTS)
    model = save_model(tmp_path / "m", vit, FACTS, trained={})
    assert (model.dim, model.stripes) == (128, 4)
    assert json.loads((model.path / "model.json").read_text())["format"] == 2  # older versions would leave them out
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model.load_vit()(images), vit(images))
    other = save_model(tmp_path / "n", vit, replace(FACTS, stripes=2), trained={})
    assert other.fingerprint != model.fingerprint


def test_models_from_before_keep_their_fingerprint(tmp_path: Path) -> None:
    facts = replace(FACTS, stripes=1)
    vit = create_vit(facts)
    for parameter in vit.parameters():
        parameter.data.fill_(0.5)
    model = save_model(tmp_path / "m", vit, facts, trained={})
    told = json.loads((model.path / "model.json").read_text())
    del told["stripes"]
    (model.path / "model.json").write_text(json.dumps(told))
    again = open_model(model.path)
    again.verify()
    assert again.stripes == 1
    assert model.fingerprint == "179eed08bfd39630"  # as the code before stripes wrote it


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stripes": 3}, "4 rows of patches"),
        ({"pooling": "token", "arch_kwargs": FACTS.arch_kwargs | {"class_token": True}}, "average pooling"),
    ],
)
def test_stripes_that_do_not_fit_are_refused(change: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        create_vit(replace(FACTS, **change))
