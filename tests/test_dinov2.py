"""The masked-patch loss, Sinkhorn-Knopp and KoLeo against their definitions, written as loops."""

import math
import threading

import pytest
import torch

from dinosearch.pretrain.dinov2 import IBOTLoss, SinkhornDINOLoss, koleo_loss, sinkhorn_knopp


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sinkhorn_as_loops(logits: torch.Tensor, *, temperature: float) -> list[list[float]]:
    """Three rounds of: every prototype gets 1 / out_dim of the mass, then every row 1 / n."""
    n, out_dim = logits.shape
    q = [[math.exp(logits[i, k].item() / temperature) for k in range(out_dim)] for i in range(n)]
    for _ in range(3):
        for k in range(out_dim):
            mass = sum(q[i][k] for i in range(n))
            for i in range(n):
                q[i][k] /= mass * out_dim
        for i in range(n):
            mass = sum(q[i])
            q[i] = [value / (mass * n) for value in q[i]]
    return [[value * n for value in row] for row in q]


def test_the_patch_loss_is_its_definition() -> None:
    """Images with 3, 1 and 0 hidden patches, and two places that hold none."""
    student, teacher, center = random(6, 7), random(6, 7, seed=1), random(7, seed=2)
    image_of = [0, 0, 0, 1]
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 0.0, 0.0])
    total = 0.0
    for image in range(3):
        patches = [i for i, owner in enumerate(image_of) if owner == image]
        for i in patches:
            target = torch.softmax((teacher[i] - center) / 0.05, dim=0)
            total -= (target * torch.log_softmax(student[i] / 0.1, dim=0)).sum().item() / len(patches)
    loss = IBOTLoss(7)
    loss.center.copy_(center)
    found = loss(student, teacher, weights, n_images=3, teacher_temperature=0.05)
    assert found.item() == pytest.approx(total / 3, rel=1e-5)
    torch.testing.assert_close(loss.center, 0.9 * center + 0.1 * teacher[:4].mean(dim=0))


def test_without_hidden_patches_the_patch_loss_is_zero_and_its_center_stays() -> None:
    for sinkhorn in (False, True):
        loss = IBOTLoss(7, sinkhorn=sinkhorn)
        loss.center.copy_(torch.arange(7.0))
        student = random(3, 7).requires_grad_()
        found = loss(student, random(3, 7), torch.zeros(3), n_images=4, teacher_temperature=0.05)
        found.backward()
        assert found.item() == 0
        assert not student.grad.any()
        assert torch.equal(loss.center, torch.arange(7.0))


def test_sinkhorn_is_its_definition_and_leaves_absent_rows_out() -> None:
    logits = random(5, 4).clamp(-1, 1)
    expected = torch.tensor(sinkhorn_as_loops(logits[:3], temperature=0.1))
    found = sinkhorn_knopp(logits, torch.tensor([True, True, True, False, False]), temperature=0.1)
    torch.testing.assert_close(found[:3], expected, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(found).all()


def test_sinkhorn_rows_are_probabilities_that_use_prototypes_alike_at_any_temperature() -> None:
    logits = random(64, 8) + 3 * random(8, seed=1)  # one prototype is everyone's favourite
    everyone = torch.ones(64, dtype=torch.bool)
    found = sinkhorn_knopp(logits, everyone, temperature=1.0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(64))
    assert found.mean(dim=0).max() / found.mean(dim=0).min() < 1.2
    assert torch.softmax(logits, dim=1).mean(dim=0).max() > 2 * found.mean(dim=0).max()
    assert torch.isfinite(sinkhorn_knopp(100 * logits, everyone, temperature=0.01)).all()


def test_sinkhorn_and_the_patch_center_are_those_of_the_whole_batch_in_every_process() -> None:
    """Two processes that each hold some of the patches, in turns as threads."""
    teacher, counted = random(10, 6), torch.tensor([True] * 3 + [False] * 2 + [True] * 5)
    whole = sinkhorn_knopp(teacher, counted, temperature=0.5)
    center = IBOTLoss(6)
    center.update_center(teacher, counted)
    meeting = threading.Barrier(2, timeout=20)
    brought: list[torch.Tensor] = [torch.empty(0)] * 2
    found: list[torch.Tensor] = [torch.empty(0)] * 2
    centers = [IBOTLoss(6), IBOTLoss(6)]

    def process(rank: int) -> None:
        def across(tensor: torch.Tensor) -> torch.Tensor:
            brought[rank] = tensor
            meeting.wait()
            mean = (brought[0] + brought[1]) / 2
            meeting.wait()
            return mean

        rows = slice(5 * rank, 5 * rank + 5)
        found[rank] = sinkhorn_knopp(teacher[rows], counted[rows], temperature=0.5, across=across)
        centers[rank].across = across
        centers[rank].update_center(teacher[rows], counted[rows])

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat(found)[counted], whole[counted], rtol=1e-4, atol=1e-6)
    for each in centers:
        torch.testing.assert_close(each.center, center.center)


def test_dino_with_sinkhorn_balances_both_crops_together_and_has_no_center() -> None:
    teacher = random(2, 3, 4).clamp(-1, 1)
    loss = SinkhornDINOLoss(4)
    expected = torch.tensor(sinkhorn_as_loops(teacher.flatten(0, 1), temperature=0.1)).view(2, 3, 4)
    torch.testing.assert_close(loss.assignments(teacher, teacher_temperature=0.1), expected, rtol=1e-4, atol=1e-6)
    student = random(4, 3, 4, seed=3)
    guess = torch.log_softmax(student / 0.1, dim=-1)
    pairs = [-(expected[q] * guess[v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q]
    found = loss(student, teacher, teacher_temperature=0.1)
    assert found.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-4)
    assert not loss.center.any()


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
