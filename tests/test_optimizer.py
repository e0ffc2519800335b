"""Which weights Muon moves and which AdamW, and how fast."""

from dataclasses import replace

import numpy as np
import pytest
import recipes
import torch

from dinosearch.errors import DinosearchError
from dinosearch.pretrain.run import Run

CPU = torch.device("cpu")
TINY = replace(
    recipes.TINY,
    views=replace(recipes.TINY.views, n_local=0),
    optimizer="muon",
    muon_lr=5.0,
    lr=1e-2,
    freeze_last_layer=0.0,
)


def learn(run: Run, step: int) -> None:
    pixels = np.random.default_rng(step).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    run.step(pixels, np.ones(8, dtype=np.float32), step=step, done=step / 4)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    run = Run(TINY, seed=0, device=CPU)
    names = {parameter: name for name, parameter in run.student.named_parameters()}
    by_muon = {names[p]: group["inner"] for group in run.optimizer.param_groups for p in group["params"]}
    assert set(by_muon) == {name for name, p in run.student.named_parameters() if p.requires_grad}
    for name, expected in (
        ("backbone.blocks.0.attn.qkv.weight", True),
        ("backbone.blocks.1.mlp.fc2.weight", True),
        ("head.mlp.0.weight", False),
        ("backbone.blocks.0.mlp.fc1.bias", False),
        ("backbone.patch_embed.proj.weight", False),
        ("backbone.pos_embed", False),
        ("head.prototypes.weight_v", False),
    ):
        assert by_muon[name] == expected, name


def test_muon_is_faster_by_its_factor_and_decays_weights_as_much_per_step() -> None:
    run = Run(TINY, seed=0, device=CPU)
    learn(run, 0)
    for group in run.optimizer.param_groups:
        assert group["lr"] == pytest.approx(5e-2 if group["inner"] else 1e-2)
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-2 * 0.04 if group["decays"] else 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_put_back_takes_the_same_steps_again(optimizer: str) -> None:
    run = Run(replace(TINY, optimizer=optimizer), seed=0, device=CPU)
    learn(run, 0)
    kept = run.state()
    learn(run, 1)
    expected = run.state()
    for again in (run, Run(run.recipe, seed=0, device=CPU)):
        again.put_back(kept)
        learn(again, 1)
        assert all(torch.equal(expected[name], tensor) for name, tensor in again.state().items())


@pytest.mark.parametrize("old", ["1.head.mlp.0.weight.momentum_buffer", "0.3.exp_avg", "2.head.mlp.0.bias.step"])
def test_the_state_of_another_version_is_refused(old: str) -> None:
    run = Run(TINY, seed=0, device=CPU)
    learn(run, 0)
    with pytest.raises(DinosearchError, match=r"another version.*--overwrite"):
        run.optimizer.put_back(run.optimizer.state() | {old: torch.zeros(4)})
