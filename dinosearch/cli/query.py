"""`query`: the images most like some others."""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinosearch.cli import show
from dinosearch.cli.exits import SOME_FAILED
from dinosearch.cli.index import DeviceOption, IndexOption, JsonOption, chosen_index
from dinosearch.errors import ModelMismatch, UsageError

if TYPE_CHECKING:
    from dinosearch.query.search import Answer, Match
    from dinosearch.vit.folder import ModelFolder


def add_to(app: typer.Typer) -> None:
    app.command()(query)


def query(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files to ask with.")],
    top: Annotated[int, typer.Option("--top", "-t", "-n", "-k", min=1, help="How many matches for each.")] = 10,
    index: IndexOption = None,
    model: Annotated[
        str | None, typer.Option(help="Where the index's own model lies, if not in models/.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Only images of which a table says so: 'price<=20', brand=acme."),
    ] = None,
    paths: Annotated[bool, typer.Option("--paths", "-f", help="Print bare paths, one a line.")] = False,
    null: Annotated[bool, typer.Option("--null", "-0", help="Print bare paths, each ended by a NUL.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the indexed images that look most like an image.

    Example: dinosearch query cat.jpg --top 10
    """
    _refuse_words(images)
    index_path = chosen_index(index)
    from dinosearch.encoder import open_encoder
    from dinosearch.query.search import open_index, query_images

    with open_index(index_path, note=show.note) as opened:
        vit = _model_of(opened.fingerprint, index_path, model)
        encoder = open_encoder(
            vit, device=device, planned_images=len(images), precision=opened.precision, note=show.note
        )
        answers = query_images(opened, encoder, images, top=top, where=where or [])
        n_failed = 0
        for image, answer in zip(images, answers, strict=True):
            n_failed += answer.error is not None
            _print_answer(image, answer, paths=paths, null=null, as_json=as_json, title=len(images) > 1)
    if n_failed:
        raise typer.Exit(SOME_FAILED)


def _print_answer(image: str, answer: "Answer", *, paths: bool, null: bool, as_json: bool, title: bool) -> None:
    if as_json:
        matches = [_facts(match) for match in answer.matches]
        show.json_line(
            {"query": image, "error": answer.error} if answer.error else {"query": image, "matches": matches}
        )
    elif answer.error:
        show.note(f"{image}: {answer.error}")
    elif paths or null:
        for match in answer.matches:
            show.raw_path(match.path, end=b"\0" if null else b"\n")
    else:
        rows = [[match.rank, f"{match.score:.4f}", show.shown(match.path)] for match in answer.matches]
        columns = ["rank", "score", "path"]
        if any(match.frame for match in answer.matches):
            columns.append("frame")
            rows = [[*row, match.frame] for row, match in zip(rows, answer.matches, strict=True)]
        show.table(columns, rows, wide=["path"], title=image if title else None)


def _facts(match: "Match") -> dict[str, Any]:
    facts = asdict(match) | {"path": show.shown(match.path)}
    return {name: value for name, value in facts.items() if name not in ("frame", "metadata") or value}


def _refuse_words(images: list[str]) -> None:
    for image in images:
        looks_like_a_file = re.search(r"[/\\]|\.\w{1,5}$", image)
        if not looks_like_a_file and not os.path.exists(image):  # noqa: PTH110 - Path's raises for long words
            raise UsageError(
                f"no file {image!r}, and there is no text search: DINO compares images with images. "
                "Ask with an image file: dinosearch query cat.jpg"
            )


def _model_of(fingerprint: str, index_path: Path, spec: str | None) -> "ModelFolder":
    """The model that made the index's vectors; `spec` says where it lies when models/ does not have it."""
    from dinosearch.vit.folder import find_by_fingerprint, models_path
    from dinosearch.vit.resolve import resolve_model

    if spec is not None:
        vit = resolve_model(spec, models=models_path(), note=show.note)
        if vit.fingerprint == fingerprint:
            return vit
        raise ModelMismatch(
            f"{show.shown(index_path)} was made with model {fingerprint}, not with {vit.name} ({vit.fingerprint}). "
            f"Leave --model out, or embed its images anew: dinosearch index FOLDER --model {spec}"
        )
    found = find_by_fingerprint(fingerprint, models=models_path())
    if found is None:
        raise ModelMismatch(
            f"the model that made {show.shown(index_path)} (fingerprint {fingerprint}) is not in {models_path()}/. "
            "Put it back, point to it with --model, or index the folder again with another model"
        )
    return found
