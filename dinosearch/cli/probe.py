"""`probe`: how well the indexed vectors tell labelled images apart."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import IndexOption, JsonOption, chosen_index

if TYPE_CHECKING:
    from dinosearch.query.probe import ProbeReport

LabelsOption = Annotated[
    str, typer.Option("--labels", help='CSV with columns path,label and optionally split, or "folders" (first level).')
]
MAX_ROWS = 40
"""Classes in the table for people."""


def add_to(app: typer.Typer) -> None:
    app.command()(probe)


def probe(
    labels: LabelsOption,
    index: IndexOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out split, where the CSV has none.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure how well the index's vectors tell labelled images apart, by k-NN vote and a linear probe.

    Example: dinosearch probe --labels labels.csv
    """
    from dinosearch.index.contents import read_vectors
    from dinosearch.query.labels import load_labels
    from dinosearch.query.probe import probe as probe_vectors

    files, vectors = read_vectors(chosen_index(index))
    known = load_labels(labels, files)
    if known.unmatched:
        first = known.unmatched[0]
        show.note(
            f"{len(known.unmatched)} lines of {labels} name no indexed image "
            f"(line {first.line}: {first.path}); {len(known.rows)} do"
        )
    if known.n_repeated:
        show.note(f"{known.n_repeated} lines of {labels} repeat another; they count once")
    if known.n_outside:
        show.note(f"{known.n_outside} indexed images lie in no folder that could be their label; {len(known.rows)} do")
    report = probe_vectors(vectors[known.rows], known.labels, split=known.splits, seed=seed, note=show.note)
    if as_json:
        show.json_line(asdict(report) | {"unmatched": len(known.unmatched)})
    else:
        _print_report(report)


def _print_report(report: "ProbeReport") -> None:
    hardest = sorted(report.per_class, key=lambda row: 2.0 if row.linear is None else row.linear)[:MAX_ROWS]
    kept = {row.label for row in hardest}
    if len(kept) < report.classes:
        show.note(f"the {MAX_ROWS} hardest of {report.classes} classes; --json has all")
    rows = [
        (row.label, row.n_train, row.n_test, show.percent(row.knn), show.percent(row.linear))
        for row in report.per_class
        if row.label in kept
    ]
    total = ("all", report.n_train, report.n_test, show.percent(report.knn.top1), show.percent(report.linear.top1))
    columns = ["class", "train", "test", f"k-NN (k = {report.knn.k})", f"linear (C = {report.linear.c:g})"]
    show.table(columns, [*rows, total], wide=["class"])
