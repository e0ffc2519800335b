"""The last states of a run on disk: tensors as they are, the rest as JSON in the metadata of the same safetensors file.

A file is written aside, flushed and renamed: a kill at any moment leaves it whole or absent. There are no states of
random generators to keep: whatever is random in a run is drawn anew from (seed, step) or (seed, epoch).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import Note, first_line, quiet, write_whole

KEPT = 2
"""So many checkpoints stay: should the newest be damaged, there is one before it."""
PATTERN = "checkpoint-*.safetensors"
FORMAT = 2
"""2 has the facts in its digest, itself among them; 1 has only the tensors there and names no format."""


@dataclass(frozen=True)
class Checkpoint:
    """A state of a run that can be gone on from."""

    path: Path
    facts: dict[str, Any]
    """JSON values kept beside the tensors."""

    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path)


def save_checkpoint(folder: Path, *, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the state after `step` steps; then delete all but the last ones up to it.

    Later ones are deleted too: after a step back they belong to a course that was given up. Raises OSError, on a full
    disk say; what was there before is untouched then.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PATTERN.replace("*", f"{step:09}")
    told = json.dumps({"format": FORMAT, **facts}, allow_nan=False)
    metadata = {"facts": told, "digest": _digest(tensors, told)}
    write_whole(path, save(dict(tensors), metadata=metadata))
    found = sorted(folder.glob(PATTERN))
    at = found.index(path)
    for old in found[: max(0, at + 1 - KEPT)] + found[at + 1 :]:
        old.unlink()


def last_checkpoint(folder: Path, *, note: Note = quiet) -> Checkpoint | None:
    """The newest that can be read, or None without any. Raises DinosearchError if all are damaged or one is too new."""
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob(PATTERN), reverse=True)
    damage = ""
    for path in found:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                checkpoint = Checkpoint(path, json.loads(metadata["facts"]))
            told = metadata["facts"] if "format" in checkpoint.facts else ""
            if metadata["digest"] == _digest(checkpoint.tensors(), told):
                _refuse_later(checkpoint, folder)
                return checkpoint
            damage = f"{path} is damaged"
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            damage = f"{path} cannot be read ({first_line(error)})"
        note(f"{damage}; trying the one before it")
    if damage:
        raise DinosearchError(f"{damage}. {_start_over(folder)}")
    return None


def _refuse_later(checkpoint: Checkpoint, folder: Path) -> None:
    found = checkpoint.facts.get("format", 1)
    if found > FORMAT:
        raise DinosearchError(
            f"{checkpoint.path} was written by a newer dinosearch (checkpoint format {found}). Update dinosearch. "
            f"{_start_over(folder)}"
        )


def _start_over(folder: Path) -> str:
    return f"Start over with --name {folder.parent.name} --overwrite instead of --resume"


def _digest(tensors: Mapping[str, Tensor], told: str) -> str:
    """Over the facts as they were written and all names and bytes of tensors: a disk that returns other bits than it
    was given is noticed.
    """
    digest = blake3(told.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
