"""Muon against torch's own, and its orthogonalisation against the singular value decomposition."""

import pytest
import torch

from dinosearch.pretrain.muon import Muon, orthogonalise


@pytest.mark.parametrize("most", [1 << 20, 1600, 1])
def test_steps_are_those_of_torch(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices of several shapes, some of them alike, which are moved together, two at a time or each alone."""
    monkeypatch.setattr("dinosearch.pretrain.muon._MOST_TOGETHER", most)
    shapes = [(48, 16), (16, 48), (32, 32), (16, 48), (48, 16), (48, 16)]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    moved = []
    for kind in ("ours", "torch"):
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        if kind == "ours":
            optimizer: torch.optim.Optimizer = Muon(parameters, lr=0.0, dtype=torch.bfloat16)
        else:
            optimizer = torch.optim.Muon(parameters, lr=0.0, adjust_lr_fn="match_rms_adamw")
        gradients = torch.Generator().manual_seed(1)
        for step in range(5):
            optimizer.param_groups[0] |= {"lr": 0.01 * (step + 1), "weight_decay": 0.1}
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=gradients)
            optimizer.step()
        moved.append([parameter.detach() for parameter in parameters])
    for start, ours, torchs in zip(starts, *moved, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)
        assert (ours - start).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_singular_values_become_about_1_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    other = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made, _ = orthogonalise(torch.stack([matrix, other]), dtype=torch.float64)
    inside = u.T @ made @ vh.T  # diagonal, if the directions stayed
    assert (inside.diagonal() - 1).abs().max() < 0.35  # what five of its iterations leave
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9
    half = orthogonalise(matrix[None], dtype=torch.bfloat16)[0].double()
    assert (half - made).abs().max() < 0.05


def test_what_has_no_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=1.0).step()
    assert torch.equal(parameter, torch.ones(4, 4))
