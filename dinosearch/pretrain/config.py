"""What a user may ask of a training run. Reads no image and no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinosearch.errors import UsageError
from dinosearch.pretrain.logs import check_logs

if TYPE_CHECKING:
    from dinosearch.images.source import ScanOptions
    from dinosearch.pretrain.course import Evaluate

NO_LABELS = "--select labels needs some: name a CSV, or folders, with --labels"


@dataclass(frozen=True)
class TrainConfig:
    """What the user asked for. None leaves a choice to the recipe."""

    images: tuple[str | Path, ...]
    """Folders, searched recursively, and whatever else `dinosearch.images.sources.open_source` takes."""
    models: Path = Path("models")
    """Where the model's folder is made."""
    name: str | None = None
    """Name of the model; without one, that of the first folder of images, with a number if taken."""
    steps: int | None = None
    """Optimizer steps; 0 saves the initial weights at once, which is an untrained model."""
    epochs: float | None = None
    """Passes over the images."""
    minutes: float | None = None
    """Wall-clock budget of the whole run, reading included; the schedules end with it."""
    seed: int | None = None
    """Equal seeds give equal runs, on the CPU with equal thread counts bit for bit; None is 0, or a resumed run's."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The user's choices among the recipe's, by name: see plan_recipe."""
    start: str | None = None
    """Model whose weights are gone on with, as resolve_model takes it; "scratch" for none, however few the images."""
    teacher: str | None = None
    """Model that `method` "distill" learns from, as resolve_model takes it."""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    overwrite: bool = False
    """Replace a model of this name, or of that of the first folder of images."""
    exclude: tuple[str, ...] = ()
    """Patterns as in .gitignore, of images to pass over."""
    include_hidden: bool = False
    """Take names that begin with a dot too."""
    cache_bytes: int | None = None
    """What decoded images may take, in memory or on disk; None is what there is of either."""
    strict: bool = False
    """Stop at the first sign of collapse or divergence, instead of going back and changing settings."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints; a kill loses at most these."""
    logs: tuple[str, ...] = ()
    """"tensorboard", "wandb" or both, beside metrics.jsonl."""
    evaluate: Evaluate | None = None
    """Accuracy of a backbone by labels, for the record: see pretrain.course. Training never sees a label."""
    labels: str | None = None
    """Where `evaluate` has its labels from, or `examine` takes them: a resumed run asks it for the same."""
    examine: Callable[[str, ScanOptions], Evaluate] | None = None
    """`evaluate` by such a name, on the images that count; asked where a resumed run may remember which these are."""
    select: str | None = None
    """What chooses the weights that are exported: "quality", without labels, or "labels", by `evaluate`; None is
    "quality", or a resumed run's."""

    @property
    def specs(self) -> list[str]:
        """Of the sources, as text."""
        return [str(spec) for spec in self.images]


def check_config(config: TrainConfig) -> None:
    """Raises UsageError for what contradicts itself, DinosearchError for logs whose library is missing."""
    if sum(limit is not None for limit in (config.steps, config.epochs, config.minutes)) > 1:
        raise UsageError("--steps, --epochs and --minutes exclude each other: choose one")
    if (config.steps is not None and config.steps < 0) or any(
        limit is not None and not 0 < limit < math.inf for limit in (config.epochs, config.minutes)
    ):
        raise UsageError("--steps must be 0 or more, --epochs and --minutes more than 0")
    check_logs(config.logs)
    if config.select == "labels" and config.evaluate is None and not config.resume:
        raise UsageError(NO_LABELS)
    if config.resume and config.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: choose one")
