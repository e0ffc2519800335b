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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                smooth = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
                update = orthogonalise(parameter.grad.lerp(smooth, momentum), dtype=self.dtype)  # Nesterov's
                parameter.mul_(1.0 - lr * group["weight_decay"])
                # an orthogonal matrix has entries of 1/√(longer side); AdamW's steps are of about 0.2
                parameter.add_(update, alpha=-0.2 * lr * math.sqrt(max(parameter.shape)))


def orthogonalise(matrix: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[rows, columns] → U · S · Vᵀ with S near 1, by five Newton-Schulz iterations; U and V are the matrix's own."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    made = matrix.to(dtype)
    if tall:
        made = made.T
    made = made / made.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = made @ made.T
        made = torch.addmm(made, torch.addmm(gram, gram, gram, beta=b, alpha=c), made, beta=a)
    return made.T if tall else made
