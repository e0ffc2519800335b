"""`attention`: what a model looks at in an image, as a picture."""

import io
from pathlib import Path
from typing import Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption
from dinosearch.errors import DinosearchError

TIMES_LARGER = 2
"""Side of the picture looked at, in sides of the model's own square: more patches show more."""


def add_to(app: typer.Typer) -> None:
    app.command()(attention)


def attention(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    model: Annotated[
        str | None, typer.Option(help="Name in models/, a folder, timm:NAME or a released file; the newest without.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Short side to look at, in pixels; without, twice the model's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The PNG to write; IMAGE-attention.png here without.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw where the heads of a model's last block look in an image, and the main directions of its patch tokens.

    Example: dinosearch attention cat.jpg --size 480
    """
    from dinosearch.images import BadImage, decode_rgb, read_bytes
    from dinosearch.vit.attention import draw
    from dinosearch.vit.folder import models_path, write_whole
    from dinosearch.vit.resolve import resolve_model

    try:
        picture = decode_rgb(read_bytes(image))
    except BadImage as bad:
        raise DinosearchError(f"{image} cannot be read: {bad.reason}. Name an image file") from bad
    vit = resolve_model(model, models=models_path(), note=show.note)
    if vit.channels != 3:
        raise DinosearchError(
            f"{vit.name} takes images of {vit.channels} channels, and only RGB is drawn. Choose a --model of RGB images"
        )
    drawn = draw(vit, picture, short_side=size or TIMES_LARGER * vit.image_size)
    target = out or Path(f"{image.stem}-attention.png")
    if vit.pooling != "token":
        show.note(f"{vit.name} pools its patch tokens: drawn is where these look on average, not a class token")
    file = io.BytesIO()
    drawn.save(file, "PNG")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, file.getvalue())
    except OSError as error:
        raise DinosearchError(f"cannot write {target} ({error.strerror or error}). Name another --out") from error
    if as_json:
        show.json_line({"image": show.shown(image), "model": vit.name, "picture": show.shown(target)})
    else:
        show.raw_path(target, end=b"\n")
