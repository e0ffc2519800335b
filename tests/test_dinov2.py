"""KoLeo against its definition, written as loops."""

import math

import pytest
import torch

from dinosearch.pretrain.dinov2 import koleo_loss


def test_koleo_is_its_definition() -> None:
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    unit = [row / row.norm() for row in features]
    total = 0.0
    for i in range(9):
        total -= math.log(min((unit[i] - unit[j]).norm().item() for j in range(9) if j != i)) / 9
    assert koleo_loss(features).item() == pytest.approx(total, abs=1e-5)


def test_equal_vectors_give_a_finite_loss_and_gradient() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_a_step_against_the_gradient_spreads_the_vectors() -> None:
    features = (
        torch.ones(8, 4) + 0.01 * torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()
    before = koleo_loss(features)
    before.backward()
    assert koleo_loss(features.detach() - 1e-4 * features.grad).item() < before.item()
