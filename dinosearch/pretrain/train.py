"""One training run: images in, a model folder out. Composes beginning, bank, run, plan and course.

`train` yields progress and prints nothing. All that is random comes from (seed, epoch) and (seed, step), none from
state that a resumed process would lack: a run that was interrupted ends with the tensors of one that was not.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dinosearch.errors import DinosearchError, Interrupted, UsageError
from dinosearch.images import compiler_present, n_cores
from dinosearch.images.workers import DecodePool
from dinosearch.pretrain.bank import ImageBank
from dinosearch.pretrain.beginning import (
    Beginning,
    choose_beginning,
    chooses_momentum,
    remember_beginning,
    with_momentum_for,
    with_smaller_batch,
)
from dinosearch.pretrain.card import write_card
from dinosearch.pretrain.checkpoint import last_checkpoint
from dinosearch.pretrain.config import NO_LABELS, TrainConfig, check_config
from dinosearch.pretrain.course import Course, Progress, TrainReport, report_on
from dinosearch.pretrain.device import choose_device, describe_machine, keep_freed_memory
from dinosearch.pretrain.distill import Mentor
from dinosearch.pretrain.distributed import Team, teamwork
from dinosearch.pretrain.gather import TrainingImage, decode_pool, gather_images, images_digest
from dinosearch.pretrain.hold import held_run, refuse_held
from dinosearch.pretrain.logs import open_logs
from dinosearch.pretrain.memory import available_bytes, forecast, out_of_memory_explained, ways_to_save
from dinosearch.pretrain.plan import Plan, plan_from_facts, plan_length
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.resume import (
    folder_for,
    keep_places,
    labels_place,
    refuse_other_readable,
    refuse_other_settings,
    remembered_evaluate,
    remembered_logs,
    scan_options,
    settings_asked,
)
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.warmstart import keep_start
from dinosearch.vit.folder import Note, quiet, unwritable_told

FAILED = "failed.jsonl"
"""Lists the images that were left out, in the run's folder."""


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
    check_config(config)
    device = choose_device(config.device)
    torch.set_num_threads(min(torch.get_num_threads(), n_cores()))  # a container's quota, not the host's cores
    if device.type == "cpu":
        keep_freed_memory()
    with teamwork(device.type) as team, decode_pool(n_beside=team.n_beside) as pool, ExitStack() as hold:
        items = _train(config, device, team, pool, hold, note=note if team.leads else quiet, stop=stop, began=began)
        yield from (item for item in items if team.leads)


