"""`merge`: several indexes become one."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption

if TYPE_CHECKING:
    from dinosearch.index.merge import MergeSummary


def add_to(app: typer.Typer) -> None:
    app.command()(merge)


def merge(
    indexes: Annotated[list[str], typer.Argument(metavar="INDEX...", help="Names or folders of indexes of one model.")],
    name: Annotated[str, typer.Option(help="Name of the index that they become.")],
    as_json: JsonOption = False,
) -> None:
    """Make one index of several, such as the shards of a large run, without embedding anything.

    Example: dinosearch merge catalog-shard-1-of-2 catalog-shard-2-of-2 --name catalog
    """
    from dinosearch.index.locate import checked_name, indexes_path, resolve_index
    from dinosearch.index.merge import merge_indexes

    folder = indexes_path()
    paths = [resolve_index(index, indexes=folder, note=show.note) for index in indexes]
    summary: MergeSummary | None = None
    with show.Progress() as bar:
        for progress in merge_indexes(paths, into=folder / checked_name(name)):
            bar.update("merge", done=progress.done, total=progress.total)
            summary = progress.summary
    assert summary is not None
    if as_json:
        show.json_line(asdict(summary))
    else:
        show.line(f"{summary.index}: {summary.images} images of {summary.merged} indexes can be searched")
