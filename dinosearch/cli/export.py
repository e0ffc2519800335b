"""`export`: an index's vectors as files for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption


def add_to(app: typer.Typer) -> None:
    app.command()(export)


def export(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="Name or folder of an index.")],
    to: Annotated[str, typer.Option("--to", help="npy (with a CSV of the rows), csv or parquet.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to, without the ending; the index's name in this folder without.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an index's vectors, with the image of each, to files that other programs read.

    Example: dinosearch export indexes/catalog --to parquet
    """
    from dinosearch.index.export import export_index
    from dinosearch.index.locate import indexes_path, resolve_index

    index_path = resolve_index(index, indexes=indexes_path(), note=show.note)
    written = export_index(index_path, form=to, out=out)
    if as_json:
        show.json_line({"index": index_path.name, "files": [show.shown(path) for path in written]})
    else:
        for path in written:
            show.raw_path(path, end=b"\n")