def _train(
    config: TrainConfig,
    device: torch.device,
    team: Team,
    pool: DecodePool,
    hold: ExitStack,
    *,
    note: Note,
    stop: Callable[[], bool],
    began: float,
) -> Iterator[Progress]:
    """hold: takes what keeps the run's folder, to be let go after the run."""
    machine = describe_machine(device, team)
    folder = Path(team.told(lambda: str(folder_for(config))))
    if team.leads:
        refuse_held(folder)
    checkpoint = last_checkpoint(folder / "training", note=note) if config.resume else None
    kept = checkpoint.facts if checkpoint else None
    if config.resume and kept is None:
        fresh = config.name is None and not (folder / "training").exists()
        note(
            f"no run on these images to resume in {config.models}/: starting one"
            if fresh
            else f"{folder} has no checkpoint yet: starting over"
        )
    options = scan_options(config, kept or {})
    images = gather_images(config.specs, options, note=note)
    digest = images_digest(images)
    _refuse_other_images(team, digest)
    if kept is None:
        beginning = team.in_turn(lambda: choose_beginning(config, images, device=device, pool=pool, note=note))
    else:
        refuse_other_settings(kept, config, digest=digest, folder=folder)
        if kept["report"] is not None:
            note(f"{folder} is finished: nothing to resume")
            yield Progress("done", kept["step"], kept["step"], report=TrainReport(**kept["report"]))
            return
        note(f"resuming {folder} at step {kept['step']} of {kept['plan']['total_steps']}")
        if kept["computed_on"] not in (machine, machine.partition(", torch")[0]):  # earlier runs did not tell torch
            note(f"it was begun on {kept['computed_on']}, not on {machine}: not bit-equal any more")
        beginning = remember_beginning(kept, config, folder=folder)
    logs = remembered_logs(config, kept or {}, note)
    select = config.select or (kept or {}).get("select", "quality")
    evaluate = remembered_evaluate(config, kept or {}, note)
    if select == "labels" and evaluate is None:
        raise UsageError(
            f"{folder} was begun with --select labels: give it, and --labels, again" if kept else NO_LABELS
        )
    _check_parts(beginning.recipe, team)
    with out_of_memory_explained(beginning.recipe):
        run = _open_run(config, beginning, folder, hold, device=device, team=team, resumed=kept is not None)
        note(f"model: {folder}, on {machine}")
        if config.steps == 0:
            yield from _export_untrained(config, beginning, run, folder, n_images=len(images), began=began)
            return

        bank = ImageBank(
            images,
            pool,
            side=beginning.side,
            grey=beginning.grey,
            channels=beginning.recipe.channels,
            folder=folder / "training",
            limit=config.cache_bytes,
            team=team,
        )
        note(f"cache: {bank}")
        yield from _read(bank, folder, images, team=team, kept=kept, stop=stop, note=note)
        if len(bank) < beginning.recipe.batch_size:
            if kept is not None:
                raise DinosearchError(
                    f"only {len(bank)} images can be read, and {folder} was begun with batches of "
                    f"{beginning.recipe.batch_size}. Restore them, or train under another --name"
                )
            beginning = with_smaller_batch(beginning, len(bank), config, team=team, note=note)
            run.adopt(beginning.recipe)
        if kept is None:
            plan = plan_length(
                steps=config.steps,
                epochs=config.epochs,
                minutes=config.minutes,
                steps_per_epoch=len(bank) / beginning.recipe.batch_size,
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
            by_length = plan.deadline is not None and chooses_momentum(beginning, config)
        else:
            by_length = kept.get("momentum_by_length", False)
        if kept is None and by_length:
            beginning = with_momentum_for(beginning, plan.total_steps, note=note)
            run.adopt(beginning.recipe)
        if foreseen.device_bytes > available_bytes(device):
            note(f"that may be too much: {ways_to_save(beginning.recipe)}")
        _compile(run, plan, note=note)
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
                "unreadable": bank.unreadable,
                "exclude": options.exclude,
                "include_hidden": options.include_hidden,
                "computed_on": machine,
                "reasons": beginning.why,
                "asked": settings_asked(config) if kept is None else kept["asked"],
                "logs": logs,
                "select": select,
                "momentum_by_length": by_length,
                "labelled": evaluate is not None,
                "labels": labels_place(config.labels) if config.labels else (kept or {}).get("labels"),
                **beginning.origins,
            },
            trained=_trained(config, beginning, n_images=len(bank)) | {"failed": len(bank.failed)},
            note=note,
            checkpoint=checkpoint,
            evaluate=evaluate,
            select=select,
            momentum_by_length=by_length,
            logs=open_logs(
                logs if team.leads else (),
                folder / "training",
                config=beginning.recipe.facts() | {"seed": beginning.seed, "images": len(bank)},
                first_step=first_step,
            ),
        )
        yield from course.follow(checkpoint_every=config.checkpoint_every, strict=config.strict, stop=stop)


def _refuse_other_images(team: Team, digest: str) -> None:
    leader, *others = team.told_by_each(digest)
    for rank, found in enumerate(others, start=1):
        if found != leader:
            raise DinosearchError(
                f"process {rank} of this run finds other images than process 0. Give all of them the same files, then "
                "train again"
            )


def _refuse_other_readable(team: Team, bank: ImageBank, images: Sequence[TrainingImage]) -> None:
    """All processes shuffle what they can read: with one file more in one of them, batches would have no order left."""
    leader, *others = (set(numbers) for numbers in team.told_by_each(bank.unreadable))
    for rank, numbers in enumerate(others, start=1):
        if different := leader ^ numbers:
            first = min(different)
            reads, fails = (rank, 0) if first in leader else (0, rank)
            raise DinosearchError(
                f"process {reads} of this run can read {images[first].shown_path()} and process {fails} cannot. Give "
                "all of them the same files, then train again"
            )


