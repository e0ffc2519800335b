"""What the recipe chooses for which images, and what it refuses."""

import json
from typing import Any

import pytest

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.pretrain.bank import Survey
from dinosearch.pretrain.recipe import Recipe, plan_recipe, recipe_from_facts
from dinosearch.vit.folder import create_vit


def planned(width: int, height: int, n: int = 20_000, *, accelerator: bool = False, **overrides: object) -> Recipe:
    survey = Survey(n_images=n, width=width, height=height, grey=False)
    return plan_recipe(survey, accelerator=accelerator, overrides=overrides)[0]


@pytest.mark.parametrize("side", [8, 16, 28, 32, 50, 96, 128, 300, 4000])
@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("n", [2, 300, 20_000, 2_000_000])
def test_every_choice_can_be_built(side: int, accelerator: bool, n: int) -> None:
    recipe = planned(side, side + 7, n, accelerator=accelerator)
    assert recipe.image_size % recipe.patch_size == 0
    assert recipe.views.local_size % recipe.patch_size == 0
    assert recipe.views.local_size < recipe.image_size
    assert recipe.image_size <= max(side, 8)
    assert recipe.batch_size <= n
    import torch

    with torch.device("meta"):
        create_vit(recipe.model_facts())


def test_small_images_are_not_enlarged() -> None:
    recipe = planned(28, 28)
    assert (recipe.image_size, recipe.patch_size) == (28, 7)
    assert planned(28, 28, accelerator=True).image_size == 28


def test_photographs_get_the_full_square_on_a_gpu_only() -> None:
    assert planned(500, 375, accelerator=True).image_size == 224
    assert planned(500, 375).image_size < 224


def test_a_named_architecture_keeps_its_own_size_and_patches() -> None:
    recipe = planned(500, 375, arch="vit_small_patch16_224")
    assert (recipe.image_size, recipe.patch_size) == (224, 16)
    assert recipe.views.local_size == 96
    assert recipe.arch_kwargs == {"img_size": 224}


