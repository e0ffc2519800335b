"""Everything a run needs to go on, in one safetensors file: tensors as they are, the rest as JSON in its metadata."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import first_line, write_whole

FILE_NAME = "checkpoint.safetensors"


def save_checkpoint(
    folder: Path, *, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write `checkpoint.safetensors` in one step: a kill at any moment leaves the old one or the new one.

    modules: state to keep, by a prefix for its tensors. facts: JSON values to keep beside them.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor.detach().clone().contiguous().cpu()
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            tensors[f"optimizer.{index}.{name}"] = tensor.detach().clone().contiguous().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE_NAME, save(tensors, metadata={"facts": json.dumps(facts)}))


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What was kept beside the tensors, or None without a checkpoint. Raises DinosearchError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DinosearchError(
            f"{path} cannot be read ({first_line(error)}). Start over with --overwrite instead of --resume"
        ) from error


def restore(folder: Path, *, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back, bit for bit."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE_NAME)
    for prefix, module in modules.items():
        module.load_state_dict(_below(tensors, prefix))
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below(tensors, "optimizer").items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
