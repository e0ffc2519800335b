"""Settings of no effect: that they have none, that others have one, and that nobody sets them in vain."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import TINY

from dinosearch.errors import UsageError
from dinosearch.pretrain.bank import Survey
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.distill import Mentor
from dinosearch.pretrain.overrides import parse_settings, read_config
from dinosearch.pretrain.recipe import Recipe, plan_recipe
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.train import train
from dinosearch.pretrain.unused import CONDITIONS, unused
from dinosearch.pretrain.views import ViewSettings
from dinosearch.vit.folder import create_vit

DIGITS = Survey(n_images=500, width=28, height=28, grey=True)
OTHER: dict[str, Any] = {
    "out_dim": 48,
    "head_hidden_dim": 24,
    "head_bottleneck_dim": 8,
    "norm_last_layer": False,
    "freeze_last_layer": 1.0,
    "student_temperature": 0.2,
    "teacher_normalisation": "sinkhorn",
    "center_momentum": 0.1,
    "koleo_weight": 3.0,
    "local_crops": 3,
    "local_size": 4,
    "local_scale": (0.3, 0.5),
    "ibot_weight": 3.0,
    "mask_probability": 1.0,
    "mask_ratio": (0.5, 0.6),
    "feature_weight": 3.0,
    "muon_lr": 1.0,
    "uniform_drop_path": True,
}
"""Another value than that of TINY for each setting that may be without effect."""
DISTILL = replace(TINY, method="distill")
BASES = {
    "dino": TINY,
    "globals alone": replace(TINY, views=replace(TINY.views, n_local=0)),
    "sinkhorn": replace(TINY, method="dinov2", teacher_normalisation="sinkhorn"),
    "all": replace(TINY, method="dinov2", optimizer="muon", drop_path_rate=0.3),
    "distill": DISTILL,
}


def changed(recipe: Recipe, name: str) -> Recipe:
    if name in {f.name for f in fields(ViewSettings)} | {"local_crops"}:
        return replace(recipe, views=replace(recipe.views, **{name.replace("local_crops", "n_local"): OTHER[name]}))
    return replace(recipe, **{name: OTHER[name]})


def weights_after_steps(recipe: Recipe) -> list[torch.Tensor]:
    """Those of the student's backbone."""
    mentor = None
    if recipe.method == "distill":
        torch.manual_seed(3)
        mentor = Mentor(create_vit(TINY.model_facts()).eval(), TINY.model_facts())
    run = Run(recipe, seed=0, device=torch.device("cpu"), mentor=mentor)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 20, 20), dtype=np.uint8)
    for step in range(3):
        run.step(pixels, np.ones(8, dtype=np.float32), step=step, done=0.1)
    return [parameter.detach() for parameter in run.student.backbone.parameters()]


@pytest.mark.parametrize("base", BASES)
def test_what_is_called_unused_changes_no_weight_and_the_rest_does(base: str) -> None:
    recipe = BASES[base]
    expected, idle = weights_after_steps(recipe), unused(recipe.settings())
    for name in idle if base != "all" else OTHER:
        found = weights_after_steps(changed(recipe, name))
        same = all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert same == (name in idle), name
    assert {name for condition in CONDITIONS for name in condition.names} == OTHER.keys()
    assert base != "all" or set(idle) == {"feature_weight"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["method=distill", "out_dim=4096"],
            "out_dim has no effect with method distill: leave it out, or choose method dino or dinov2",
        ),
        (["method=distill", "koleo_weight=0.1"], "koleo_weight has no effect with method distill"),
        (["method=distill", "local_crops=4"], "local_crops has no effect with method distill"),
        (["method=dino", "ibot_weight=2"], "ibot_weight has no effect with method dino: .* choose method dinov2"),
        (["mask_ratio=[0.1, 0.2]"], "mask_ratio has no effect with method dino"),
        (["feature_weight=2"], "feature_weight has no effect with method dino: .* choose method distill"),
        (["muon_lr=2", "optimizer=adamw"], "muon_lr has no effect with optimizer adamw: .* choose optimizer muon"),
        (["center_momentum=0.8", "teacher_normalisation=sinkhorn"], "center_momentum has no effect with teacher_norm"),
        (["local_size=7", "local_crops=0"], "local_size has no effect with local_crops 0: .* choose local_crops above"),
    ],
)
def test_a_setting_of_no_effect_is_refused(tmp_path: Path, words: list[str], told: str) -> None:
    for number in range(2):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{number}.png")
    teacher = "none" if "method=distill" in words else None
    config = TrainConfig((tmp_path,), tmp_path, steps=0, device="cpu", overrides=parse_settings(words), teacher=teacher)
    with pytest.raises(UsageError, match=told):
        list(train(config))


def test_what_is_named_is_refused_before_an_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no image")
    overrides = parse_settings(["method=dino", "ibot_weight=2"])
    with pytest.raises(UsageError, match="ibot_weight"):
        list(train(TrainConfig((tmp_path,), tmp_path, device="cpu", overrides=overrides)))


def test_a_row_of_no_effect_is_not_shown() -> None:
    for overrides in ({"method": "distill", "local_crops": 0}, {"method": "dinov2"}, {"local_crops": 0}):
        recipe, reasons = plan_recipe(DIGITS, accelerator=False, overrides=overrides)
        shown = {reason.name.replace(" ", "_") for reason in reasons}
        assert not shown & unused(recipe.settings()).keys()
        assert {"method", "lr", "global_scale"} <= shown


def test_a_whole_recipe_is_taken_without_what_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"trained": {"recipe": TINY.facts()}}))
    own = read_config(tmp_path / "model.json")
    assert own.keys() == TINY.settings().keys() - unused(TINY.settings()).keys()
    beside = read_config(tmp_path / "model.json", beside={"method": "distill"})
    assert own.keys() - beside.keys() == unused(DISTILL.settings()).keys() & own.keys()
    (tmp_path / "part.toml").write_text('method = "distill"\nkoleo_weight = 0.1\n')
    assert read_config(tmp_path / "part.toml") == {"method": "distill", "koleo_weight": 0.1}