def test_overrides_win_and_say_so() -> None:
    survey = Survey(n_images=500, width=64, height=64, grey=False)
    asked = {"image_size": 48, "patch_size": 12, "batch_size": 50, "lr": 0.002, "out_dim": 77, "local_crops": 3}
    recipe, reasons = plan_recipe(survey, accelerator=False, overrides=asked | {"local_size": 24})
    assert (recipe.image_size, recipe.patch_size, recipe.batch_size) == (48, 12, 50)
    assert (recipe.lr, recipe.out_dim, recipe.views.n_local, recipe.views.local_size) == (0.002, 77, 3, 24)
    assert {r.name for r in reasons if r.why == "as you asked"} == {name.replace("_", " ") for name in asked} | {
        "local size"
    }
    assert all(reason.why for reason in reasons)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ({"image_size": 50, "patch_size": 16}, "Try --image-size 48"),
        ({"image_size": 64, "patch_size": 16, "local_size": 20}, "Try --local-size 16"),
        ({"batch_size": 501}, "choose 2 to 500"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_advice(overrides: dict[str, int], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        planned(64, 64, 500, **overrides)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(DinosearchError, match="no architecture"):
        planned(64, 64, arch="vit_enormous")


def test_a_recipe_survives_json() -> None:
    recipe = planned(64, 48, 3000)
    assert recipe_from_facts(json.loads(json.dumps(recipe.facts()))) == recipe


@pytest.mark.parametrize(
    ("n_images", "length", "method", "why"),
    [
        (9_500, {"steps": 10_000_000}, "dino", "learns more from 9,500 images"),
        (2_000_000, {"steps": 10_000}, "dino", "learns more in 10,000 steps"),
        (2_000_000, {}, "dino", "ask for it if time allows"),
        (2_000_000, {"epochs": 1.0}, "dino", "learns more in 7,812 steps"),
        (2_000_000, {"epochs": 20.0}, "dinov2", "are enough for it"),
    ],
)
def test_the_method_is_chosen_by_images_and_steps(n_images: int, length: dict, method: str, why: str) -> None:
    survey = Survey(n_images=n_images, width=300, height=300, grey=False)
    recipe, reasons = plan_recipe(survey, accelerator=True, overrides={"method": "auto"}, **length)
    assert recipe.method == method
    assert why in next(reason.why for reason in reasons if reason.name == "method")


def test_dinov2_brings_its_own_settings_and_each_can_be_overridden() -> None:
    recipe = planned(300, 300, accelerator=True, method="dinov2", layer_decay=0.8)
    assert (recipe.koleo_weight, recipe.layer_decay, recipe.patch_embed_lr) == (0.1, 0.8, 0.2)
    assert (recipe.uniform_drop_path, recipe.norm_last_layer) == (True, False)
    assert recipe.views.local_scale == (0.05, 0.32)
    assert recipe.arch_kwargs["reg_tokens"] == 4
    assert "reg_tokens" not in planned(28, 28, method="dinov2").arch_kwargs  # 4 × 4 patches
    plain = planned(300, 300, accelerator=True, method="dino")
    assert (plain.layer_decay, plain.patch_embed_lr, plain.uniform_drop_path) == (1.0, 1.0, False)
    assert plain.norm_last_layer


@pytest.mark.parametrize("wrong", [{"method": "moco"}, {"teacher_normalisation": "batch"}])
def test_unknown_words_are_refused_with_those_there_are(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="Choose one of these"):
        planned(64, 64, **wrong)


def test_one_image_is_too_few() -> None:
    with pytest.raises(UsageError, match="two images or more"):
        planned(64, 64, 1)


def test_a_pooling_that_search_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="'max' is none of token, avg"):
        planned(64, 64, pooling="max")


def test_small_models_average_their_patches_and_named_ones_keep_the_papers_ways() -> None:
    small, named = planned(28, 28), planned(28, 28, arch="vit_tiny_patch16_224", image_size=32, patch_size=8)
    assert (small.pooling, small.optimizer, small.arch_kwargs["class_token"]) == ("avg", "muon", False)
    assert (named.pooling, named.optimizer) == ("token", "adamw")
    assert "class_token" not in named.arch_kwargs


def test_small_models_pool_by_as_many_stripes_as_cut_the_rows_equally() -> None:
    assert planned(28, 28).stripes == 4
    assert planned(128, 128).stripes == 4
    assert planned(28, 28, image_size=24, patch_size=4, local_size=12).stripes == 3
    assert planned(28, 28, pooling="token").stripes == 1
    assert planned(28, 28, stripes=2).model_facts().stripes == 2
    assert planned(28, 28, arch="vit_tiny_patch16_224", image_size=32, patch_size=8).stripes == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stripes": 3}, "4 rows of patches cannot be cut into 3 stripes. Try --set stripes=2"),
        ({"stripes": 2, "pooling": "token"}, "leave --set stripes out"),
    ],
)
def test_stripes_that_do_not_fit_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        planned(28, 28, **wrong)


def test_tiny_images_get_gentler_crops() -> None:
    assert planned(28, 28).views.global_scale == (0.5, 1.0)
    assert planned(64, 64).views.global_scale == (0.4, 1.0)
    assert planned(28, 28, global_scale=(0.3, 1.0)).views.global_scale == (0.3, 1.0)


@pytest.mark.parametrize("method", ["dino", "dinov2", "distill"])
def test_nothing_is_decided_twice(method: str) -> None:
    for side in (28, 64):
        survey = Survey(n_images=20_000, width=side, height=side, grey=False)
        recipe, reasons = plan_recipe(survey, accelerator=False, overrides={"method": method})
        names = [reason.name for reason in reasons]
        assert len(names) == len(set(names))
        shown = {reason.name: reason.value for reason in reasons}
        assert shown["global scale"] == str(recipe.views.global_scale)
        if side == 28:
            assert (recipe.views.global_scale, recipe.views.local_scale) == ((0.5, 1.0), (0.15, 0.5))
