"""`forget`: erase images from an index."""

from dataclasses import asdict
from typing import Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import IndexOption, JsonOption, MemoryOption, bytes_of, chosen_index


def add_to(app: typer.Typer) -> None:
    app.command()(forget)


def forget(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Images, folders, archives or their members.")],
    index: IndexOption = None,
    max_memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase images from an index; their files stay. Of those still in their source the names are kept, so that no later
    run of index takes them in again.

    Example: dinosearch forget ./catalog/private
    """
    from dinosearch.index.forget import forget as forget_paths

    forgotten = forget_paths(chosen_index(index), paths, max_memory=bytes_of(max_memory), note=show.note)
    if as_json:
        show.json_line(asdict(forgotten))
        return
    show.line(
        f"{forgotten.index}: {forgotten.files} files and {forgotten.vectors} vectors erased, "
        f"{forgotten.images} images can be searched"
    )
    if forgotten.excluded:
        show.note(
            f"{len(forgotten.excluded)} of them are still in their source: their names are kept, so that index passes "
            "them over; delete the files first to erase their names too"
        )
