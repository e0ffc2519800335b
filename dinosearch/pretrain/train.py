"""One training run: images in, a model folder out. Composes survey, recipe, bank, run and checkpoints.

`train` yields progress and prints nothing. All that is random comes from (seed, epoch) and (seed, step), none from
state that a resumed process would lack: a run that was interrupted ends with the tensors of one that was not.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images import compiler_present, find_images, n_cores
from dinosearch.pretrain.bank import ImageBank, Survey, survey_images
from dinosearch.pretrain.card import write_card
from dinosearch.pretrain.checkpoint import PATTERN, last_checkpoint
from dinosearch.pretrain.course import Course, Progress, TrainReport, report_on
from dinosearch.pretrain.plan import UNBOUNDED, Plan, plan_length
from dinosearch.pretrain.recipe import Reason, Recipe, plan_recipe, recipe_from_facts
from dinosearch.pretrain.run import Run
from dinosearch.vit.folder import Note, free_name, quiet, remove_model

BANK_MARGIN = 8 / 7
"""Squares are kept this much larger than the crops made of them, if the images have the pixels (256 for 224)."""


@dataclass(frozen=True)
class TrainConfig:
    """What the user asked for. None leaves a choice to the recipe."""

    images: tuple[Path, ...]
    """Folders, searched recursively."""
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
    seed: int = 0
    """Equal seeds give equal runs, on the CPU with equal thread counts bit for bit."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The user's choices among the recipe's, by name: see plan_recipe."""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    overwrite: bool = False
    """Replace a model of this name."""
    strict: bool = False
    """Stop at the first sign of collapse or divergence, instead of going back and changing settings."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints; a kill loses at most these."""


def train(config: TrainConfig, *, note: Note = quiet, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
    """Train and save a model, yielding progress; the last item carries the report. `stop` is asked between steps.

    Raises DinosearchError: no images, a taken name, sizes that do not fit, a run that goes wrong whatever is changed.
    """
    began = time.monotonic()
    device = choose_device(config.device)
    torch.set_num_threads(min(torch.get_num_threads(), n_cores()))  # a container's quota, not the host's cores
    _check(config)
    paths = _find(config.images)
    folder = _folder_for(config)
    checkpoint = last_checkpoint(folder / "training", note=note) if config.resume else None
    kept = checkpoint.facts if checkpoint else None
    if config.resume and kept is None:
        note(f"{folder} has no checkpoint yet: starting over")
    digest = _digest(paths)
    if kept is None:
        survey = survey_images(paths)
        recipe, reasons = plan_recipe(
            survey,
            accelerator=device.type != "cpu",
            overrides=config.overrides,
            steps=config.steps,
            epochs=config.epochs,
        )
        _tell(reasons, note)
        seed, grey, side = config.seed, survey.grey, _bank_side(recipe, survey)
    else:
        _refuse_other_settings(kept, config, digest=digest, folder=folder)
        if kept["report"] is not None:
            note(f"{folder} is finished: nothing to resume")
            yield Progress("done", kept["step"], kept["step"], report=TrainReport(**kept["report"]))
            return
        note(f"resuming {folder} at step {kept['step']} of {kept['total_steps']}")
        recipe, seed, grey, side = recipe_from_facts(kept["recipe"]), kept["seed"], kept["grey"], kept["side"]
    run = Run(recipe, seed=seed, device=device)
    if config.overwrite and kept is None and folder.exists():
        remove_model(folder)
    (folder / "training").mkdir(parents=True, exist_ok=True)
    note(f"model: {folder}, on {describe_device(device)}")
    if config.steps == 0:
        facts = _trained(config, recipe, seed=seed, n_images=len(paths)) | {"method": "none", "steps": 0}
        model = run.export(folder, trained=facts)
        write_card(model)
        yield Progress("done", 0, 0, report=report_on(model, facts, seconds=time.monotonic() - began))
        return

    bank = ImageBank(paths, side=side, grey=grey, folder=folder / "training")
    for n_read in bank.read():
        yield Progress("reading", n_read, len(paths))
        if stop():
            break
    if bank.failed:
        path, reason = bank.failed[0]
        note(f"{len(bank.failed)} of {len(paths)} files are left out, such as {path} ({reason})")
    if len(bank) < recipe.batch_size:
        raise UsageError(f"only {len(bank)} images can be read: choose --batch-size {len(bank)} or less")
    steps_per_epoch = len(bank) // recipe.batch_size
    if kept is None:
        plan = plan_length(
            steps=config.steps,
            epochs=config.epochs,
            minutes=config.minutes,
            steps_per_epoch=steps_per_epoch,
            device_type=device.type,
            began=began,
            note=note,
        )
    else:
        plan = Plan(kept["total_steps"], deadline=None)
        if plan.total_steps == UNBOUNDED:  # a time budget, stopped before any step was timed
            plan.deadline = began + 60 * kept["asked"]["minutes"]
    if device.type == "cuda" and plan.repays_compiling:
        if compiler_present():
            note("compiling the model, once per run (a minute or two)")
            run.compile()
        else:
            note("no C++ compiler found, so the model is not compiled and trains slower")
    course = Course(
        run,
        bank,
        plan,
        folder=folder,
        began=began,
        kept={
            "seed": seed,
            "grey": grey,
            "side": side,
            "images_digest": digest,
            "asked": _asked(config) if kept is None else kept["asked"],
        },
        trained=_trained(config, recipe, seed=seed, n_images=len(bank)),
        note=note,
        checkpoint=checkpoint,
    )
    yield from course.follow(checkpoint_every=config.checkpoint_every, strict=config.strict, stop=stop)


def choose_device(wanted: str) -> torch.device:
    """auto → the GPU if there is one, else the CPU. Raises UsageError for a device that is not there."""
    mps = torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"no device {wanted!r}: choose auto, cpu, cuda, cuda:N or mps") from None
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not {"cpu": True, "mps": mps, "cuda": (device.index or 0) < n_cuda}.get(device.type, False):
        raise UsageError(f"this machine has no {wanted}: leave --device out, or choose cpu")
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)


