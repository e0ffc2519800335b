"""`train`: a model from a folder of images."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.exits import asked_to_stop
from dinosearch.cli.index import DeviceOption, JsonOption

if TYPE_CHECKING:
    from dinosearch.pretrain.train import Progress, TrainReport


def add_to(app: typer.Typer) -> None:
    app.command()(train)


def train(
    images: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of images, with all below them.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's name without.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train so many steps; 0 saves the untrained model.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Train so many passes over the images.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train so long, and end with a finished schedule.")] = None,
    method: Annotated[
        str, typer.Option(help="auto, dino, or dinov2 (masked patches too; for a million images or more).")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal runs.")] = 0,
    device: DeviceOption = "auto",
    arch: Annotated[str | None, typer.Option(help="Any vision transformer of timm by name.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square the model sees, in pixels.")] = None,
    patch_size: Annotated[int | None, typer.Option(min=1, help="Side of a patch, in pixels.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run of this name.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model of this name.")] = False,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints; a power cut costs at most these.")
    ] = 30.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop when training goes wrong, instead of changing settings.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Teach a vision transformer from a folder of images, without labels.

    What is left out is chosen from the images and the machine, and printed.

    Example: dinosearch train ./images --minutes 30
    """
    from dinosearch.pretrain.overrides import parse_settings, read_config
    from dinosearch.pretrain.train import TrainConfig
    from dinosearch.pretrain.train import train as run_training
    from dinosearch.vit.folder import models_path

    options = {
        "method": None if method == "auto" else method,
        "arch": arch,
        "image_size": image_size,
        "patch_size": patch_size,
        "batch_size": batch_size,
        "lr": lr,
        "out_dim": out_dim,
        "local_crops": local_crops,
        "local_size": local_size,
    }
    overrides = read_config(config_file) if config_file else {}
    overrides |= parse_settings(settings or [])
    overrides |= {option: value for option, value in options.items() if value is not None}
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
        resume=resume,
        overwrite=overwrite,
        strict=strict,
        checkpoint_every=checkpoint_every,
    )
    report: TrainReport | None = None
    with asked_to_stop() as stop, show.Progress() as bar:
        for progress in run_training(config, note=show.note, stop=stop):
            bar.update(
                progress.phase,
                done=progress.done,
                total=progress.total,
                details=_details(progress),
                seconds_left=progress.seconds_left,
            )
            report = progress.report
    assert report is not None
    if as_json:
        facts = asdict(report) | {"model": Path(report.model).name}
        del facts["stopped"]
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
    for alarm in report.health.get("alarms", ()):
        show.line(
            f"{alarm['kind']} at step {alarm['step']}: {alarm['why']}; "
            f"went back to step {alarm['back_to_step']} with {alarm['changed']}"
        )
