"""One training run: images in, a model folder out. Composes survey, recipe, bank, run and checkpoints.

`train` yields progress and prints nothing. All that is random comes from (seed, epoch) and (seed, step), none from
state that a resumed process would lack: a run that was interrupted ends with the tensors of one that was not.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dinosearch.errors import DinosearchError, Interrupted, UsageError
from dinosearch.images import compiler_present, n_cores
from dinosearch.images.source import ScanOptions
from dinosearch.images.sources import base_name, open_sources
from dinosearch.images.workers import DecodePool
from dinosearch.pretrain.bank import ImageBank, Survey, survey_images
from dinosearch.pretrain.card import write_card
from dinosearch.pretrain.checkpoint import PATTERN, last_checkpoint
from dinosearch.pretrain.course import Course, Evaluate, Progress, TrainReport, report_on
from dinosearch.pretrain.device import choose_device, describe_machine, keep_freed_memory
from dinosearch.pretrain.distill import Mentor, crop_size, find_mentor
from dinosearch.pretrain.distributed import Team, teamwork
from dinosearch.pretrain.gather import TrainingImage, decode_pool, gather_images, images_digest
from dinosearch.pretrain.logs import check_logs, open_logs
from dinosearch.pretrain.memory import available_bytes, forecast, out_of_memory_explained, ways_to_save
from dinosearch.pretrain.plan import plan_from_facts, plan_length
from dinosearch.pretrain.recipe import (
    Reason,
    Recipe,
    momentum_for,
    plan_recipe,
    recipe_from_facts,
    usual_batch_size,
)
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.warmstart import (
    DECIDED,
    SCRATCH,
    Start,
    choose_start,
    gentle_presets,
    keep_start,
    kept_start,
    refuse_decided,
)
from dinosearch.vit.folder import ModelFolder, Note, free_name, path_for, quiet, remove_model
from dinosearch.vit.resolve import resolve_model

FAILED = "failed.jsonl"
"""Lists the images that were left out, in the run's folder."""
SOURCES = "sources.json"
"""Where the images of a run are, in its folder: by that `--resume` without a name finds it."""
NO_LABELS = "--select labels needs some: name a CSV, or folders, with --labels"
BANK_MARGIN = 8 / 7
"""Squares are kept this much larger than the crops made of them, if the images have the pixels (256 for 224)."""


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
    """Replace a model of this name."""
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
    """Where `evaluate` has its labels from: a resumed run asks `examine` for the same."""
    examine: Callable[[str], Evaluate] | None = None
    """`evaluate` by such a name."""
    select: str | None = None
    """What chooses the weights that are exported: "quality", without labels, or "labels", by `evaluate`; None is
    "quality", or a resumed run's."""


def train(
    config: TrainConfig,
    *,
    note: Note = quiet,
    stop: Callable[[], bool] = lambda: False,
    began: float | None = None,
) -> Iterator[Progress]:
    """Train and save a model, yielding progress; the last item carries the report. `stop` is asked between steps.

    began: in time.monotonic() seconds, when the command was given, if that was earlier; a time budget runs from there.
    Raises DinosearchError: no images, a taken name, sizes that do not fit, a run that goes wrong whatever is changed.
    """
    began = time.monotonic() if began is None else began
    _check(config)
    device = choose_device(config.device)
    torch.set_num_threads(min(torch.get_num_threads(), n_cores()))  # a container's quota, not the host's cores
    if device.type == "cpu":
        keep_freed_memory()
    with teamwork(device.type) as team, decode_pool(n_beside=team.n_beside) as pool:
        items = _train(config, device, team, pool, note=note if team.leads else quiet, stop=stop, began=began)
        yield from (item for item in items if team.leads)


@dataclass(frozen=True)
class _Beginning:
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


