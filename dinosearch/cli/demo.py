"""`demo`: the whole loop on real product images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.exits import asked_to_stop
from dinosearch.cli.index import DeviceOption, JsonOption

if TYPE_CHECKING:
    from dinosearch.demo.run import DemoReport


def add_to(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Images in one subfolder per class, or Fashion-MNIST's files.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of training; more learns more.")] = 4.0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train, index, query and probe on real product images, in ./demo/, within six minutes on two cores.

    Example: dinosearch demo --minutes 20
    """
    from dinosearch.demo.run import run_demo

    with asked_to_stop() as stop, show.Progress() as bar:
        report = run_demo(
            Path("demo"),
            data=data,
            minutes=minutes,
            device=device,
            note=show.note,
            progress=lambda stage, done, total, details: bar.update(stage, done=done, total=total, details=details),
            stop=stop,
        )
    if as_json:
        show.json_line(report.facts())
    else:
        _print_report(report)


def _print_report(report: "DemoReport") -> None:
    rows = (
        ("raw pixels", show.percent(report.pixels.knn), "–"),
        ("untrained ViT", show.percent(report.untrained.knn), show.percent(report.untrained.linear)),
        ("trained ViT", show.percent(report.trained.knn), show.percent(report.trained.linear)),
    )
    show.line(f"{report.data}: {report.n_train:,} images, accuracy on {report.n_test:,} held out")
    show.table(("vectors", f"k-NN (k = {report.knn_k})", "linear probe"), rows)
    show.line(report.sentence)
    show.line("")
    show.line(f"The same by hand, in {show.shown(report.folder)}/:")
    for command in report.commands:
        show.line(f"    {command}")
    show.line("")
    for name, what in (("matches.png", "queries and their neighbours"), ("report.html", "the same as a page")):
        show.line(f"{show.shown(report.folder / name)}: {what}")