def _check(config: TrainConfig) -> None:
    if sum(limit is not None for limit in (config.steps, config.epochs, config.minutes)) > 1:
        raise UsageError("--steps, --epochs and --minutes exclude each other: choose one")
    if (config.steps is not None and config.steps < 0) or any(
        limit is not None and not 0 < limit < math.inf for limit in (config.epochs, config.minutes)
    ):
        raise UsageError("--steps must be 0 or more, --epochs and --minutes more than 0")
    if config.resume and config.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: choose one")


def _find(folders: tuple[Path, ...]) -> list[Path]:
    paths = [folder / image.path for folder in folders for image in find_images(folder).images]
    if not paths:
        raise DinosearchError(f"no images in {', '.join(map(str, folders))}. Name a folder that holds some")
    return paths


def _folder_for(config: TrainConfig) -> Path:
    """Where the model goes. Raises UsageError when the name is taken and neither --resume nor --overwrite was given."""
    if config.name is not None:
        if not config.name or Path(config.name).name != config.name or config.name.startswith("."):
            raise UsageError(f"--name {config.name!r} is no name for a folder: leave out slashes and leading dots")
        folder = config.models / config.name
        if folder.exists() and not (config.resume or config.overwrite):
            raise UsageError(f"{folder} exists. Choose another --name, or --resume it, or --overwrite it")
        return folder
    base = config.images[0].resolve().name
    if config.resume:
        begun = list(config.models.glob(f"*/training/{PATTERN}"))
        if not begun:
            raise DinosearchError(f"no run in {config.models}/ has a checkpoint. Leave --resume out")
        return max(begun, key=lambda path: path.stat().st_mtime_ns).parent.parent
    return config.models / free_name(base, config.models)


def _refuse_other_settings(kept: Mapping[str, Any], config: TrainConfig, *, digest: str, folder: Path) -> None:
    asked, before = _asked(config), kept["asked"]
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            raise UsageError(
                f"{folder} was begun with --{name.replace('_', '-')} {before.get(name)}, not {value}. "
                "Resume without it, or train under another --name"
            )
    if digest != kept["images_digest"]:
        raise DinosearchError(
            f"the images are not those that {folder} was begun with. Restore them, or train under another --name"
        )


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON keeps them."""
    limits = {"steps": config.steps, "epochs": config.epochs, "minutes": config.minutes}
    return json.loads(json.dumps(limits | {"seed": config.seed or None} | dict(config.overrides)))


def _digest(paths: list[Path]) -> str:
    """Over names and sizes of all files: cheap, and enough to notice that a run would see other images."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _bank_side(recipe: Recipe, survey: Survey) -> int:
    wanted = max(8, 8 * round(recipe.image_size * BANK_MARGIN / 8))
    return max(recipe.image_size, min(wanted, min(survey.width, survey.height)))


def _tell(reasons: list[Reason], note: Note) -> None:
    width = max(len(reason.name) for reason in reasons)
    value_width = max(len(reason.value) for reason in reasons)
    for reason in reasons:
        note(f"  {reason.name:<{width}}  {reason.value:<{value_width}}  {reason.why}")


def _trained(config: TrainConfig, recipe: Recipe, *, seed: int, n_images: int) -> dict[str, Any]:
    return {
        "method": recipe.method,
        "data": [str(folder) for folder in config.images],
        "images": n_images,
        "seed": seed,
        "recipe": recipe.facts(),
    }