def _train(
    config: TrainConfig,
    device: torch.device,
    team: Team,
    pool: DecodePool,
    *,
    note: Note,
    stop: Callable[[], bool],
    began: float,
) -> Iterator[Progress]:
    folder = Path(team.told(lambda: str(_folder_for(config))))
    checkpoint = last_checkpoint(folder / "training", note=note) if config.resume else None
    kept = checkpoint.facts if checkpoint else None
    if config.resume and kept is None:
        fresh = config.name is None and not (folder / "training").exists()
        note(
            f"no run on these images to resume in {config.models}/: starting one"
            if fresh
            else f"{folder} has no checkpoint yet: starting over"
        )
    options = _scan_options(config, kept or {})
    images = gather_images(_specs(config), options, note=note)
    digest = images_digest(images)
    if kept is None:
        beginning = team.in_turn(lambda: _choose(config, images, device=device, pool=pool, note=note))
    else:
        _refuse_other_settings(kept, config, digest=digest, folder=folder)
        if kept["report"] is not None:
            note(f"{folder} is finished: nothing to resume")
            yield Progress("done", kept["step"], kept["step"], report=TrainReport(**kept["report"]))
            return
        note(f"resuming {folder} at step {kept['step']} of {kept['plan']['total_steps']}")
        if kept["computed_on"] != describe_machine(device, team):
            note(f"it was begun on {kept['computed_on']}, not {describe_machine(device, team)}: not bit-equal any more")
        beginning = _remember(kept, config, folder=folder)
    logs = _logs(config, kept or {}, note)
    select = config.select or (kept or {}).get("select", "quality")
    evaluate = _evaluate(config, kept or {}, note)
    if select == "labels" and evaluate is None:
        raise UsageError(
            f"{folder} was begun with --select labels: give it, and --labels, again" if kept else NO_LABELS
        )
    recipe, start, mentor = beginning.recipe, beginning.start, beginning.mentor
    _check_parts(recipe, team)
    with out_of_memory_explained(recipe):
        run = Run(
            recipe,
            seed=beginning.seed,
            device=device,
            start=start.backbone if start else None,
            mentor=Mentor(mentor.load_vit(), mentor) if mentor else None,
            team=team,
        )
        team.follow(0)  # all have read the models that they learn from, one of which may go
        if team.leads:
            if config.overwrite and kept is None and folder.exists():
                remove_model(folder)
            (folder / "training").mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # only --resume without a name looks for it
                (folder / "training" / SOURCES).write_text(json.dumps(_places(config)), encoding="utf-8")
            if start is not None and kept is None:
                keep_start(start, folder / "training")
        team.follow(0)  # nobody writes there before
        note(f"model: {folder}, on {describe_machine(device, team)}")
        trained = _trained(config, beginning, n_images=len(images))
        if config.steps == 0:
            if team.leads:
                trained |= {"method": "none", "steps": 0}
                model = run.export(folder, trained=trained)
                write_card(model)
                yield Progress("done", 0, 0, report=report_on(model, trained, seconds=time.monotonic() - began))
            return

        bank = ImageBank(
            images,
            pool,
            side=beginning.side,
            grey=beginning.grey,
            channels=recipe.channels,
            folder=folder / "training",
            limit=config.cache_bytes,
            team=team,
        )
        note(f"cache: {bank}")
        for n_read in bank.read():
            yield Progress("reading", n_read, len(images))
            if stop() and n_read < len(images) and team.size == 1:
                if kept is not None:
                    raise Interrupted(f"stopped while reading: {folder} is as it was, --resume goes on from there")
                shutil.rmtree(folder)
                raise Interrupted("stopped before anything was learnt: there is nothing to save")
        if team.leads:
            bank.write_failed(folder / "training" / FAILED)
        if bank.failed:
            path, bad = bank.failed[0]
            note(
                f"{len(bank.failed)} of {len(images)} images are left out, such as {path} ({bad}); "
                f"all are listed in {folder / 'training' / FAILED}"
            )
        if len(bank) < recipe.batch_size:
            if kept is not None:
                raise DinosearchError(
                    f"only {len(bank)} images can be read, and {folder} was begun with batches of {recipe.batch_size}. "
                    "Restore them, or train under another --name"
                )
            beginning = _smaller(beginning, len(bank), config, team=team, note=note)
            recipe = beginning.recipe
            run.adopt(recipe)
            trained |= {"reasons": beginning.why}
        if kept is None:
            plan = plan_length(
                steps=config.steps,
                epochs=config.epochs,
                minutes=config.minutes,
                steps_per_epoch=len(bank) // recipe.batch_size,
                device_type=device.type,
                began=began,
                note=note,
            )
        else:
            plan = plan_from_facts(kept["plan"])
        foreseen = forecast(run, side=beginning.side, channels=bank.pixels.shape[1])
        first_step = kept["step"] if kept else 0
        plan.adapt(first_step, seconds_per_step=foreseen.seconds_per_step)
        [plan.total_steps] = team.follow(plan.total_steps)  # what depends on it has to be the same in all processes
        note(foreseen.told(n_steps=plan.total_steps - first_step, device=device))
        if kept is None:
            by_length = plan.deadline is not None and _momentum_by_length(beginning, config)
        else:
            by_length = kept.get("momentum_by_length", False)
        if kept is None and by_length:
            beginning = _for_length(beginning, plan.total_steps, note=note)
            recipe = beginning.recipe
            run.adopt(recipe)
            trained |= {"reasons": beginning.why}
        if foreseen.device_bytes > available_bytes(device):
            note(f"that may be too much: {ways_to_save(recipe)}")
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
                "seed": beginning.seed,
                "grey": beginning.grey,
                "side": beginning.side,
                "images_digest": digest,
                "exclude": options.exclude,
                "include_hidden": options.include_hidden,
                "computed_on": describe_machine(device, team),
                "reasons": beginning.why,
                "asked": _asked(config) if kept is None else kept["asked"],
                "logs": logs,
                "select": select,
                "momentum_by_length": by_length,
                "labelled": evaluate is not None,
                "labels": _labels_place(config.labels) if config.labels else (kept or {}).get("labels"),
                **beginning.origins,
            },
            trained=trained | {"images": len(bank), "failed": len(bank.failed)},
            note=note,
            checkpoint=checkpoint,
            evaluate=evaluate,
            select=select,
            momentum_by_length=by_length,
            logs=open_logs(
                logs if team.leads else (),
                folder / "training",
                config=recipe.facts() | {"seed": beginning.seed, "images": len(bank)},
                first_step=first_step,
            ),
        )
        yield from course.follow(checkpoint_every=config.checkpoint_every, strict=config.strict, stop=stop)


