"""Features without labels: recall and rank on backbones whose answer is known, and which weights are exported."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinosearch.pretrain.quality import Best, Look, Quality, measure_quality, sample_rows
from dinosearch.pretrain.views import ViewSettings, multi_crop

VIEWS = ViewSettings(global_size=16, local_size=8, n_local=2)
CPU = torch.device("cpu")


class Pixels(nn.Module):
    """Features are the pixels themselves, of which the first `n` are seen; of none, all alike."""

    def __init__(self, n: int = 3 * 16 * 16) -> None:
        super().__init__()
        self.n = n

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.n] if self.n else torch.ones(len(images), 5)


def pictures(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (n, 3, 3, 3), generator=generator).float()
    return nn.functional.interpolate(coarse, size=20, mode="bilinear").to(torch.uint8), torch.ones(n)


def measured(backbone: nn.Module, views: ViewSettings = VIEWS, *, n: int = 40) -> Quality:
    return measure_quality(backbone.eval(), *pictures(n), views, device=CPU, seed=3)


def test_recall_is_the_share_of_images_that_find_themselves() -> None:
    pixels, aspect = pictures(40)
    views, _ = multi_crop(pixels, aspect, VIEWS, generator=torch.Generator().manual_seed(3))
    first, second = (nn.functional.normalize(view.flatten(1), dim=1) for view in views)
    right = 0
    for i in range(40):
        scores = [float(first[i] @ second[j]) for j in range(40)]
        right += scores.index(max(scores)) == i
    assert 0 < right < 40
    assert measured(Pixels()).recall_at_1 == pytest.approx(right / 40)


def test_undistorted_everything_is_found_and_collapsed_nothing_but_one() -> None:
    plain = ViewSettings(
        global_size=16, global_scale=(1, 1), flip=0, jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0)
    )
    assert measured(Pixels(), plain).recall_at_1 == 1.0
    quality = measured(Pixels(0))
    assert quality.recall_at_1 == pytest.approx(1 / 40)
    assert quality.rank == pytest.approx(1.0, abs=1e-3)


def test_rank_grows_with_the_directions_in_use() -> None:
    few, many = measured(Pixels(2)).rank, measured(Pixels()).rank
    assert 1 <= few <= 2 < many


def test_the_sample_is_spread_over_all_images_and_costs_a_few_batches_at_most() -> None:
    assert list(sample_rows(5, batch_size=64)) == [0, 1, 2, 3, 4]
    assert len(sample_rows(10_000, batch_size=16)) == 128
    rows = sample_rows(60_000, batch_size=64)
    assert len(rows) == len(set(rows)) == 512
    assert rows[-1] > 59_000


def look(step: int, score: float) -> Look:
    return Look(step=step, score=score, n=512, measured={"step": step})


def test_a_slightly_better_look_before_the_end_changes_nothing() -> None:
    best, backbone = Best(), nn.Linear(2, 2)
    best.offer(look(100, 0.55), nn.Linear(2, 2))
    assert best.chosen(look(200, 0.5), backbone) == (look(200, 0.5), backbone)


def test_what_was_clearly_better_is_exported_even_after_a_checkpoint() -> None:
    best, good = Best(), nn.Linear(2, 2)
    best.offer(look(100, 0.5), good)
    best.offer(look(200, 0.2), nn.Linear(2, 2))
    remembered = Best(best.facts(), best.tensors())
    for kept in (best, remembered):
        chosen, backbone = kept.chosen(look(300, 0.2), nn.Linear(2, 2))
        assert chosen == look(100, 0.5)
        assert torch.equal(backbone.state_dict()["weight"], good.weight)


def test_what_was_given_up_is_no_candidate() -> None:
    best, backbone = Best(), nn.Linear(2, 2)
    best.offer(look(100, 0.9), nn.Linear(2, 2))
    best.forget_after(100)
    assert best.look == look(100, 0.9)
    best.forget_after(50)
    assert best.chosen(look(200, 0.1), backbone)[1] is backbone
    assert best.facts() is None
    assert Best(best.facts(), best.tensors()).look is None


def test_measuring_changes_nothing_and_says_the_same_twice() -> None:
    state = torch.get_rng_state()
    assert measured(Pixels()) == measured(Pixels())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.isfinite(measured(Pixels()).rank)
