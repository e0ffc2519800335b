"""What a user sets of the recipe, by name: from `name=value` words and from files. Decides nothing itself."""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dinosearch.errors import UsageError
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.unused import unused
from dinosearch.pretrain.views import ViewSettings
from dinosearch.pretrain.warmstart import DECIDED, SCRATCH

RENAMED = {"n_local": "local_crops"}
"""A setting of the recipe that the command line calls otherwise, as users think of it."""
OPTIONS = {
    "method",
    "arch",
    "image_size",
    "fit",
    "patch_size",
    "channels",
    "batch_size",
    "lr",
    "accumulate",
    "checkpoint_activations",
    "out_dim",
    "local_crops",
    "local_size",
}
"""Settings that `train` has an option for; the others are given by --set."""
WITHOUT_DEFAULT = {f.name for f in fields(Recipe) if f.default is MISSING and f.default_factory is MISSING}
"""What makes a file a whole recipe, as a model records it with all its settings, and no choice of some of them."""
FOLLOWS_IMAGE_SIZE = "global_size"
"""The one setting that another decides."""
LIMITS = {
    **dict.fromkeys(("patch_size", "image_size", "local_size", "channels", "accumulate", "stripes"), (1, math.inf)),
    **dict.fromkeys(("batch_size", "out_dim", "head_hidden_dim", "head_bottleneck_dim"), (2, math.inf)),
    **dict.fromkeys(("flip", "grayscale", "blur", "solarize", "jitter"), (0, 1)),
    **dict.fromkeys(
        ("warmup", "temperature_warmup", "freeze_last_layer", "freeze_backbone", "mask_probability", "mask_ratio"),
        (0, 1),
    ),
    **dict.fromkeys(("global_scale", "local_scale"), (1e-4, 1)),
    **dict.fromkeys(("teacher_momentum", "center_momentum"), (0, 1)),
    **dict.fromkeys(("teacher_temperature", "warmup_teacher_temperature", "student_temperature"), (1e-4, math.inf)),
    **dict.fromkeys(("std",), (1e-6, math.inf)),
    **dict.fromkeys(("drop_path_rate",), (0, 0.999)),
    **dict.fromkeys(("layer_decay",), (0.01, 1)),
    **dict.fromkeys(("hue",), (0, 0.5)),
    **dict.fromkeys(("mean",), (-math.inf, math.inf)),
}
"""Smallest and largest value of settings; those not listed are 0 or more."""

RANGES = ("global_scale", "local_scale", "blur_sigma", "mask_ratio")
"""Settings of a smallest and a largest value that is drawn; other pairs may fall."""


def overridable() -> dict[str, Any]:
    """Every name that `--set` and `--config` know, with the type of its value."""
    known = typing.get_type_hints(Recipe) | typing.get_type_hints(ViewSettings)
    del known["views"], known[FOLLOWS_IMAGE_SIZE]
    return {RENAMED.get(name, name): kind for name, kind in known.items()}


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """`["lr=0.01", "blur=[1, 0, 0]"]` → values by name. Raises UsageError for unknown names and impossible values."""
    given = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"--set {word} sets nothing. Write name=value, such as teacher_temperature=0.05")
        try:
            given[name.strip().replace("-", "_")] = json.loads(text)
        except ValueError:
            given[name.strip().replace("-", "_")] = text.strip()
    return checked(given, where="--set")


def read_config(
    path: Path,
    *,
    start: str | None = None,
    teacher: str | None = None,
    beside: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """The recipe in a TOML or JSON file: a model's `model.json`, or any part of what it calls `recipe`.

    start, teacher: the models given beside it; what a start decides is then not taken from the file. beside: settings
    given there, which hold; what has no effect in a whole recipe, or beside them, nobody asked for, and it is not taken
    either. Raises UsageError when the file cannot be read or holds something else, or where its model learnt from
    another that is not given.
    """
    try:
        text = path.read_text(encoding="utf-8")
        facts = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--config {path} cannot be read as TOML or JSON ({error}). Name a .toml or .json file"
        ) from error
    if not isinstance(facts, dict):
        raise UsageError(f"--config {path} holds no table of settings. Write name = value lines, or use a model.json")
    of_model = isinstance(facts.get("trained"), dict)
    if of_model:
        facts = facts["trained"]
    learnt_from = {"start": (start, "--from"), "teacher": (teacher, "--teacher")}
    for role, (given, option) in learnt_from.items():
        if isinstance(origin := facts.get(role), dict) and given is None:
            raise UsageError(
                f"--config {path} is of a model that learnt from {origin.get('model')}: give that, or another, "
                f"with {option}"
            )
    if isinstance(facts.get("recipe"), dict):
        facts = facts["recipe"]
    views = facts.get("views")
    flat = {name: value for name, value in facts.items() if name != "views"} | (
        views if isinstance(views, dict) else {}
    )
    flat.pop(FOLLOWS_IMAGE_SIZE, None)
    whole = flat.keys() >= WITHOUT_DEFAULT
    if of_model and start not in (None, SCRATCH):
        flat = {name: value for name, value in flat.items() if name not in DECIDED}
    settings = checked({RENAMED.get(name, name): value for name, value in flat.items()}, where=f"--config {path}")
    idle = unused(settings) | unused(settings | dict(beside)) if whole else {}
    return {name: value for name, value in settings.items() if name not in idle}


def checked(given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Values of the types and within the limits that the recipe has. Raises UsageError that names `where`."""
    known = overridable()
    values = {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            advice = f"Did you mean {', '.join(close)}?" if close else f"There are {', '.join(sorted(known))}"
            raise UsageError(f"{where}: no setting {name!r}. {advice}")
        values[name] = _as_kind(value, known[name], where=f"{where}: {name}")
        low, high = LIMITS.get(name, (0, math.inf))
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(n, int | float) and not low <= n <= high for n in numbers):
            raise UsageError(f"{where}: {name} {value} is out of range: choose {low:g} to {high:g}")
        if name in RANGES and values[name][0] > values[name][1]:
            raise UsageError(f"{where}: {name} {value} is upside down: give the smaller number first")
    return values


def _as_kind(value: Any, kind: Any, *, where: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and number:
        return float(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        return value
    if origin is tuple and parts[-1] is Ellipsis and isinstance(value, list | tuple):
        parts = (parts[0],) * len(value)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
        return tuple(_as_kind(item, part, where=where) for item, part in zip(value, parts, strict=True))
    wanted = f"{len(parts)} numbers, such as [1, 0.1]" if origin is tuple else _WANTED.get(kind, "a table")
    raise UsageError(f"{where} {value!r} is not {wanted}")


_WANTED: dict[type | types.GenericAlias, str] = {
    bool: "true or false",
    int: "a whole number (2, say)",
    float: "a number (0.05, say)",
    str: "a name",
}
