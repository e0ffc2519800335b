"""Muon (Jordan, 2024; arXiv 2502.16982) in the precision that the machine is quick in. Knows no model.

The same steps as `torch.optim.Muon`, which always multiplies in bfloat16: a processor without it in hardware takes
several times as long for that as in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of an odd polynomial that, five times over, brings singular values of 0.002 to 1 near 1."""

_MOST_TOGETHER = 1 << 20  # numbers: 64 of 128 × 128; larger matrices gain nothing, and several copies are held of each


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all made about 1, for matrices; a step is as long as one of AdamW's.

    dtype: of the matrix products. Parameters and momentum stay in the precision that they have.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient. closure: not supported; torch's signature has it."""
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            moving = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            for alike in _alike(moving):
                parameters, gradients = [p for p, _ in alike], [gradient for _, gradient in alike]
                smooth = [self._momentum_of(parameter) for parameter in parameters]
                torch._foreach_lerp_(smooth, gradients, 1.0 - momentum)
                nesterov = torch._foreach_lerp(gradients, smooth, momentum)
                updates = orthogonalise(torch.stack(nesterov), dtype=self.dtype)
                torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
                # an orthogonal matrix has entries of 1/√(longer side); AdamW's steps are of about 0.2
                step = -0.2 * lr * math.sqrt(max(parameters[0].shape))
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=step)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _alike(moving: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Parameters of one shape, with their gradients, together: products of small matrices take less time than calls.

    No more than _MOST_TOGETHER numbers, or one parameter.
    """
    stacks: list[list[tuple[Tensor, Tensor]]] = []
    open_stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for parameter, gradient in moving:
        stack = open_stacks.get(parameter.shape)
        if stack is None or (len(stack) + 1) * parameter.numel() > _MOST_TOGETHER:
            stack = open_stacks[parameter.shape] = []
            stacks.append(stack)
        stack.append((parameter, gradient))
    return stacks


def orthogonalise(matrices: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[n, rows, columns] → U · S · Vᵀ of each with S near 1, by five Newton-Schulz iterations; U and V are its own."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    made = matrices.to(dtype)
    if tall:
        made = made.mT
    made = made / made.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = made @ made.mT
        made = torch.baddbmm(made, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), made, beta=a)
    return made.mT if tall else made
