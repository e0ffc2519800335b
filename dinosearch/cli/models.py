"""`models`: what models there are, and `models import`: weights of others as one of them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinosearch.cli import show
from dinosearch.cli.index import JsonOption

if TYPE_CHECKING:
    from dinosearch.vit.folder import ModelFolder


def add_to(app: typer.Typer) -> None:
    group = typer.Typer()
    group.callback(invoke_without_command=True)(models)
    group.command("import")(import_weights)
    app.add_typer(group, name="models")


def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the models in models/ with their fingerprints and metrics, newest first.

    Example: dinosearch models
    """
    if context.invoked_subcommand is not None:
        return
    from dinosearch.vit.folder import list_models, models_path

    found = list_models(models_path(), note=show.note)
    if as_json:
        for model in found:
            show.json_line(_facts(model))
        return
    if not found:
        show.note(f"no model in {models_path()}/. Train one: dinosearch train IMAGES")
    show.table(
        ["model", "fingerprint", "arch", "px", "dim", "created", "metrics"],
        [(m.name, m.fingerprint, m.arch, m.image_size, m.dim, m.created[:10], _metrics(m.trained)) for m in found],
        wide=["model", "arch", "metrics"],
    )


def import_weights(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A .pth or .safetensors file of DINO, DINOv2, DINOv3, or timm:NAME.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the model; the file's name without.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square the model sees, in pixels.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a model of released DINO, DINOv2 or DINOv3 weights, ready for index, query and train --from.

    Example: dinosearch models import dinov2_vits14_pretrain.pth --image-size 224
    """
    from dinosearch.vit.folder import models_path
    from dinosearch.vit.resolve import import_model

    model = import_model(source, models=models_path(), name=name, image_size=image_size, note=show.note)
    if as_json:
        show.json_line(_facts(model))
    else:
        show.line(f"{show.shown(model.path)}: fingerprint {model.fingerprint}")


def _facts(model: "ModelFolder") -> dict[str, Any]:
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "arch": model.arch,
        "image_size": model.image_size,
        "dim": model.dim,
        "created": model.created,
        "trained": model.trained,
    }


def _metrics(trained: dict[str, Any]) -> str:
    numbers = {name: trained.get(name) for name in ("steps", "loss")}
    numbers |= {
        name: (trained.get("quality") or {}).get(name) for name in ("recall_at_1", "embedding_rank", "knn_top1")
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, int | float))
