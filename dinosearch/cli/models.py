"""`models`: what models there are. A group, so that more can be done with models later."""

from typing import Any

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption


def add_to(app: typer.Typer) -> None:
    group = typer.Typer()
    group.callback(invoke_without_command=True)(models)
    app.add_typer(group, name="models")


def models(as_json: JsonOption = False) -> None:
    """List the models in models/ with their fingerprints and metrics, newest first.

    Example: dinosearch models
    """
    from dinosearch.vit.folder import list_models, models_path

    found = list_models(models_path(), note=show.note)
    if as_json:
        for model in found:
            show.json_line(
                {
                    "model": model.name,
                    "fingerprint": model.fingerprint,
                    "arch": model.arch,
                    "image_size": model.image_size,
                    "dim": model.dim,
                    "created": model.created,
                    "trained": model.trained,
                }
            )
        return
    if not found:
        show.note(f"no model in {models_path()}/. Train one: dinosearch train IMAGES")
    show.table(
        ["model", "fingerprint", "arch", "px", "dim", "created", "metrics"],
        [(m.name, m.fingerprint, m.arch, m.image_size, m.dim, m.created[:10], _metrics(m.trained)) for m in found],
        wide=["model", "arch", "metrics"],
    )


def _metrics(trained: dict[str, Any]) -> str:
    numbers = {name: trained.get(name) for name in ("steps", "loss", "knn_top1")} | (trained.get("metrics") or {})
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float))
