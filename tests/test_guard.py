"""Which state a run goes back to."""

from dataclasses import replace

import numpy as np
import pytest
import recipes
import torch

from dinosearch.errors import DinosearchError
from dinosearch.pretrain.alarm import Alarm
from dinosearch.pretrain.guard import Guard
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.run import Run
from dinosearch.vit.folder import quiet

TINY = replace(recipes.TINY, views=replace(recipes.TINY.views, n_local=0))
COLLAPSE = Alarm("collapse", "all alike")


def guarded(recipe: Recipe, *, steps: int) -> tuple[Run, Guard]:
    """A run that was sound at its last step, and has gone three steps further."""
    run = Run(recipe, seed=0, device=torch.device("cpu"))
    guard = Guard(run, step=0, note=quiet)
    go(run, 0, steps)
    guard.sound_step, guard._sound = steps, run.state()
    go(run, steps, 3)
    return run, guard


def go(run: Run, first: int, n: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    for step in range(first, first + n):
        run.step(pixels, np.ones(8, dtype=np.float32), step=step, done=0.5)


def same(run: Run, other: Run) -> bool:
    states = run.state(), other.state()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_run_goes_back_to_its_last_sound_state() -> None:
    run, guard = guarded(TINY, steps=4)
    assert guard.recover(COLLAPSE, step=7, done=0.7, strict=False) == 4
    expected = Run(TINY, seed=0, device=torch.device("cpu"))
    go(expected, 0, 4)
    assert same(run, expected)
    assert run.recipe.lr == TINY.lr / 4
    go(run, 4, 2)
    go(expected, 4, 2)
    assert not same(run, expected)  # by the changed recipe
    assert guard.go_back() == 4  # what was kept is no part of what goes on
    assert guard.alarms[0]["back_to_step"] == 4


def test_nothing_made_by_ruinous_steps_is_kept() -> None:
    run, guard = guarded(replace(TINY, lr=0.1), steps=4)
    assert guard.recover(COLLAPSE, step=7, done=0.7, strict=False) == 0
    assert same(run, Run(TINY, seed=0, device=torch.device("cpu")))
    assert guard.sound_step == 0


def test_what_leads_to_the_same_trouble_twice_is_given_up_early_in_a_run() -> None:
    for done, expected in ((0.1, 0), (0.9, 4)):
        run, guard = guarded(TINY, steps=4)
        assert guard.recover(COLLAPSE, step=7, done=done, strict=False) == 4
        go(run, 4, 3)
        assert guard.recover(COLLAPSE, step=7, done=done, strict=False) == expected


def test_strict_goes_back_and_changes_nothing() -> None:
    run, guard = guarded(TINY, steps=4)
    with pytest.raises(DinosearchError, match="collapse at step 7: all alike"):
        guard.recover(COLLAPSE, step=7, done=0.7, strict=True)
    assert run.recipe == TINY
    assert guard.alarms == []


def test_a_state_put_back_twice_is_the_same_state() -> None:
    run, guard = guarded(TINY, steps=4)
    guard.go_back()
    first = run.state()
    go(run, 4, 3)
    guard.go_back()
    assert all(torch.equal(first[name], tensor) for name, tensor in run.state().items())