def _check_parts(recipe: Recipe, team: Team) -> None:
    n_parts = team.size * recipe.accumulate
    if recipe.batch_size % n_parts or recipe.batch_size < 2 * n_parts:
        best = max(2, recipe.batch_size // n_parts) * n_parts  # rounded down: there may be no more images
        parts = f"{team.size} processes × --accumulate {recipe.accumulate}"
        raise UsageError(f"a batch of {recipe.batch_size} cannot be cut evenly for {parts}. Try --batch-size {best}")


def _open_run(
    config: TrainConfig,
    beginning: Beginning,
    folder: Path,
    hold: ExitStack,
    *,
    device: torch.device,
    team: Team,
    resumed: bool,
) -> Run:
    """The networks; then the run's folder, where a model to overwrite is put aside only if they can be made."""
    start, mentor = beginning.start, beginning.mentor
    run = Run(
        beginning.recipe,
        seed=beginning.seed,
        device=device,
        start=start.backbone if start else None,
        mentor=Mentor(mentor.load_vit(), mentor) if mentor else None,
        team=team,
    )
    team.follow(0)  # all have read the models that they learn from, one of which may go
    if team.leads:
        with unwritable_told(folder):
            hold.enter_context(held_run(folder, resumed=resumed, replace=config.overwrite or config.resume))
            keep_places(config, folder)
            if start is not None and not resumed:
                keep_start(start, folder / "training")
    team.follow(0)  # nobody writes there before
    return run


def _export_untrained(
    config: TrainConfig, beginning: Beginning, run: Run, folder: Path, *, n_images: int, began: float
) -> Iterator[Progress]:
    if run.team.leads:
        trained = _trained(config, beginning, n_images=n_images) | {"method": "none", "steps": 0}
        with unwritable_told(folder):
            model = run.export(folder, trained=trained)
            write_card(model)
        yield Progress("done", 0, 0, report=report_on(model, trained, seconds=time.monotonic() - began))


def _trained(config: TrainConfig, beginning: Beginning, *, n_images: int) -> dict[str, Any]:
    """What model.json says of the training, beside its outcome."""
    return {
        "method": beginning.recipe.method,
        "data": config.specs,
        "images": n_images,
        "failed": 0,
        "seed": beginning.seed,
        "recipe": beginning.recipe.facts(),
        "reasons": beginning.why,
        **beginning.origins,
    }


def _read(
    bank: ImageBank,
    folder: Path,
    images: Sequence[TrainingImage],
    *,
    team: Team,
    kept: Mapping[str, Any] | None,
    stop: Callable[[], bool],
    note: Note,
) -> Iterator[Progress]:
    """Fill the bank, and list what could not be read. Raises DinosearchError where that differs from what it has to be.

    kept: the facts of the run that is resumed.
    """
    n_images = len(images)
    for n_read in bank.read():
        yield Progress("reading", n_read, n_images)
        if stop() and n_read < n_images and team.size == 1:
            if kept is not None:
                raise Interrupted(f"stopped while reading: {folder} is as it was, --resume goes on from there")
            raise Interrupted("stopped before anything was learnt: there is nothing to save")
    _refuse_other_readable(team, bank, images)
    if kept is not None:
        refuse_other_readable(kept, bank, images, folder=folder)
    if team.leads:
        with unwritable_told(folder):
            bank.write_failed(folder / "training" / FAILED)
    if bank.failed:
        path, bad = bank.failed[0]
        note(
            f"{len(bank.failed)} of {n_images} images are left out, such as {path} ({bad}); "
            f"all are listed in {folder / 'training' / FAILED}"
        )


def _compile(run: Run, plan: Plan, *, note: Note) -> None:
    if run.device.type != "cuda" or not plan.repays_compiling:
        return
    if compiler_present():
        note("compiling the model, once per run (a minute or two)")
        run.compile()
    else:
        note("no C++ compiler found, so the model is not compiled and trains slower")
