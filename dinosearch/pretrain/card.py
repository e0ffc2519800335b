"""A model's README.md: what it was taught from, how, how it went, and what not to expect of it."""

from collections.abc import Mapping
from typing import Any

from dinosearch.pretrain.curves import draw_curves
from dinosearch.pretrain.metrics import METRICS, read_metrics
from dinosearch.vit.folder import ModelFolder, write_whole

CURVES = "curves.png"
EXPLAINED = {
    "loss_of_ln_k": "of ln(prototypes), what knowing nothing costs",
    "teacher_kl": "nats by which assignments differ from their mean; near 0 all images look alike to the teacher",
    "prototypes_used": "share of the prototypes in use",
    "feature_std": "spread of the vectors; 1 is even, 0 is one point",
    "rank": "effective number of directions that the vectors use (RankMe)",
}

QUALITY = {
    "recall_at_1": "share of images that find themselves among many, under another distortion",
    "embedding_rank": "effective number of directions, of undistorted images",
    "knn_top1": "k-NN accuracy by the labels given",
    "step": "of the weights exported",
}
"""Measured without labels, but for the accuracy; those of the exported weights."""


def write_card(model: ModelFolder) -> None:
    """Write `README.md`, and `curves.png` where there is a run to draw, into the model's folder."""
    drawn = draw_curves(read_metrics(model.path / "training" / METRICS), model.path / CURVES)
    write_whole(model.path / "README.md", card(model, curves=drawn).encode("utf-8", "surrogateescape"))


def card(model: ModelFolder, *, curves: bool) -> str:
    """The text, in Markdown."""
    trained = model.trained
    untrained = trained.get("method") == "none"
    data = ", ".join(f"`{folder}`" for folder in trained.get("data", []))
    parts = [f"# {model.name}", _how(trained)]
    if curves:
        parts.append(f"![How the run went]({CURVES})")
    size = f"{model.image_size}×{model.image_size} px"
    parts += [
        "## Model",
        _table(
            {
                "architecture": f"timm `{model.arch}`, {_short(model.arch_kwargs)}",
                "input": f"{size}, {model.fit}, {model.interpolation}",
                "vector": f"{model.dim} numbers, pooling `{model.pooling}`{_stripes(model)}",
                "fingerprint": f"`{model.fingerprint}`",
                "created": model.created,
            }
        ),
        "## Use",
        _use(model),
        "## Data",
        f"{trained['images']:,} images from {data}{_failed(trained)}. Not part of this folder.",
        *_origins(trained),
    ]
    if not untrained:
        parts += ["## How it went", _outcome(trained), *_alarms(trained)]
    parts += [
        "## Recipe",
        f"Seed {trained['seed']}. `dinosearch train IMAGES --config model.json{_learnt_from(trained)}`, with the file "
        "beside this page, trains by it again.",
        _recipe(trained),
        "## Limits",
        "It knows what its images show and little else: on other kinds of images a released model will do better. "
        "But for a k-NN accuracy, no figure above uses labels; measure it on yours with "
        "`dinosearch probe --labels labels.csv`. "
        "Whatever the images over-represent, the neighbours will too.",
    ]
    return "\n\n".join(parts) + "\n"


def _how(trained: Mapping[str, Any]) -> str:
    """What these weights are, in a sentence or two."""
    start = trained.get("start")
    if trained.get("method") == "none":
        if start:
            return f"The weights of `{start['model']}` as they were: no step was made."
        return "An untrained vision transformer: random weights, to compare trained ones with."
    taught = f"taught by self-distillation ({trained['method']}) from {trained['images']:,} images without labels"
    if start and start.get("exported"):
        return (
            f"The weights of `{start['model']}` as they were: what was {taught} did not improve on them. Loss and "
            "health below are of what was learnt and given up, the quality is of these weights."
        )
    return f"A vision transformer {taught}."


