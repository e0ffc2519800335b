"""`train`: a model from images."""

import math
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.exits import asked_to_stop
from dinosearch.cli.index import DeviceOption, JsonOption
from dinosearch.errors import UsageError

if TYPE_CHECKING:
    from dinosearch.pretrain.course import Progress, TrainReport


class Select(StrEnum):
    quality = "quality"
    labels = "labels"


def add_to(app: typer.Typer) -> None:
    app.command()(train)


def train(
    images: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Folders, archives, lists, tables, quoted globs or URLs.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's name without.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train so many steps; 0 saves the untrained model.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Train so many passes over the images.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train so long, and end with a finished schedule.")] = None,
    method: Annotated[
        str,
        typer.Option(help="auto, dino, dinov2 (masked patches too; for a million images or more), or distill."),
    ] = "auto",
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Equal seeds give equal runs; 0 without.")
    ] = None,
    device: DeviceOption = "auto",
    arch: Annotated[str | None, typer.Option(help="Any vision transformer of timm by name.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square the model sees, in pixels.")] = None,
    fit: Annotated[
        str | None, typer.Option(help="How indexed images meet that square: crop, pad or squash; crop without.")
    ] = None,
    patch_size: Annotated[int | None, typer.Option(min=1, help="Side of a patch, in pixels.")] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="Of multi-channel images: so many bands or pages of a TIFF; 3 is RGB.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images per step, of all processes together.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Parts of a batch computed one after another, to save memory.")
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Save memory by computing blocks again in backward passes.")
    ] = False,
    out_dim: Annotated[int | None, typer.Option(min=2, help="Number of prototypes.")] = None,
    local_crops: Annotated[int | None, typer.Option(min=0, help="Small crops of each image.")] = None,
    local_size: Annotated[int | None, typer.Option(min=1, help="Side of a small crop, in pixels.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other line of the recipe, as model.json names it."),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Take the recipe from a model.json, or a TOML or JSON file.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Go on with the weights of a model: a name, timm:NAME or a file."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="Learn from this stronger model.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of this name, or the last one on these images.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model of this name, when there is a new one.")
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints; a power cut costs at most these.")
    ] = 30.0,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Pass over paths like this, as in .gitignore.")
    ] = None,
    include_hidden: Annotated[
        bool, typer.Option("--include-hidden", help="Take names that begin with a dot too.")
    ] = False,
    cache_size: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="GIB", help="Keep decoded images in so much memory or disk, and decode the others each time."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop when training goes wrong, instead of changing settings.")
    ] = False,
    logs: Annotated[
        list[str] | None,
        typer.Option("--log", metavar="LOG", help="Log to tensorboard or wandb (offline) too, in training/."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help='Report k-NN accuracy on the way: a CSV with path,label, or "folders" (first level).'),
    ] = None,
    select: Annotated[
        Select | None,
        typer.Option(
            help="What may choose an earlier state for export: quality (without labels), as usual, or labels."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a vision transformer from images, without labels.

    What is left out is chosen from the images and the machine, and printed.

    Example: dinosearch train ./images --minutes 30
    """
    began = time.monotonic()
    from dinosearch.images.source import ScanOptions
    from dinosearch.pretrain.config import TrainConfig
    from dinosearch.pretrain.distributed import leads_team
    from dinosearch.pretrain.overrides import checked, parse_settings, read_config
    from dinosearch.pretrain.train import train as run_training
    from dinosearch.query.exam import Exam, open_exam
    from dinosearch.vit.folder import models_path, quiet

    say = show.note if leads_team() else quiet
    options = {
        "method": None if method == "auto" else method,
        "arch": arch,
        "image_size": image_size,
        "fit": fit,
        "patch_size": patch_size,
        "channels": channels,
        "batch_size": batch_size,
        "lr": lr,
        "accumulate": accumulate,
        "checkpoint_activations": checkpoint_activations or None,
        "out_dim": out_dim,
        "local_crops": local_crops,
        "local_size": local_size,
    }
    overrides = parse_settings(settings or [])
    overrides |= checked({option: value for option, value in options.items() if value is not None}, where="train")
    if config_file:
        overrides = read_config(config_file, start=start, teacher=teacher, beside=overrides) | overrides
    if cache_size is not None and not math.isfinite(cache_size):
        raise UsageError("--cache-size is a number of GiB: leave it out to keep as much as there is room for")

    def examine(labels: str, options: ScanOptions) -> Exam:
        return open_exam(labels, [Path(spec) for spec in images], options=options, note=say)

    scanned = ScanOptions(exclude=tuple(exclude or ()), include_hidden=include_hidden)

    config = TrainConfig(
        images=tuple(images),
        models=models_path(),
        name=name,
        steps=steps,
        epochs=epochs,
        minutes=minutes,
        seed=seed,
        device=device,
        overrides=overrides,
        start=start,
        teacher=teacher,
        resume=resume,
        overwrite=overwrite,
        exclude=scanned.exclude,
        include_hidden=scanned.include_hidden,
        cache_bytes=None if cache_size is None else int(cache_size * 2**30),
        strict=strict,
        checkpoint_every=checkpoint_every,
        logs=tuple(logs or ()),
        evaluate=examine(labels, scanned) if labels and not resume else None,
        labels=labels,
        examine=examine,
        select=select.value if select else None,
    )
    report: TrainReport | None = None
    with asked_to_stop() as stop, show.Progress() as bar:
        for progress in run_training(config, note=show.note, stop=stop, began=began):
            bar.update(
                progress.phase,
                done=progress.done,
                total=progress.total,
                details=_details(progress),
                seconds_left=progress.seconds_left,
            )
            report = progress.report
    if report is None:  # of several processes, one speaks for all
        return
    if as_json:
        facts = asdict(report) | {"model": Path(report.model).name}
        del facts["stopped"]
        facts["health"]["quality"] = facts.pop("quality")
        show.json_line(facts)
    else:
        _print_report(report)
    if report.stopped:
        show.note(f"stopped and saved; --name {Path(report.model).name} --resume goes on from there")
        raise KeyboardInterrupt


def _details(progress: "Progress") -> str:
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    health = progress.health
    if health is not None:
        parts.append(
            f"({health.loss_of_ln_k:.0%} of ln K)  entropy {health.teacher_entropy:.2f}  KL {health.teacher_kl:.2f}  "
            f"prototypes {health.prototypes_used:.0%}  center {health.center_norm:.1f}  "
            f"std {health.feature_std:.2f}  rank {health.rank:.1f}"
        )
    if progress.quality is not None:
        parts.append(f"recall@1 {progress.quality.recall_at_1:.3f} of rank {progress.quality.rank:.1f}")
    if progress.knn_top1 is not None:
        parts.append(f"k-NN {progress.knn_top1:.3f}")
    if progress.images_per_second:
        parts.append(f"{progress.images_per_second:.0f} images/s")
    return "  ".join(parts)


def _print_report(report: "TrainReport") -> None:
    show.line(f"{show.shown(Path(report.model))}: fingerprint {report.fingerprint}")
    loss = f", loss {report.loss:.3f}" if report.loss is not None else ""
    speed = f", {report.images_per_second:.0f} images/s" if report.images_per_second else ""
    show.line(
        f"{report.steps} steps, {report.epochs:.3g} epochs of {report.images} images "
        f"in {show.duration(report.seconds)}{loss}{speed}"
    )
    if report.quality:
        knn = f", k-NN accuracy {report.knn_top1:.3f}" if report.knn_top1 is not None else ""
        quality = report.quality
        show.line(
            f"features of step {quality['step']}: recall@1 {quality['recall_at_1']:.3f} under distortions, "
            f"effective rank {quality['embedding_rank']:.1f}{knn}"
        )
    for alarm in report.health.get("alarms", ()):
        show.line(
            f"{alarm['kind']} at step {alarm['step']}: {alarm['why']}; "
            f"went back to step {alarm['back_to_step']} with {alarm['changed']}"
        )
