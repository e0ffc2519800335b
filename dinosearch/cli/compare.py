"""`compare`: which of several indexes tells labelled images apart best."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption, chosen_index
from dinosearch.cli.probe import LabelsOption

if TYPE_CHECKING:
    from dinosearch.query.compare import Comparison, Difference

PROBES = {"knn": "k-NN", "linear": "linear"}


def add_to(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    labels: LabelsOption,
    index: Annotated[list[str], typer.Option("--index", help="Name or folder of an index; give two or more.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out split, where the CSV has none.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say which index, and so which model, tells labelled images apart better: same images, same split, paired.

    Example: dinosearch compare --labels labels.csv --index mine --index dinov2
    """
    from dinosearch.index.contents import read_vectors
    from dinosearch.query.compare import compare as compare_indexes

    # by what the user typed: two folders may end in one name
    opened = [(name, *read_vectors(chosen_index(name))) for name in index]
    comparison = compare_indexes(labels, opened, seed=seed, note=show.note)
    if comparison.unmatched:
        show.note(f"{comparison.unmatched} lines of {labels} name no indexed image")
    if comparison.left_out:
        show.note(f"{comparison.left_out} labelled images are not in all of the indexes and were left out")
    if as_json:
        show.json_line(asdict(comparison))
    else:
        _print_comparison(comparison)


def _print_comparison(comparison: "Comparison") -> None:
    rows = [(row.index, show.percent(row.knn), show.percent(row.linear)) for row in comparison.indexes]
    show.table(["index", "k-NN", "linear"], rows, wide=["index"])
    show.note(f"{comparison.classes} classes, {comparison.n_train} training and {comparison.n_test} test images")
    for difference in comparison.differences:
        show.line(f"{PROBES[difference.probe]}: {_verdict(difference)}")


def _verdict(found: "Difference") -> str:
    figures = (
        f"{found.first} − {found.second} = {100 * found.difference:+.1f} points, 95% between "
        f"{100 * found.low:+.1f} and {100 * found.high:+.1f}; {found.only_first} against {found.only_second} images "
        f"that only one gets right, p = {found.p:.2g}"
    )
    return f"{found.better} is better ({figures})" if found.better else f"the data cannot tell ({figures})"