def _choose(
    config: TrainConfig, images: list[TrainingImage], *, device: torch.device, pool: DecodePool, note: Note
) -> _Beginning:
    """What a new run begins with, told to `note`."""
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
    _tell(reasons, note)
    size = crop_size(recipe.image_size, mentor) if mentor else recipe.image_size
    return _Beginning(
        recipe,
        seed=config.seed or 0,
        grey=survey.grey,
        side=_bank_side(size, survey),
        why={reason.name: reason.why for reason in reasons},
        start=start,
        mentor=mentor,
    )


def _smaller(beginning: _Beginning, n_images: int, config: TrainConfig, *, team: Team, note: Note) -> _Beginning:
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


def _momentum_by_length(beginning: _Beginning, config: TrainConfig) -> bool:
    """The teacher's momentum is ours to choose, by the number of steps."""
    asked = config.overrides.get("teacher_momentum") is not None
    return not (beginning.start or beginning.recipe.method == "dinov2" or asked)


def _for_length(beginning: _Beginning, steps: int, *, note: Note) -> _Beginning:
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


def _remember(kept: Mapping[str, Any], config: TrainConfig, *, folder: Path) -> _Beginning:
    return _Beginning(
        recipe_from_facts(kept["recipe"]),
        seed=kept["seed"],
        grey=kept["grey"],
        side=kept["side"],
        why=kept.get("reasons", {}),
        start=kept_start(folder / "training") if "start" in kept else None,  # not one of a run that never began
        mentor=_mentor_again(kept, config) if "teacher" in kept else None,
    )


def _check(config: TrainConfig) -> None:
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


