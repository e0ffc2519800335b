"""Settings by name: what is understood, what is refused, and that a recorded recipe makes the same one again."""

import inspect
import json
from pathlib import Path

import pytest

from dinosearch.errors import UsageError
from dinosearch.pretrain.bank import Survey
from dinosearch.pretrain.overrides import OPTIONS, overridable, parse_settings, read_config
from dinosearch.pretrain.recipe import Recipe, plan_recipe

DIGITS = Survey(n_images=500, width=28, height=28, grey=True)
PHOTOS = Survey(n_images=40_000, width=500, height=375, grey=False)


def planned(survey: Survey, *, accelerator: bool = False, **overrides: object) -> Recipe:
    return plan_recipe(survey, accelerator=accelerator, overrides=overrides)[0]


def test_words_become_values_of_the_right_type() -> None:
    words = ["lr=1", "blur=[1, 0, 0]", "out-dim=128", "arch=vit_small_patch16_224", "weight_decay=[0.1, 0.2]"]
    assert parse_settings(words) == {
        "lr": 1.0,
        "blur": (1.0, 0.0, 0.0),
        "out_dim": 128,
        "arch": "vit_small_patch16_224",
        "weight_decay": (0.1, 0.2),
    }
    assert isinstance(parse_settings(["lr=1"])["lr"], float)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("teacher_temprature=0.1", "Did you mean teacher_temperature"),
        ("lr", "Write name=value"),
        ("lr=fast", "'fast' is not a number"),
        ("lr=NaN", "is not a number"),
        ("out_dim=3.5", "3.5 is not a whole number"),
        ("out_dim=true", "is not a whole number"),
        ("blur=[1]", r"is not 3 numbers"),
        ("flip=1.5", "choose 0 to 1"),
        ("teacher_temperature=0", "choose 0.0001 to inf"),
        ("arch=3", "is not a name"),
        ("global_size=32", "no setting 'global_size'"),
        ("mask_ratio=[0.5, 0.1]", "mask_ratio .* is upside down: give the smaller number first"),
        ("global_scale=[1, 0.4]", "global_scale .* is upside down"),
        ("local_scale=[0.4, 0.05]", "local_scale .* is upside down"),
        ("blur_sigma=[2, 0.1]", "blur_sigma .* is upside down"),
    ],
)
def test_mistakes_are_told(word: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_settings([word])


def test_a_range_may_be_one_number_and_a_course_may_fall() -> None:
    assert parse_settings(["mask_ratio=[0.3, 0.3]", "weight_decay=[0.4, 0.04]"]) == {
        "mask_ratio": (0.3, 0.3),
        "weight_decay": (0.4, 0.04),
    }


def test_every_setting_reaches_the_recipe_and_says_so() -> None:
    words = ["teacher_temperature=0.2", "center_momentum=0.999", "flip=0", "koleo_weight=0", "global_scale=[0.3, 0.9]"]
    recipe, reasons = plan_recipe(DIGITS, accelerator=False, overrides=parse_settings(words))
    assert (recipe.teacher_temperature, recipe.center_momentum, recipe.koleo_weight) == (0.2, 0.999, 0.0)
    assert (recipe.views.flip, recipe.views.global_scale) == (0.0, (0.3, 0.9))
    asked = {reason.name for reason in reasons if reason.why == "as you asked"}
    assert asked == {"teacher temperature", "center momentum", "flip", "koleo weight", "global scale"}


def test_a_recorded_recipe_makes_the_same_one_for_other_images(tmp_path: Path) -> None:
    for number, recipe in enumerate(
        (
            planned(DIGITS),
            planned(PHOTOS, accelerator=True),
            planned(PHOTOS, arch="vit_small_patch16_224", local_size=64),
            planned(PHOTOS, arch_kwargs={"depth": 2, "embed_dim": 64}),
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"format": 1, "trained": {"method": "dino", "recipe": recipe.facts()}}))
        assert planned(DIGITS, **read_config(path)) == recipe


def test_a_size_asked_for_beats_the_recorded_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"recipe": planned(DIGITS).facts()}))
    recipe = planned(DIGITS, **read_config(path) | {"image_size": 32, "patch_size": 8, "local_size": 16})
    assert recipe.arch_kwargs["img_size"] == recipe.image_size == recipe.views.global_size == 32
    assert recipe.arch_kwargs["patch_size"] == 8


def test_a_part_of_a_recipe_in_toml_will_do(tmp_path: Path) -> None:
    path = tmp_path / "gentle.toml"
    path.write_text("lr = 0.0003\nlocal_crops = 2\n[views]\nflip = 0\n")
    assert read_config(path) == {"lr": 0.0003, "local_crops": 2, "flip": 0.0}


@pytest.mark.parametrize(
    ("text", "told"), [("{", "cannot be read"), ("[1]", "no table"), ('{"lrr": 1}', "Did you mean lr")]
)
def test_a_file_that_holds_no_recipe_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=told):
        read_config(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(tmp_path / "none.toml")


def test_no_setting_of_the_views_has_the_name_of_one_of_the_recipe() -> None:
    from dataclasses import fields

    from dinosearch.pretrain.views import ViewSettings

    assert not {f.name for f in fields(Recipe)} & {f.name for f in fields(ViewSettings)}
    assert {"teacher_temperature", "local_crops", "blur_sigma", "arch_kwargs"} <= set(overridable())


def test_what_is_called_an_option_is_one() -> None:
    from dinosearch.cli.train import train

    assert set(inspect.signature(train).parameters) & set(overridable()) == OPTIONS
