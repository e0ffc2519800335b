"""What a run begins with, chosen for the user's images or taken from a checkpoint: recipe, seed, start, teacher.

Knows neither how long the run is nor where it is written.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.workers import DecodePool
from dinosearch.pretrain.bank import Survey, survey_images
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.distill import crop_size, find_mentor
from dinosearch.pretrain.distributed import Team
from dinosearch.pretrain.gather import TrainingImage
from dinosearch.pretrain.recipe import (
    Reason,
    Recipe,
    momentum_for,
    plan_recipe,
    recipe_from_facts,
    usual_batch_size,
)
from dinosearch.pretrain.unused import refuse_unused
from dinosearch.pretrain.warmstart import (
    DECIDED,
    SCRATCH,
    Start,
    choose_start,
    gentle_presets,
    kept_start,
    refuse_decided,
)
from dinosearch.vit.folder import ModelFolder, Note
from dinosearch.vit.resolve import resolve_model

BANK_MARGIN = 8 / 7
"""Squares are kept this much larger than the crops made of them, if the images have the pixels (256 for 224)."""


@dataclass(frozen=True)
class Beginning:
    """What a run begins with, chosen anew or taken from a checkpoint."""

    recipe: Recipe
    seed: int
    grey: bool
    side: int
    why: dict[str, str]
    """Reasons by the recipe's names."""
    start: Start | None
    mentor: ModelFolder | None

    @property
    def origins(self) -> dict[str, Any]:
        """Of which models it learnt, for checkpoints and model.json."""
        origins: dict[str, Any] = {}
        if self.start is not None:
            origins["start"] = self.start.origin
        if self.mentor is not None:
            origins["teacher"] = {"model": self.mentor.name, "fingerprint": self.mentor.fingerprint}
        return origins


def choose_beginning(
    config: TrainConfig, images: list[TrainingImage], *, device: torch.device, pool: DecodePool, note: Note
) -> Beginning:
    """What a new run begins with, told to `note`. Raises UsageError for a setting that it would make no use of."""
    refuse_unused(config.overrides, beside=config.overrides)
    accelerator = device.type != "cpu"
    start, mentor = _start(config, n_images=len(images), note=note), _mentor(config, note)
    channels = config.overrides.get("channels") or (start.facts.channels if start else 3)
    if mentor is not None and mentor.channels != channels:
        raise UsageError(f"--teacher {config.teacher} takes images of {mentor.channels} channels, not {channels}")
    survey = survey_images(images, pool, channels=channels)
    batch_size = config.overrides.get("batch_size") or usual_batch_size(len(images), accelerator)[0]
    presets = gentle_presets(start.facts, batch_size=batch_size) if start else {}
    if mentor is not None:
        presets["local_crops"] = (0, "teacher and student see the same two crops")
    recipe, reasons = plan_recipe(
        survey,
        accelerator=accelerator,
        overrides=config.overrides,
        presets=presets,
        steps=config.steps,
        epochs=config.epochs,
    )
    refuse_unused(config.overrides, beside=recipe.settings())
    _tell(reasons, note)
    size = crop_size(recipe.image_size, mentor) if mentor else recipe.image_size
    return Beginning(
        recipe,
        seed=config.seed or 0,
        grey=survey.grey,
        side=_bank_side(size, survey),
        why={reason.name: reason.why for reason in reasons},
        start=start,
        mentor=mentor,
    )


def _start(config: TrainConfig, *, n_images: int, note: Note) -> Start | None:
    given = config.overrides
    if config.start not in (None, SCRATCH):
        refuse_decided(given)
    elif config.steps == 0:
        return None
    return choose_start(
        config.start,
        models=config.models,
        n_images=n_images,
        image_size=given.get("image_size"),
        channels=given.get("channels"),
        chosen=given.get("method") == "distill" or any(given.get(name) is not None for name in DECIDED),
        note=note,
    )


def _mentor(config: TrainConfig, note: Note) -> ModelFolder | None:
    if (config.overrides.get("method") == "distill") != (config.teacher is not None):
        raise UsageError("--method distill and --teacher MODEL go together: give both, or neither")
    if config.teacher is None:
        return None
    return resolve_model(config.teacher, models=config.models, note=note)


def _bank_side(size: int, survey: Survey) -> int:
    wanted = max(8, 8 * round(size * BANK_MARGIN / 8))
    return max(size, min(wanted, min(survey.width, survey.height)))


def _tell(reasons: list[Reason], note: Note) -> None:
    width = max(len(reason.name) for reason in reasons)
    value_width = max(len(reason.value) for reason in reasons)
    for reason in reasons:
        note(f"  {reason.name:<{width}}  {reason.value:<{value_width}}  {reason.why}")


def remember_beginning(kept: Mapping[str, Any], config: TrainConfig, *, folder: Path) -> Beginning:
    """What an interrupted run began with. Raises DinosearchError when the model that it learns from is gone."""
    return Beginning(
        recipe_from_facts(kept["recipe"]),
        seed=kept["seed"],
        grey=kept["grey"],
        side=kept["side"],
        why=kept.get("reasons", {}),
        start=kept_start(folder / "training") if "start" in kept else None,  # not one of a run that never began
        mentor=_mentor_again(kept, config) if "teacher" in kept else None,
    )


def _mentor_again(kept: Mapping[str, Any], config: TrainConfig) -> ModelFolder:
    """The model that an interrupted run learnt from, by its weights; where it lay then, if not among the models."""
    fingerprint = kept["teacher"]["fingerprint"]
    try:
        return find_mentor(fingerprint, models=config.models)
    except DinosearchError:
        with contextlib.suppress(DinosearchError):
            model = resolve_model(kept["asked"]["teacher"], models=config.models)
            if model.fingerprint == fingerprint:
                return model
        raise


def with_smaller_batch(
    beginning: Beginning, n_images: int, config: TrainConfig, *, team: Team, note: Note
) -> Beginning:
    """A batch of the images that can be read, where nobody asked for more. Raises UsageError where somebody did."""
    n_parts = team.size * beginning.recipe.accumulate
    batch_size = n_images // n_parts * n_parts
    if config.overrides.get("batch_size") is not None or batch_size < 2 * n_parts:
        advice = f"choose --batch-size {batch_size} or less" if batch_size >= 2 * n_parts else "name more images"
        raise UsageError(f"only {n_images} images can be read: {advice}")
    why = f"all the images that can be read{f', in {n_parts} equal parts' if n_parts > 1 else ''}"
    note(f"batch size {batch_size}: {why}")
    return replace(
        beginning,
        recipe=replace(beginning.recipe, batch_size=batch_size),
        why=beginning.why | {"batch size": why},
    )


def chooses_momentum(beginning: Beginning, config: TrainConfig) -> bool:
    """The teacher's momentum is ours to choose, by the number of steps."""
    asked = config.overrides.get("teacher_momentum") is not None
    return not (beginning.start or beginning.recipe.method == "dinov2" or asked)


def with_momentum_for(beginning: Beginning, steps: int, *, note: Note) -> Beginning:
    """What depends on the number of steps, once a time budget's is foreseen."""
    recipe = beginning.recipe
    momentum, why = momentum_for(steps)
    if momentum == recipe.teacher_momentum:
        return beginning
    note(f"teacher momentum {momentum:.4g} in so short a run: {why}")
    return replace(
        beginning,
        recipe=replace(recipe, teacher_momentum=momentum),
        why=beginning.why | {"teacher momentum": why},
    )
