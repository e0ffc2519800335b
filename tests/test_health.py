"""Health signals on teachers whose state is known."""

import math

import pytest
import torch

from dinosearch.pretrain.health import Health, effective_rank
from dinosearch.pretrain.health import look as look_at


def look(assignments: torch.Tensor, features: torch.Tensor) -> Health:
    return look_at(assignments, features, center=torch.zeros(assignments.shape[1]), loss=1.0)


def test_a_collapsed_teacher_shows_no_divergence_and_no_spread() -> None:
    health = look(torch.softmax(torch.ones(16, 1) @ torch.randn(1, 32), dim=1), torch.ones(16, 8))
    assert health.teacher_kl == pytest.approx(0.0, abs=1e-5)
    assert health.feature_std == pytest.approx(0.0, abs=1e-4)
    assert health.rank == pytest.approx(1.0, abs=1e-2)


def test_uniform_assignments_have_entropy_ln_k() -> None:
    health = look(torch.full((8, 64), 1 / 64), torch.randn(8, 4))
    assert health.teacher_entropy == pytest.approx(math.log(64), rel=1e-5)
    assert health.prototypes_used == pytest.approx(1.0, rel=1e-5)


def test_one_prototype_per_image_has_no_entropy_and_all_divergence() -> None:
    health = look(torch.eye(16), torch.eye(16))
    assert health.teacher_entropy == pytest.approx(0.0, abs=1e-6)
    assert health.teacher_kl == pytest.approx(math.log(16), rel=1e-5)
    assert health.rank == pytest.approx(16.0, rel=1e-4)


def test_kl_is_the_mean_divergence_from_the_mean() -> None:
    p = torch.softmax(torch.randn(10, 7, generator=torch.Generator().manual_seed(0)), dim=1)
    mean = p.mean(dim=0)
    expected = sum((row * (row / mean).log()).sum().item() for row in p) / 10
    assert look(p, torch.randn(10, 3)).teacher_kl == pytest.approx(expected, rel=1e-4)


def test_rank_counts_equal_directions() -> None:
    features = torch.zeros(30, 10)
    features[:, :3] = torch.eye(3).repeat(10, 1)
    assert effective_rank(features) == pytest.approx(3.0, rel=1e-4)


def test_the_loss_is_measured_by_what_a_uniform_assignment_costs() -> None:
    center = torch.tensor([3.0, 4.0] + [0.0] * 62)
    health = look_at(torch.full((8, 64), 1 / 64), torch.randn(8, 4), center=center, loss=math.log(64))
    assert health.loss_of_ln_k == pytest.approx(1.0)
    assert health.center_norm == pytest.approx(5.0)