def _use(model: ModelFolder) -> str:
    """Code blocks, run from the folder that holds models/."""
    arguments = "".join(f", {name}={value!r}" for name, value in model.arch_kwargs.items())
    takes = "which takes" if model.stripes == 1 else "where pixels is"
    return "\n".join(
        [
            f"    dinosearch index IMAGES --model {model.name}",
            f"    dinosearch export models/{model.name} --to onnx    # or openvino, hf",
            "",
            "or in Python, without dinosearch:",
            "",
            "    import timm",
            f"    vit = timm.create_model({model.arch!r}, num_classes=0, global_pool={model.pooling!r}{arguments},",
            f"                            checkpoint_path='models/{model.name}/weights.safetensors').eval()",
            "",
            *_pooling(model),
            f"{takes} float32 [n, {model.channels}, {model.image_size}, {model.image_size}], (x / 255 − mean) / std, "
            f"with mean {_short(model.mean)} and std {_short(model.std)}.",
        ]
    )


def _stripes(model: ModelFolder) -> str:
    return f" in each of {model.stripes} horizontal stripes" if model.stripes > 1 else ""


def _pooling(model: ModelFolder) -> list[str]:
    """What timm has no word for, to go below the code that makes the model."""
    if model.stripes == 1:
        return []
    return [
        "    patches = vit.forward_features(pixels)[:, vit.num_prefix_tokens:]     # row by row",
        f"    stripes = patches.unflatten(1, ({model.stripes}, -1)).mean(dim=2)",
        f"    vectors = vit.fc_norm(stripes).flatten(1)                             # [n, {model.dim}]",
        "",
    ]


def _failed(trained: Mapping[str, Any]) -> str:
    failed = trained.get("failed", 0)
    return f"; {failed:,} more could not be read" if failed else ""


def _learnt_from(trained: Mapping[str, Any]) -> str:
    """Options that name the models which training began with."""
    options = {"start": "--from", "teacher": "--teacher"}
    return "".join(f" {option} {trained[role]['model']}" for role, option in options.items() if trained.get(role))


def _origins(trained: Mapping[str, Any]) -> list[str]:
    """Whose weights went into these."""
    told = []
    for role, said in (("start", "Training started from"), ("teacher", "It was distilled from")):
        origin = trained.get(role) or {}
        if "source" in origin:
            told.append(f"{said} `{origin['source']}`: mind the licence of these weights{_licence(origin['source'])}.")
        elif "model" in origin:
            told.append(f"{said} the model `{origin['model']}`.")
    return told


def _licence(source: str) -> str:
    """By the name alone, so it says whose weights it speaks of."""
    if "dinov3" in source.lower():
        return " (Meta's DINOv3 come under the DINOv3 License)"
    return " (Meta's DINO and DINOv2 come under Apache 2.0)" if "dino" in source.lower() else ""


def _recipe(trained: Mapping[str, Any]) -> str:
    reasons = trained.get("reasons", {})
    rows = {
        name: (_short(value), str(reasons.get(name.replace("_", " "), "")))
        for name, value in _flat(trained["recipe"]).items()
    }
    if not reasons:
        return _table({name: value for name, (value, _) in rows.items()})
    lines = [f"| {name.replace('_', ' ')} | {_cell(value)} | {_cell(why)} |" for name, (value, why) in rows.items()]
    return "\n".join(["| | | why |", "|---|---|---|", *lines])


def _outcome(trained: Mapping[str, Any]) -> str:
    rows = {"steps": f"{trained['steps']:,}", "epochs": f"{trained['epochs']:g}"}
    if trained.get("loss") is not None:
        rows["loss"] = f"{trained['loss']:.4f}"
    for name, why in EXPLAINED.items():
        if name in trained.get("health", {}):
            rows[name.replace("_", " ")] = f"{trained['health'][name]:.4g} ({why})"
    for name, why in QUALITY.items():
        value = (trained.get("quality") or {}).get(name)
        if isinstance(value, int | float):
            rows[f"quality: {name}"] = f"{value:.4g} ({why})"
    return _table(rows)


def _alarms(trained: Mapping[str, Any]) -> list[str]:
    alarms = trained.get("health", {}).get("alarms", [])
    if not alarms:
        return ["No alarm: no sign of collapse or divergence at any look."]
    told = [
        f"- {alarm['kind']} at step {alarm['step']}: {alarm['why']}. Went back to step {alarm['back_to_step']}, "
        f"with {alarm['changed']}."
        for alarm in alarms
    ]
    return ["Alarms on the way; the recipe below is the one it ended with:", "\n".join(told)]


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "views"} | dict(recipe.get("views", {}))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_short(item) for item in value)
    return str(value)


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "/")
