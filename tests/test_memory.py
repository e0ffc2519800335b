"""What a rehearsal foresees is what a run takes, and the ways to take less change no result."""

import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
import torch

import dinosearch.pretrain.memory as memory_module
import dinosearch.pretrain.run as run_module
from dinosearch.errors import DinosearchError
from dinosearch.pretrain.memory import _Followed, _peak, forecast, out_of_memory_explained
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.run import Run

CPU = torch.device("cpu")
TINY = replace(recipes.TINY, freeze_last_layer=0.0)
NOISE = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
SQUARE = np.ones(8, dtype=np.float32)


def test_the_highest_sum_of_living_tensors_is_followed() -> None:
    with _Followed("cpu") as followed:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1
        second.add_(first)
        del first
        third = second[:10].clone()
        del second, third
        torch.zeros(1)
    assert max(followed.timeline) == 8000
    assert followed.timeline[-1] == 4


def test_a_peak_is_drawn_out_operation_by_operation() -> None:
    # weights of 100 bytes last; 10 bytes per image are held halfway, 1 at the end
    assert _peak({4: [40, 104], 8: [80, 108]}, wanted=64) == 640
    assert _peak({4: [40, 104], 8: [80, 108]}, wanted=2) == 102
    assert _peak({8: [80, 108]}, wanted=8) == 108


def test_a_forecast_leaves_the_run_as_it_was() -> None:
    run = Run(TINY, seed=0, device=CPU)
    before = run.state()
    foreseen = forecast(run, side=16, channels=3)
    assert foreseen.seconds_per_step > 0
    after = run.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in run.student.parameters())


@pytest.mark.parametrize(
    ("seconds_per_image", "memory", "largest"), [(0.001, 2**40, 64), (0.1, 2**40, 16), (0.001, 2**20, 16)]
)
def test_only_steps_that_are_quick_and_fit_are_timed_whole(
    seconds_per_image: float, memory: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(TINY, batch_size=64), seed=0, device=CPU)
    clock, sizes, step = 0.0, [], run.step

    def timed_step(images: np.ndarray, *rest: object, **named: object) -> object:
        nonlocal clock
        clock += 0.25 + len(images) * seconds_per_image  # most of a small step does not depend on its images
        sizes.append(len(images))
        return step(images, *rest, **named)

    monkeypatch.setattr(run, "step", timed_step)
    monkeypatch.setattr(memory_module.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(memory_module, "available_bytes", lambda _device: memory)
    seconds = forecast(run, side=16, channels=3).seconds_per_step
    assert max(sizes) == largest
    assert seconds == pytest.approx((0.25 + largest * seconds_per_image) * 64 / largest)


@pytest.mark.parametrize(
    "frugal", [{"accumulate": 4}, {"checkpoint_activations": True}, {"accumulate": 2, "checkpoint_activations": True}]
)
def test_frugal_ways_learn_what_the_whole_batch_teaches(
    frugal: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "has_bf16", lambda _device: False)
    _compare_frugal(TINY, frugal)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
@pytest.mark.parametrize("frugal", [{"accumulate": 4}, {"checkpoint_activations": True}])
def test_so_can_models_whose_blocks_take_rotary_positions(
    frugal: dict[str, int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "has_bf16", lambda _device: False)
    _compare_frugal(replace(TINY, arch="vit_small_patch16_rope_224", method=method), frugal, spread=0.1)


def _compare_frugal(plain: Recipe, frugal: dict[str, Any], *, spread: float = 0.0) -> None:
    """spread: added to the weights, since norms of tokens that begin near zero would blow up rounding."""
    states, peaks = [], []
    for recipe in (plain, replace(plain, **frugal)):
        run = Run(recipe, seed=0, device=CPU)
        for group in run.optimizer.param_groups:
            group["eps"] = 1e-4  # Adam would blow up the rounding of gradients that are zero
        torch.manual_seed(1)
        for parameter in run.student.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        for step in range(3):
            with _Followed("cpu") as followed:
                run.step(NOISE, SQUARE, step=step, done=step / 3)
        states.append(run.state())
        peaks.append(max(followed.timeline))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=2e-5)
    assert peaks[1] < 0.9 * peaks[0]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
)
def test_without_memory_one_line_says_what_to_turn(error: Exception) -> None:
    with pytest.raises(DinosearchError) as told, out_of_memory_explained(TINY):
        raise error
    for option in ("--accumulate 2 (now 1)", "--checkpoint-activations", "below 8", "than 2", "--image-size than 16"):
        assert option in str(told.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_explained(TINY):
        raise RuntimeError("shapes differ")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_what_a_step_frees_stays_for_the_next() -> None:
    script = """
import numpy as np
from dinosearch.pretrain.device import keep_freed_memory
from dinosearch.pretrain.memory import resident_bytes
np.ones(2**23)  # 64 MiB, freed at once
before = resident_bytes()
keep_freed_memory()
np.ones(2**23)
print(resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.9 * 2**26


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists()
    or "[madvise]" not in HUGE_PAGES.read_text()
    or tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2]) < (6, 1)
    or platform.libc_ver()[0] != "glibc",
    reason="the system keeps none, or keeps them unasked, or cannot collapse small ones",
)
def test_the_heap_comes_to_lie_in_huge_pages() -> None:
    script = """
import torch
from pathlib import Path
from dinosearch.pretrain.device import keep_freed_memory, use_huge_pages
def huge():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")) << 10
keep_freed_memory()
kept = torch.arange(2**24)  # 128 MiB
torch.ones(2**24)
before = huge()
use_huge_pages()
torch.ones(2**24)
assert torch.equal(kept, torch.arange(2**24))
print(huge() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0.4 * 2**28


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "dim", "depth", "batch", "out_dim"),
    [(28, 128, 4, 128, 1024), (32, 192, 12, 64, 4096), (96, 384, 6, 16, 16384)],
)
def test_the_forecast_is_within_a_quarter_of_what_a_run_takes(
    side: int, dim: int, depth: int, batch: int, out_dim: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (side, dim, depth, batch, out_dim))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    foreseen, before, taken = map(float, done.stdout.split())
    assert foreseen == pytest.approx(taken, rel=0.25)
    assert foreseen - before == pytest.approx(taken - before, rel=0.35)


MEASURE = """
import sys, numpy as np, torch
from pathlib import Path
from safetensors.torch import save
from dinosearch.pretrain.device import keep_freed_memory
from dinosearch.pretrain.memory import forecast, resident_bytes
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.views import ViewSettings
torch.set_num_threads(1)
keep_freed_memory()  # as train does
side, dim, depth, batch, out_dim = map(int, sys.argv[1:])
views = ViewSettings(global_size=side, local_size=side // 2, n_local=4)
sizes = {"img_size": side, "patch_size": side // 4, "embed_dim": dim, "depth": depth, "num_heads": dim // 64}
recipe = Recipe("vit_tiny_patch16_224", sizes, side, side // 4, views=views, batch_size=batch, out_dim=out_dim)
run = Run(recipe, seed=0, device=torch.device("cpu"))
before = resident_bytes()
foreseen = forecast(run, side=side, channels=3).device_bytes
noise = np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), dtype=np.uint8)
for step in range(3):
    run.step(noise, np.ones(batch, dtype=np.float32), step=step, done=0.5)
kept = run.state()
written = save(run.state())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024  # ru_maxrss would be at least that of the process that began this one
print(foreseen, before, peak)
"""
