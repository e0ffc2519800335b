"""`relocate`: the images of an index lie elsewhere now."""

from dataclasses import asdict
from typing import Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import IndexOption, JsonOption, chosen_index


def add_to(app: typer.Typer) -> None:
    app.command()(relocate)


def relocate(
    old: Annotated[str, typer.Argument(metavar="OLD", help="Folder, archive or disk where the images were.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Where they are now.")],
    index: IndexOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell an index that its images were moved to another place as a whole.

    Example: dinosearch relocate /media/usb/photos /mnt/photos
    """
    from dinosearch.index.relocate import relocate as relocate_sources

    relocated = relocate_sources(chosen_index(index), old, new, note=show.note)
    if as_json:
        moved = {show.shown(before): show.shown(after) for before, after in relocated.sources.items()}
        show.json_line(asdict(relocated) | {"sources": moved})
        return
    for before, after in relocated.sources.items():
        show.line(f"{relocated.index}: {show.shown(before)} is {show.shown(after)} now")
    if relocated.entries:
        show.line(f"{relocated.index}: {relocated.entries} listed paths lie below {show.shown(new)} now")
