"""Learning from a stronger model: the terms against their definitions, and what a step moves."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dinosearch.pretrain.distill import (
    Mentor,
    as_seen_by,
    feature_loss,
    neighbour_loss,
    on_grid,
)
from dinosearch.pretrain.recipe import Recipe
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.views import ViewSettings
from dinosearch.vit.folder import ModelFacts, create_vit

CPU = torch.device("cpu")
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
RECIPE = Recipe(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 16, "patch_size": 8, **SMALL},
    image_size=16,
    patch_size=8,
    views=ViewSettings(global_size=16, n_local=0),
    method="distill",
    batch_size=8,
    warmup=0.0,
)
MENTOR_FACTS = ModelFacts(
    arch="vit_tiny_patch16_224",
    arch_kwargs={"img_size": 24, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
    image_size=24,
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
)


@pytest.fixture
def mentor() -> Mentor:
    torch.manual_seed(3)
    return Mentor(create_vit(MENTOR_FACTS).eval(), MENTOR_FACTS)


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Eight squares, each of a colour and a pattern of its own."""
    random = np.random.default_rng(seed)
    squares = random.integers(0, 256, (8, 3, 1, 1)) + random.normal(0, 30, (8, 3, 24, 24))
    return squares.clip(0, 255).astype(np.uint8), np.ones(8, dtype=np.float32)


def test_neighbours_are_those_of_the_mentor_as_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    features, wanted = torch.randn(10, 6, generator=generator), torch.randn(10, 9, generator=generator)
    temperature, losses = 0.3, []

    def softmax_over_others(vectors: torch.Tensor, i: int) -> dict[int, float]:
        view = range(5) if i < 5 else range(5, 10)
        cosine = {j: torch.cosine_similarity(vectors[i], vectors[j], dim=0).item() for j in view if j != i}
        total = sum(math.exp(c / temperature) for c in cosine.values())
        return {j: math.exp(c / temperature) / total for j, c in cosine.items()}

    for i in range(10):
        target, found = softmax_over_others(wanted, i), softmax_over_others(features, i)
        losses.append(-sum(target[j] * math.log(found[j]) for j in target))
    assert neighbour_loss(features, wanted, temperature=temperature).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_student_that_tells_nothing_apart_costs_the_logarithm_and_can_learn() -> None:
    wanted = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    alike = torch.ones(12, 4, requires_grad=True)
    assert neighbour_loss(alike, wanted, temperature=0.04).item() == pytest.approx(math.log(5), rel=1e-5)
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    neighbour_loss(features, wanted, temperature=0.04).backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_features_are_whitened_and_compared_as_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    projected, wanted = torch.randn(3, 7, generator=generator) * 3, torch.randn(3, 7, generator=generator) * 5 + 2
    losses = []
    for row, target in zip(projected.tolist(), wanted.tolist(), strict=True):
        mean = np.mean(target)
        deviation = math.sqrt(np.mean([(t - mean) ** 2 for t in target]) + 1e-5)
        for x, t in zip(row, target, strict=True):
            difference = abs(x - (t - mean) / deviation)
            losses.append(difference**2 / 4 if difference < 2 else difference - 1)
    assert feature_loss(projected, wanted).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_mentor_sees_its_own_size_and_normalisation() -> None:
    pixels = torch.full((2, 3, 16, 16), 0.25)
    mean, std = (torch.tensor(values)[:, None, None] for values in (RECIPE.views.mean, RECIPE.views.std))
    seen = as_seen_by(MENTOR_FACTS, (pixels - mean) / std, RECIPE)
    assert seen.shape == (2, 3, 24, 24)
    for channel, (m, s) in enumerate(zip(MENTOR_FACTS.mean, MENTOR_FACTS.std, strict=True)):
        torch.testing.assert_close(seen[:, channel], torch.full((2, 24, 24), (0.25 - m) / s), atol=1e-4, rtol=1e-4)


def test_patch_tokens_keep_their_places_on_a_coarser_grid() -> None:
    place = torch.arange(16.0).reshape(4, 4) // 2  # two columns of equal tokens by two
    fine = (place % 2 + 2 * (torch.arange(4)[:, None] // 2)).reshape(1, 16, 1)
    coarse = on_grid(fine, 2).flatten()
    assert coarse.argsort().tolist() == [0, 1, 2, 3]
    assert torch.equal(on_grid(fine, 4), fine)


def test_a_step_moves_the_student_and_never_the_mentor(mentor: Mentor) -> None:
    before = {name: t.clone() for name, t in mentor.vit.state_dict().items()}
    run = Run(replace(RECIPE, lr=3e-3), seed=0, device=CPU, mentor=mentor)
    assert not any("mentor" in name for name in run.state())
    losses = [run.step(*batch(i % 2), step=i, done=0.1).loss.item() for i in range(20)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert all(torch.equal(before[name], t) for name, t in mentor.vit.state_dict().items())
    health = run.look(run.step(*batch(), step=20, done=0.2), loss=losses[-1])
    assert all(math.isfinite(value) for value in health.facts().values())
    assert isinstance(run.teacher.backbone, nn.Module)
