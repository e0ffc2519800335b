"""Where a run lies, and what of how it was begun holds when `--resume` goes on with it. Knows no tensor.

`kept` are the facts of its last checkpoint; where a function also serves a run that begins, they may be empty.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.source import ScanOptions
from dinosearch.images.sources import base_name, open_sources
from dinosearch.pretrain.checkpoint import PATTERN
from dinosearch.pretrain.config import TrainConfig
from dinosearch.pretrain.hold import given_up
from dinosearch.pretrain.logs import check_logs
from dinosearch.pretrain.overrides import OPTIONS
from dinosearch.vit.folder import Note, clean_name, free_name, path_for

if TYPE_CHECKING:
    from dinosearch.pretrain.bank import ImageBank
    from dinosearch.pretrain.course import Evaluate
    from dinosearch.pretrain.gather import TrainingImage

SOURCES = "sources.json"
"""Where the images of a run are, in its folder: by that `--resume` without a name finds it."""


def folder_for(config: TrainConfig) -> Path:
    """Where the model goes. Raises UsageError for a name whose model would be lost, unless --overwrite was given."""
    if config.name is not None:
        folder = path_for(config.name, config.models)
        if folder.exists() and not (config.resume or config.overwrite or given_up(folder)):
            raise UsageError(f"{folder} exists. Choose another --name, or --resume it, or --overwrite it")
        if config.resume and (folder / "model.json").exists() and not _begun(folder):
            raise UsageError(
                f"{folder} holds a model and no checkpoint to go on from. Choose another --name, or --overwrite it"
            )
        return folder
    if config.resume and (begun := _newest_run(config)) is not None:
        return begun
    [first, *_] = open_sources(config.specs)
    wanted = base_name(first)
    if config.overwrite:
        return config.models / clean_name(wanted)
    return config.models / free_name(wanted, config.models, given_up=given_up)


def _newest_run(config: TrainConfig) -> Path | None:
    """The folder of the run on these sources that wrote last. One killed before its first checkpoint counts.

    Runs that do not say where their images are, as earlier ones, may be meant too: others are refused by their images.
    """
    wanted, runs = sorted(_places(config)), []
    for training in config.models.glob("*/training"):
        folder, places = training.parent, _places_kept(training / SOURCES)
        resumable = _begun(folder) or (places is not None and not (folder / "model.json").exists())
        if resumable and (places is None or sorted(places) == wanted):
            runs.append((max(file.stat().st_mtime_ns for file in training.iterdir()), folder))
    return max(runs)[1] if runs else None


def _begun(folder: Path) -> bool:
    return any((folder / "training").glob(PATTERN))


def keep_places(config: TrainConfig, folder: Path) -> None:
    """Writes into the run's folder where its images are."""
    with contextlib.suppress(OSError):  # only --resume without a name looks for it
        (folder / "training" / SOURCES).write_text(json.dumps(_places(config)), encoding="utf-8")


def _places(config: TrainConfig) -> list[str]:
    """The sources, those on disk by their absolute paths."""
    return [_place(spec) for spec in config.specs]


def _place(spec: str) -> str:
    return os.path.realpath(spec) if Path(spec).exists() else spec


def _places_kept(path: Path) -> list[str] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def scan_options(config: TrainConfig, kept: Mapping[str, Any]) -> ScanOptions:
    """What of the sources counts; a resumed run remembers it."""
    return ScanOptions(
        exclude=config.exclude or tuple(kept.get("exclude", ())),
        include_hidden=config.include_hidden or kept.get("include_hidden", False),
    )


def remembered_logs(config: TrainConfig, kept: Mapping[str, Any], note: Note) -> tuple[str, ...]:
    """Those asked for, or those of the run that is resumed, as far as their libraries are here."""
    if config.logs:
        return config.logs
    logs = []
    for name in kept.get("logs", ()):
        try:
            check_logs([name])
        except DinosearchError as error:
            note(f"the run was logged by {name} too; going on without ({error})")
        else:
            logs.append(name)
    return tuple(logs)


def remembered_evaluate(config: TrainConfig, kept: Mapping[str, Any], note: Note) -> Evaluate | None:
    """By the labels given, or by those of the run that is resumed, if they are still there."""
    options = scan_options(config, kept)
    if config.evaluate is None and config.labels and config.examine is not None:
        return config.examine(config.labels, options)
    if config.evaluate is not None or not kept.get("labelled"):
        return config.evaluate
    missing = ""
    if config.examine is not None and kept.get("labels") is not None:
        try:
            return config.examine(kept["labels"], options)
        except DinosearchError as error:
            missing = f" ({error})"
    note(f"it was begun with --labels: without them no accuracy is reported from here on{missing}")
    return None


def labels_place(labels: str) -> str:
    """The absolute path of a labels file, for a resumed run that is begun in another folder."""
    return os.path.realpath(labels) if Path(labels).is_file() else labels  # "folders" is no path


def refuse_other_settings(kept: Mapping[str, Any], config: TrainConfig, *, digest: str, folder: Path) -> None:
    """Raises DinosearchError where settings or images differ from those that a run was begun with."""
    asked, before = settings_asked(config), kept["asked"] | {"seed": kept["seed"]}
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            only_set = name in config.overrides and name not in OPTIONS
            option = f"--set {name}" if only_set else f"--{name.replace('_', '-')}"
            known = before.get(name)
            begun = f"without {option}, not with" if known is None else f"with {option} {known}, not"
            raise UsageError(f"{folder} was begun {begun} {value}. Resume without it, or train under another --name")
    select = kept.get("select", config.select)
    if config.select not in (None, select):
        raise UsageError(
            f"{folder} was begun with --select {select}: leave --select out, or train under another --name"
        )
    if digest != kept["images_digest"]:
        raise DinosearchError(
            f"the images are not those that {folder} was begun with. Restore them, or train under another --name"
        )


def refuse_other_readable(
    kept: Mapping[str, Any], bank: ImageBank, images: Sequence[TrainingImage], *, folder: Path
) -> None:
    """Raises DinosearchError where other images can be read than when a run was begun: its batches would be others."""
    unreadable = bank.unreadable
    before = kept.get("unreadable", unreadable)  # earlier checkpoints do not tell
    different = set(before).symmetric_difference(unreadable)
    if not different:
        return
    first = min(different)
    path = images[first].shown_path()
    more = f", as {len(different) - 1} more have changed" if len(different) > 1 else ""
    over = f"or start over with --overwrite --name {folder.name} instead of --resume"
    if first in before:
        told = f"could not be read when {folder} was begun and can be now{more}. Make it unreadable again"
    else:
        bad = dict(bank.failed)[path]
        told = f"could be read when {folder} was begun and cannot any more ({bad.reason}){more}. Restore it"
    raise DinosearchError(f"{path} {told}, {over}")


def settings_asked(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON keeps them."""
    limits = {"steps": config.steps, "epochs": config.epochs, "minutes": config.minutes}
    given = limits | {"seed": config.seed, "from": config.start, "teacher": config.teacher}
    return json.loads(json.dumps(given | dict(config.overrides)))
