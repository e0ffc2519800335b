"""One training step: what moves, by how much, and what stays."""

from dataclasses import replace

import numpy as np
import pytest
import recipes
import torch

from dinosearch.pretrain.run import Run

CPU = torch.device("cpu")
TINY = replace(recipes.TINY, lr=1e-2)


def batch(n: int = 8) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
    return pixels, np.ones(n, dtype=np.float32)


def copies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_the_teacher_moves_by_its_momentum_towards_the_stepped_student() -> None:
    run = Run(replace(TINY, teacher_momentum=0.75), seed=0, device=CPU)
    before = copies(run.teacher)
    run.step(*batch(), step=0, done=0.0)
    student = copies(run.student)
    for name, after in copies(run.teacher).items():
        torch.testing.assert_close(after, 0.75 * before[name] + 0.25 * student[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_prototypes_stay_while_they_are_frozen(norm_last_layer: bool) -> None:
    run = Run(replace(TINY, norm_last_layer=norm_last_layer), seed=0, device=CPU)
    before = copies(run.student.head.prototypes)
    run.step(*batch(), step=0, done=0.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in copies(run.student.head.prototypes).items())
    run.step(*batch(), step=1, done=0.5)
    moved = {
        name for name, tensor in copies(run.student.head.prototypes).items() if not torch.equal(before[name], tensor)
    }
    assert moved == ({"weight_v"} if norm_last_layer else {"weight_v", "weight_g"})


def test_weight_decay_follows_its_schedule_and_spares_vectors() -> None:
    run = Run(TINY, seed=0, device=CPU)
    for step, done, expected in ((0, 0.0, 0.04), (1, 0.5, 0.22)):
        run.step(*batch(), step=step, done=done)
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (pytest.approx(expected) if parameter.ndim > 1 else 0.0)
    assert all(group["lr"] == pytest.approx((1e-2 + 1e-6) / 2) for group in run.optimizer.param_groups)


def test_every_gradient_is_clipped_by_itself() -> None:
    run = Run(replace(TINY, clip_grad=0.5), seed=0, device=CPU)
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    expected = []
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * (1e-4 if i % 2 else 10.0)
        expected.append(parameter.grad * min(1.0, 0.5 / (parameter.grad.norm().item() + 1e-6)))
    run._clip()
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7)


def test_koleo_changes_what_is_learnt_and_zero_is_plain_dino() -> None:
    students = []
    for weight in (0.0, 0.0, 0.5):
        run = Run(replace(TINY, koleo_weight=weight), seed=0, device=CPU)
        loss = run.step(*batch(), step=0, done=0.0).loss
        students.append((loss, run.student.backbone.state_dict()["norm.weight"].clone()))
    assert torch.equal(students[0][1], students[1][1])
    assert not torch.equal(students[0][1], students[2][1])
    assert students[0][0] == students[2][0]  # what is reported is DINO's loss alone


def test_layers_learn_at_rates_that_decay_with_their_depth() -> None:
    run = Run(replace(TINY, layer_decay=0.5, patch_embed_lr=0.2), seed=0, device=CPU)
    run.step(*batch(), step=0, done=0.0)
    names = {parameter: name for name, parameter in run.student.named_parameters()}
    found = {names[p]: group for group in run.optimizer.param_groups for p in group["params"]}
    assert set(found) == {name for name, p in run.student.named_parameters() if p.requires_grad}
    for start, share in (
        ("head.mlp.0.weight", 1.0),
        ("backbone.norm.weight", 1.0),
        ("backbone.blocks.1.mlp.fc1.weight", 0.5),
        ("backbone.blocks.0.norm1.bias", 0.25),
        ("backbone.pos_embed", 0.125),
        ("backbone.cls_token", 0.125),
        ("backbone.patch_embed.proj.weight", 0.125 * 0.2),
        ("backbone.patch_embed.proj.bias", 0.125 * 0.2),
    ):
        assert found[start]["lr"] == pytest.approx(1e-2 * share), start
        assert (found[start]["weight_decay"] > 0) == (run.student.get_parameter(start).ndim > 1), start


def test_only_the_head_learns_while_the_backbone_is_frozen() -> None:
    run = Run(replace(TINY, freeze_backbone=0.3, freeze_last_layer=0.0), seed=0, device=CPU)
    before = copies(run.student)
    run.step(*batch(), step=0, done=0.2)
    after = copies(run.student)
    assert all(
        torch.equal(before[name], after[name]) == name.startswith("backbone.") for name in before if "_g" not in name
    )
    state = run.state()
    again = Run(run.recipe, seed=0, device=CPU)
    again.put_back(state)
    losses = [r.step(*batch(), step=1, done=0.5).loss for r in (run, again)]
    assert losses[0] == losses[1]
    assert not torch.equal(run.student.state_dict()["backbone.pos_embed"], before["backbone.pos_embed"])
    assert torch.equal(*(r.student.state_dict()["backbone.pos_embed"] for r in (run, again)))


def test_a_run_starts_from_the_weights_it_is_given() -> None:
    start = Run(TINY, seed=5, device=CPU).teacher.backbone
    run = Run(TINY, seed=0, device=CPU, start=start)
    for net in (run.student, run.teacher):
        found = copies(net.backbone)
        assert all(torch.equal(found[name], tensor) for name, tensor in start.state_dict().items())
    assert not torch.equal(run.student.head.mlp[0].weight, Run(TINY, seed=5, device=CPU).student.head.mlp[0].weight)


def test_a_hidden_patch_is_unseen_and_its_head_learns() -> None:
    run = Run(replace(TINY, method="dinov2"), seed=0, device=CPU)
    student = run.student.eval()
    torch.nn.init.normal_(student.mask_token.weight)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1:3, 2:4] = True
    changed = images.clone()
    changed[0, :, 4:12, 8:16] = 0
    (features, patches), (same, _), (other, _) = (
        student.encode(images, masks),
        student.encode(changed, masks),
        student.encode(images),
    )
    assert patches.shape == (2, 16, 32)
    torch.testing.assert_close(features, same)
    assert not torch.allclose(features[0], other[0])
    torch.testing.assert_close(features[1], other[1])
    before = copies(run.student)
    outcome = run.step(*batch(), step=0, done=0.5)
    assert set(outcome.terms) == {"dino", "koleo", "ibot"}
    moved = {name for name, tensor in copies(run.student).items() if not torch.equal(tensor, before[name])}
    assert {"mask_token.weight", "patch_head.mlp.0.weight", "patch_head.prototypes.weight_v"} <= moved


def test_the_student_drops_paths_in_every_block_alike_and_the_teacher_none() -> None:
    run = Run(replace(TINY, drop_path_rate=0.2, uniform_drop_path=True), seed=0, device=CPU)
    rates = [block.drop_path1.drop_prob for block in run.student.backbone.blocks]
    assert rates == [0.2, 0.2]
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in run.teacher.backbone.blocks]
    assert rates == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "dinov2"])
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_a_compiled_step_is_the_eager_step(
    method: str, bf16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a small lr: Adam's first steps follow the signs of gradients, and large ones would amplify rounding
    monkeypatch.setattr("dinosearch.pretrain.run.has_bf16", lambda _: bf16)
    gentle = replace(TINY, lr=1e-4, method=method)
    losses = []
    for compiled in (False, True):
        run = Run(gentle, seed=0, device=CPU)
        if compiled:
            run.compile()
        losses.append([run.step(*batch(), step=i, done=i / 4).loss.item() for i in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
