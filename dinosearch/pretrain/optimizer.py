"""What moves the student's weights: AdamW for everything, or Muon for the matrices inside. Knows no loss.

Muon (Jordan, 2024; arXiv 2502.16982) makes every step of a matrix equally long in all directions, by orthogonalising
its momentum. Short runs gain from it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinosearch.errors import DinosearchError
from dinosearch.pretrain.device import has_bf16
from dinosearch.pretrain.muon import Muon
from dinosearch.pretrain.net import Net, layer_of
from dinosearch.pretrain.recipe import Recipe


class Optimizer:
    """AdamW, and with `recipe.optimizer` "muon" a second one for the matrices of the blocks."""

    def __init__(self, student: Net, recipe: Recipe, *, device: torch.device) -> None:
        muon = recipe.optimizer == "muon"
        groups = parameter_groups(student, recipe)
        fused = device.type in ("cpu", "cuda")
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([group for group in groups if not (muon and group["inner"])], lr=0.0, fused=fused)
        ]
        if muon:
            inner = [group for group in groups if group["inner"]]
            self._all.append(Muon(inner, lr=0.0, dtype=torch.bfloat16 if has_bf16(device) else torch.float32))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of `parameter_groups`, with torch's settings."""
        return [group for optimizer in self._all for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self._all:
            optimizer.zero_grad(set_to_none=True)

    def set(self, *, lr: float, weight_decay: float, muon_lr: float) -> None:
        """muon_lr: Muon's rate as a multiple of `lr`; weight decay takes as much in a step of either."""
        for optimizer in self._all:
            for group in optimizer.param_groups:
                faster = muon_lr if isinstance(optimizer, Muon) else 1.0
                group["lr"] = lr * faster * group["lr_multiplier"]
                group["weight_decay"] = weight_decay / faster if group["decays"] else 0.0

    def step(self) -> None:
        for optimizer in self._all:
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor they keep, by name; not copied."""
        return {
            f"{number}.{index}.{name}": tensor
            for number, optimizer in enumerate(self._all)
            for index, state in optimizer.state_dict()["state"].items()
            for name, tensor in state.items()
        }

    def put_back(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` gave, copied. Raises DinosearchError for another optimizer's, as of an old version."""
        for number, optimizer in enumerate(self._all):
            states: dict[int, dict[str, Tensor]] = {}
            for name, tensor in state.items():
                of, index, key = name.split(".", 2)
                if int(of) == number:
                    states.setdefault(int(index), {})[key] = tensor.clone()  # load_state_dict would keep the tensor
            _check_shapes(states, optimizer)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def _check_shapes(states: Mapping[int, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in states.items():
        shapes = {tensor.shape for tensor in state.values() if tensor.ndim}
        if index >= len(parameters) or not shapes <= {parameters[index].shape}:
            raise DinosearchError(
                "the checkpoint is of a dinosearch that divides weights among optimizers in another way. "
                "Go on with the version that began the run, or start over with --overwrite"
            )


def parameter_groups(student: Net, recipe: Recipe) -> list[dict[str, Any]]:
    """What is trained, grouped by weight decay (matrices only), by layer-wise learning rate, of which `lr_multiplier`
    is the share (DINOv2's param_groups.py), and by `inner`: the blocks' matrices, which Muon suits. The head's are few
    but large: they would double its time, and the vectors were no better for it.
    """
    n_blocks = len(student.backbone.blocks)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            multiplier = recipe.layer_decay ** (n_blocks + 1 - layer_of(name, n_blocks=n_blocks))
            if "patch_embed" in name:
                multiplier *= recipe.patch_embed_lr
            inner = parameter.ndim == 2 and name.endswith(".weight") and ".blocks." in name
            groups.setdefault((parameter.ndim > 1, multiplier, inner), []).append(parameter)
    return [
        {"params": parameters, "decays": decays, "lr_multiplier": multiplier, "inner": inner}
        for (decays, multiplier, inner), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
