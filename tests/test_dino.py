"""DINO against its definitions, written as loops."""

import math

import pytest
import torch

from dinosearch.pretrain.dino import DINOHead, DINOLoss, update_teacher


def loss_as_loops(student: torch.Tensor, teacher: torch.Tensor, center: torch.Tensor, *, temperature: float) -> float:
    """Eq. 3 of arXiv 2104.14294: over teacher crops, over other student crops, over images."""
    total, n_pairs = 0.0, 0
    for q in range(2):
        for v in range(len(student)):
            if v == q:
                continue
            n_pairs += 1
            for image in range(student.shape[1]):
                target = torch.softmax((teacher[q, image] - center) / temperature, dim=0)
                guess = torch.log_softmax(student[v, image] / 0.1, dim=0)
                total += -(target * guess).sum().item() / student.shape[1]
    return total / n_pairs


@pytest.mark.parametrize("n_crops", [2, 3, 8])
def test_loss_is_its_definition(n_crops: int) -> None:
    generator = torch.Generator().manual_seed(n_crops)
    student = torch.randn(n_crops, 5, 17, generator=generator)
    teacher = torch.randn(2, 5, 17, generator=generator)
    loss = DINOLoss(17)
    loss.center.copy_(torch.randn(17, generator=generator))
    expected = loss_as_loops(student, teacher, loss.center.clone(), temperature=0.05)
    assert loss(student, teacher, teacher_temperature=0.05).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(4, 3, 11, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(2, 3, 11, generator=generator, dtype=torch.float64)
    DINOLoss(11)(student, teacher, teacher_temperature=0.04).backward()
    twin = student.detach().clone().requires_grad_()
    target = torch.softmax(teacher / 0.04, dim=-1)
    guess = torch.log_softmax(twin / 0.1, dim=-1)
    pairs = [-(target[q] * guess[v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q]
    torch.stack(pairs).mean().backward()
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-4, atol=1e-7)


def test_bfloat16_logits_lose_what_their_float32_copy_loses() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 3, 11, generator=generator).bfloat16()
    teacher = torch.randn(2, 3, 11, generator=generator)
    halves, floats = logits.clone().requires_grad_(), logits.float().requires_grad_()
    losses = [DINOLoss(11)(student, teacher, teacher_temperature=0.04) for student in (halves, floats)]
    for loss in losses:
        (3 * loss).backward()
    assert losses[0].item() == losses[1].item()
    torch.testing.assert_close(halves.grad.float(), floats.grad, rtol=1e-2, atol=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = torch.randn(2, 3, 7, requires_grad=True)
    DINOLoss(7)(torch.randn(2, 3, 7, requires_grad=True), teacher, teacher_temperature=0.04).backward()
    assert teacher.grad is None


def test_center_moves_after_the_loss_and_by_its_momentum() -> None:
    loss = DINOLoss(6, center_momentum=0.8)
    teacher = torch.randn(2, 4, 6)
    before = loss_as_loops(torch.zeros(2, 4, 6), teacher, torch.zeros(6), temperature=0.04)
    assert loss(torch.zeros(2, 4, 6), teacher, teacher_temperature=0.04).item() == pytest.approx(before, rel=1e-5)
    torch.testing.assert_close(loss.center, 0.2 * teacher.mean(dim=(0, 1)))


def test_a_student_that_knows_nothing_loses_ln_k() -> None:
    loss = DINOLoss(1024)(torch.zeros(6, 4, 1024), torch.randn(2, 4, 1024), teacher_temperature=0.04)
    assert loss.item() == pytest.approx(math.log(1024), rel=1e-6)


def test_prototypes_have_unit_length_and_logits_are_cosines() -> None:
    head = DINOHead(12, 33, hidden_dim=16, bottleneck_dim=8)
    features = torch.randn(5, 12)
    logits = head(features)
    bottleneck = torch.nn.functional.normalize(head.mlp(features), dim=1)
    for i in range(5):
        for k in range(33):
            prototype = head.prototypes.weight_v[k]
            cosine = torch.dot(bottleneck[i], prototype) / prototype.norm()
            assert logits[i, k].item() == pytest.approx(cosine.item(), abs=1e-6)
    assert not head.prototypes.weight_g.requires_grad


def test_teacher_follows_by_its_momentum() -> None:
    torch.manual_seed(0)
    teacher, student = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    start, end = teacher.weight.detach().clone(), student.weight.detach().clone()
    for _ in range(5):
        update_teacher(teacher, student, momentum=0.9)
    torch.testing.assert_close(teacher.weight.detach(), 0.9**5 * start + (1 - 0.9**5) * end)
    torch.testing.assert_close(student.weight.detach(), end)
