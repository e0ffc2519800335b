"""`export`: an index's vectors, or a model, as files for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption
from dinosearch.errors import UsageError


def add_to(app: typer.Typer) -> None:
    app.command()(export)


def export(
    source: Annotated[str, typer.Argument(metavar="INDEX|MODEL", help="Name or folder of an index, or of a model.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="Of an index: npy (with a CSV of the rows), csv, parquet. Of a model: onnx, openvino, hf."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to, without the ending; the source's name in this folder without.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an index's vectors, or a model, to files that other programs read; a model's are compared with it.

    Example: dinosearch export indexes/catalog --to parquet
    """
    from dinosearch.encoder.export import FORMS as MODEL_FORMS
    from dinosearch.index.export import FORMS as INDEX_FORMS

    if to in MODEL_FORMS:
        _export_model(source, to, out, as_json=as_json)
    elif to in INDEX_FORMS:
        _export_index(source, to, out, as_json=as_json)
    else:
        raise UsageError(f"no form {to!r}. Choose {', '.join(INDEX_FORMS)} (index) or {', '.join(MODEL_FORMS)} (model)")


def _export_index(source: str, to: str, out: Path | None, *, as_json: bool) -> None:
    from dinosearch.index.export import export_index
    from dinosearch.index.locate import indexes_path, resolve_index
    from dinosearch.vit.folder import model_in

    if model_in(Path(source)) is not None:
        raise UsageError(f"{source} is a model, and {to} holds an index's vectors. Choose --to onnx, openvino or hf")
    index_path = resolve_index(source, indexes=indexes_path(), note=show.note)
    written = export_index(index_path, form=to, out=out)
    if as_json:
        show.json_line({"index": index_path.name, "files": [show.shown(path) for path in written]})
    else:
        _print_paths(written)


def _export_model(source: str, to: str, out: Path | None, *, as_json: bool) -> None:
    from dinosearch.encoder.export import export_model
    from dinosearch.vit.folder import models_path
    from dinosearch.vit.resolve import resolve_model

    model = resolve_model(source, models=models_path(), note=show.note)
    written = export_model(model, form=to, out=out, note=show.note)
    if as_json:
        show.json_line(
            {
                "model": model.name,
                "files": [show.shown(path) for path in written.files],
                "cosine": written.cosine,
                "max_difference": written.max_difference,
            }
        )
        return
    if written.cosine is not None:
        show.note(f"compared with the model: cosine {written.cosine:.6f}, max difference {written.max_difference:.1e}")
    _print_paths(written.files)


def _print_paths(paths: list[Path]) -> None:
    for path in paths:
        show.raw_path(path, end=b"\n")
