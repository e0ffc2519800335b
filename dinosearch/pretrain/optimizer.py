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
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
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
            f"{number}.{self._names[parameter]}.{key}": tensor
            for number, optimizer in enumerate(self._all)
            for parameter, state in optimizer.state.items()
            for key, tensor in state.items()
        }

    def put_back(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` gave; the tensors are copied. Raises DinosearchError for what is not theirs."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self._all]
        indices = [self._indices(optimizer) for optimizer in self._all]
        for name, tensor in state.items():
            number, rest = name.split(".", 1)
            parameter, key = rest.rsplit(".", 1)
            if int(number) >= len(self._all) or parameter not in indices[int(number)]:
                raise DinosearchError(
                    "the checkpoint is of another version of dinosearch. Go on with that one, or start over with "
                    "--overwrite and its --name"
                )
            index = indices[int(number)][parameter]
            states[int(number)].setdefault(index, {})[key] = tensor.clone()  # load_state_dict would keep the tensor
        for optimizer, own in zip(self._all, states, strict=True):
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})

    def _indices(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """The number that torch gives each parameter, by its name."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {self._names[parameter]: index for index, parameter in enumerate(parameters)}


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
