"""The processes of one run, as torchrun starts them: each learns from its part of every batch, all keep equal weights.

Gradients are averaged over all processes in one piece after the backward pass: the backbone is called several times a
step, which DistributedDataParallel's hooks do not expect. Every process reads the images itself. Knows neither models
nor images.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import first_line

PATIENCE = timedelta(hours=2)
"""Processes wait so long for each other: some read images more slowly. One that dies is noticed at once."""


T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """All processes of a run, seen from one of them. One alone talks to nobody."""

    rank: int = 0
    size: int = 1
    n_beside: int = 1
    """Of them, those on this machine, which share its memory, disk and cores."""

    @property
    def leads(self) -> bool:
        """This process prints and writes; the others learn."""
        return self.rank == 0

    def part(self, whole: Any) -> Any:
        """What of a batch (anything that can be sliced) belongs to this process: consecutive images."""
        n_each = len(whole) // self.size
        return whole[self.rank * n_each : (self.rank + 1) * n_each]

    def told(self, say: Callable[[], Any], *, by: int = 0) -> Any:
        """What the leader says, or the process numbered `by`, as JSON keeps it; only that one is asked."""
        if self.size == 1:
            return say()
        speaks = self.rank == by
        words = torch.frombuffer(bytearray(json.dumps(say()).encode()), dtype=torch.uint8) if speaks else None
        n_bytes = torch.tensor([0 if words is None else len(words)])
        with _one_line_for_lost_peers():
            distributed.broadcast(n_bytes, src=by)
            heard = torch.empty(int(n_bytes), dtype=torch.uint8) if words is None else words
            distributed.broadcast(heard, src=by)
        return json.loads(heard.numpy().tobytes())

    def told_by_each(self, what: Any) -> list[Any]:
        """What every process says, in their order, as JSON keeps it: so all come to the same conclusion."""
        return [self.told(lambda: what, by=rank) for rank in range(self.size)]

    def in_turn(self, do: Callable[[], T]) -> T:
        """The leader does it first: what it leaves on disk, the others find there."""
        if self.leads:
            done = do()
        self.follow(0)
        if not self.leads:
            done = do()
        return done

    def follow(self, *decisions: int) -> list[int]:
        """The leader's whole numbers: what depends on a clock or a signal is decided by one process for all."""
        if self.size == 1:
            return list(decisions)
        told = torch.tensor(decisions, dtype=torch.int64)
        with _one_line_for_lost_peers():
            distributed.broadcast(told, src=0)
        return told.tolist()

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor its mean over all processes, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        with _one_line_for_lost_peers():
            distributed.all_reduce(flat)
        pieces = (flat / self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(
            list(tensors), [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
        )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        result = tensor.detach().clone()
        self.average([result])
        return result

    def gather(self, tensor: Tensor, *, dim: int = 0) -> Tensor:
        """Every process's tensor (of one shape) along `dim`, in the order of the batch.

        Gradients flow back to where the rows came from: what all processes make of the whole, averaged as the weights'
        gradients are, has the gradient that one process would have.
        """
        return tensor if self.size == 1 else _Gather.apply(tensor, dim, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, team: Team) -> Tensor:
        ctx.dim, ctx.team = dim, team
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(team.size)]
        with _one_line_for_lost_peers():
            distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = gradient.contiguous()
        with _one_line_for_lost_peers():
            distributed.all_reduce(whole)
        return whole.chunk(ctx.team.size, dim=ctx.dim)[ctx.team.rank], None, None


ALONE = Team()
"""A process that was not started by torchrun."""


def leads_team() -> bool:
    """Whether this process is the one that speaks, by the environment that torchrun sets."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def teamwork(device_type: str) -> Iterator[Team]:
    """The team of this process, by the environment that torchrun sets, for as long as the block runs.

    Each process takes the GPU of its own number on the machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _one_line_for_lost_peers():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(distributed.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    finally:
        distributed.destroy_process_group()


@contextmanager
def _one_line_for_lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed knows no narrower one for a closed connection
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise DinosearchError(
            f"another process of this run has ended ({first_line(error)}). Its message says why; then --resume"
        ) from error
