"""How much memory and time a run will take, found out by rehearsing a few steps; and what to turn when memory ends.

Every allocation of a step is followed at two small batch sizes, operation by operation; the peak of the real batch is
the largest of the straight lines through both. So it holds for any architecture, and nothing large is allocated. Whole
steps are made where they are known to be quick and to fit: a small step's time is mostly that of its operations' calls.
"""

import os
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinosearch.errors import DinosearchError
from dinosearch.images import memory_bytes
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.run import Run

FOLLOWED_IMAGES = (4, 8)
"""Images of the steps whose allocations are followed."""
TIMED_IMAGES = 16
"""A step of so many images tells a CPU's speed; a GPU, which small batches leave idle, is timed with all of them."""
QUICK_SECONDS = 2.0
"""Of a CPU's steps, those foreseen by `TIMED_IMAGES` to be shorter are timed with all images too."""
COPIES_KEPT = 2
"""Of the run's state in the CPU's memory: the last sound one, and the one being written as a checkpoint."""
ALLOCATOR_ERRORS = ("out of memory", "t allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
"""Parts of the messages that torch's allocators raise RuntimeError with."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take, for each process."""

    device_bytes: int
    """Peak on the device that trains; the CPU's is the whole process, images included."""
    seconds_per_step: float

    def told(self, *, n_steps: int, device: torch.device) -> str:
        """For people, before the run."""
        of = f"of {available_bytes(device) / 2**30:.1f} GiB"
        minutes = n_steps * self.seconds_per_step / 60
        return f"forecast: {self.device_bytes / 2**30:.1f} GiB of memory {of}, {n_steps} steps in {minutes:.1f} minutes"


def forecast(run: Run, *, side: int, channels: int) -> Forecast:
    """Rehearse on noise of the bank's shape; a run at its start is left as it was, bit for bit."""
    before = run.state()
    share = run.recipe.batch_size // run.team.size
    n_timed = share if run.device.type == "cuda" else min(TIMED_IMAGES, share)
    seconds = _time(run, n_timed, side, channels) * share / n_timed  # first, and with it what only a first step does
    timelines = {}
    for n_images in (share,) if share <= FOLLOWED_IMAGES[-1] else FOLLOWED_IMAGES:
        run.put_back(before)  # so that each of these steps makes the optimizer's state
        timelines[n_images] = _follow(run, n_images, side, channels)
    peak = _peak(timelines, wanted=share)
    if run.device.type == "cpu":
        state = sum(tensor.nbytes for tensor in run.state().values())
        peak += resident_bytes() + COPIES_KEPT * state
    quick = n_timed < share and seconds < QUICK_SECONDS
    fits = 2 * peak * run.team.n_beside < available_bytes(run.device)
    if any(run.team.follow(quick and fits)):  # all processes or none: they wait for each other in a step
        seconds = _time(run, share, side, channels, n_steps=3)
    run.put_back(before)
    return Forecast(peak, seconds)


@contextmanager
def out_of_memory_explained(recipe: Recipe) -> Iterator[None]:
    """Turn the errors that devices and allocators raise without memory into one line that says what to turn."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DinosearchError(f"out of memory: {ways_to_save(recipe)}") from error
    except RuntimeError as error:
        if not any(told in str(error) for told in ALLOCATOR_ERRORS):
            raise
        raise DinosearchError(f"out of memory: {ways_to_save(recipe)}") from error


def ways_to_save(recipe: Recipe) -> str:
    """The options that lower memory, with what they are now; first the ones that change nothing of what is learnt."""
    turns = [f"--accumulate {2 * recipe.accumulate} (now {recipe.accumulate})"]
    if not recipe.checkpoint_activations:
        turns.append("--checkpoint-activations")
    turns.append(f"a --batch-size below {recipe.batch_size}")
    if recipe.views.n_local:
        turns.append(f"fewer --local-crops than {recipe.views.n_local}")
    turns.append(f"a smaller --image-size than {recipe.image_size}")
    return f"try {', '.join(turns[:-1])} or {turns[-1]}"


def resident_bytes() -> int:
    """What this process holds of the machine's memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int:
    """What a process may use on a device: a GPU's memory, or the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()


def _follow(run: Run, n_images: int, side: int, channels: int) -> list[int]:
    """Bytes allocated since the beginning of a first step, after each of its operations."""
    with _Followed(run.device.type) as followed:
        _rehearse(run, n_images, side, channels)
    return followed.timeline


def _peak(timelines: Mapping[int, list[int]], *, wanted: int) -> int:
    """The highest point of a step with `wanted` images, whose allocations grow evenly with their number.

    timelines: by number of images, one or two of them.
    """
    if wanted in timelines:
        return max(timelines[wanted])
    (small, at_small), (large, at_large) = sorted(timelines.items())
    if len(at_small) != len(at_large):  # an operation more or less: only the peaks can be compared
        at_small, at_large = [max(at_small)], [max(at_large)]
    per_image = (np.array(at_large) - np.array(at_small)) / (large - small)
    return int((np.array(at_large) + per_image * (wanted - large)).max())


def _time(run: Run, n_images: int, side: int, channels: int, *, n_steps: int = 1) -> float:
    """Seconds of a step, the mean of `n_steps`; one before them, which allocates and warms up, does not count."""
    _rehearse(run, n_images, side, channels)
    began = time.perf_counter()
    for _ in range(n_steps):
        _rehearse(run, n_images, side, channels)
    return (time.perf_counter() - began) / n_steps


def _rehearse(run: Run, n_images: int, side: int, channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (n_images, channels, side, side), dtype=np.uint8)
    run.step(noise, np.ones(n_images, dtype=np.float32), step=0, done=0.5)
    run.optimizer.zero_grad()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


class _Followed(TorchDispatchMode):
    """Counts the bytes of storages that appear under it, and takes them off when they are freed."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.timeline: list[int] = []
        self._device_type = device_type
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                self._see(tensor.untyped_storage(), known_before)
        self.timeline.append(self._live)
        return result

    def _see(self, storage: torch.UntypedStorage, known_before: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in known_before:
            return
        self._known.add(key)
        self._live += storage.nbytes()
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self._live -= n_bytes