def _check_parts(recipe: Recipe, team: Team) -> None:
    n_parts = team.size * recipe.accumulate
    if recipe.batch_size % n_parts or recipe.batch_size < 2 * n_parts:
        best = max(2, recipe.batch_size // n_parts) * n_parts  # rounded down: there may be no more images
        parts = f"{team.size} processes × --accumulate {recipe.accumulate}"
        raise UsageError(f"a batch of {recipe.batch_size} cannot be cut evenly for {parts}. Try --batch-size {best}")


def _logs(config: TrainConfig, kept: Mapping[str, Any], note: Note) -> tuple[str, ...]:
    """Those asked for, or those of the run that is resumed, as far as their libraries are here."""
    if config.logs:
        return config.logs
    logs = []
    for name in kept.get("logs", ()):
        try:
            check_logs([name])
        except DinosearchError as error:
            note(f"the run was logged by {name} too; going on without ({error})")
        else:
            logs.append(name)
    return tuple(logs)


def _evaluate(config: TrainConfig, kept: Mapping[str, Any], note: Note) -> Evaluate | None:
    """By the labels given, or by those of the run that is resumed, if they are still there."""
    if config.evaluate is not None or not kept.get("labelled"):
        return config.evaluate
    missing = ""
    if config.examine is not None and kept.get("labels") is not None:
        try:
            return config.examine(kept["labels"])
        except DinosearchError as error:
            missing = f" ({error})"
    note(f"it was begun with --labels: without them no accuracy is reported from here on{missing}")
    return None


def _specs(config: TrainConfig) -> list[str]:
    return [str(spec) for spec in config.images]


def _scan_options(config: TrainConfig, kept: Mapping[str, Any]) -> ScanOptions:
    """What of the sources counts; a resumed run remembers it."""
    return ScanOptions(
        exclude=config.exclude or tuple(kept.get("exclude", ())),
        include_hidden=config.include_hidden or kept.get("include_hidden", False),
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
    if config.overrides.get("local_crops"):
        raise UsageError("--method distill makes no small crops: leave --local-crops out")
    return resolve_model(config.teacher, models=config.models, note=note)


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


def _folder_for(config: TrainConfig) -> Path:
    """Where the model goes. Raises UsageError for a name whose model would be lost, unless --overwrite was given."""
    if config.name is not None:
        folder = path_for(config.name, config.models)
        if folder.exists() and not (config.resume or config.overwrite):
            raise UsageError(f"{folder} exists. Choose another --name, or --resume it, or --overwrite it")
        if config.resume and (folder / "model.json").exists() and not _begun(folder):
            raise UsageError(
                f"{folder} holds a model and no checkpoint to go on from. Choose another --name, or --overwrite it"
            )
        return folder
    if config.resume and (begun := _newest_run(config)) is not None:
        return begun
    [first, *_] = open_sources(_specs(config))
    return config.models / free_name(base_name(first), config.models)


def _newest_run(config: TrainConfig) -> Path | None:
    """The folder of the run on these sources that wrote last. One killed before its first checkpoint counts.

    Runs that do not say where their images are, as earlier ones, may be meant too: others are refused by their images.
    """
    wanted, runs = sorted(_places(config)), []
    for training in config.models.glob("*/training"):
        folder, places = training.parent, _places_kept(training / SOURCES)
        resumable = _begun(folder) or (places is not None and not (folder / "model.json").exists())
        if resumable and (places is None or sorted(places) == wanted):
            runs.append((max(file.stat().st_mtime_ns for file in training.iterdir()), folder))
    return max(runs)[1] if runs else None


def _begun(folder: Path) -> bool:
    return any((folder / "training").glob(PATTERN))


def _places(config: TrainConfig) -> list[str]:
    """The sources, those on disk by their absolute paths."""
    return [_place(spec) for spec in _specs(config)]


def _place(spec: str) -> str:
    return os.path.realpath(spec) if Path(spec).exists() else spec


def _labels_place(labels: str) -> str:
    return os.path.realpath(labels) if Path(labels).is_file() else labels  # "folders" is no path


def _places_kept(path: Path) -> list[str] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _refuse_other_settings(kept: Mapping[str, Any], config: TrainConfig, *, digest: str, folder: Path) -> None:
    asked, before = _asked(config), kept["asked"] | {"seed": kept["seed"]}
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            raise UsageError(
                f"{folder} was begun with --{name.replace('_', '-')} {before.get(name)}, not {value}. "
                "Resume without it, or train under another --name"
            )
    select = kept.get("select", config.select)
    if config.select not in (None, select):
        raise UsageError(
            f"{folder} was begun with --select {select}: leave --select out, or train under another --name"
        )
    if digest != kept["images_digest"]:
        raise DinosearchError(
            f"the images are not those that {folder} was begun with. Restore them, or train under another --name"
        )


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON keeps them."""
    limits = {"steps": config.steps, "epochs": config.epochs, "minutes": config.minutes}
    given = limits | {"seed": config.seed, "from": config.start, "teacher": config.teacher}
    return json.loads(json.dumps(given | dict(config.overrides)))


def _bank_side(size: int, survey: Survey) -> int:
    wanted = max(8, 8 * round(size * BANK_MARGIN / 8))
    return max(size, min(wanted, min(survey.width, survey.height)))


def _tell(reasons: list[Reason], note: Note) -> None:
    width = max(len(reason.name) for reason in reasons)
    value_width = max(len(reason.value) for reason in reasons)
    for reason in reasons:
        note(f"  {reason.name:<{width}}  {reason.value:<{value_width}}  {reason.why}")


def _trained(config: TrainConfig, beginning: _Beginning, *, n_images: int) -> dict[str, Any]:
    return {
        "method": beginning.recipe.method,
        "data": _specs(config),
        "images": n_images,
        "failed": 0,
        "seed": beginning.seed,
        "recipe": beginning.recipe.facts(),
        "reasons": beginning.why,
        **beginning.origins,
    }
