"""Which patches are hidden: how many, in how many images, and in what shapes."""

import pytest
import torch

from dinosearch.pretrain.masking import block_masks, masked_places, most_masked, patches_to_mask

RATIO = (0.1, 0.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int, grid: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    counts = patches_to_mask(n, grid * grid, probability=0.5, ratio=RATIO, generator=generator)
    return counts, block_masks(counts, grid, generator=generator)


def test_half_of_the_images_lose_a_tenth_to_a_half_of_their_patches() -> None:
    counts, masks = drawn(400, 14)
    hidden = masks.flatten(1).sum(dim=1)
    assert (hidden > 0).sum() == (counts > 0).sum() == 200
    assert (hidden <= counts).all()
    share = hidden[hidden > 0] / 196
    assert share.min() >= 0.08  # a block that fits may not be found
    assert share.max() <= 0.5
    assert share.mean().item() == pytest.approx(0.3, abs=0.01)
    assert (counts[:200] > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)  # anywhere in the batch


def test_masks_of_one_block_are_rectangles_of_allowed_shape() -> None:
    masks = block_masks(torch.full((2000,), 30), 14, generator=seeded())
    aspects = []
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        if height * width == int(mask.sum()):  # a filled rectangle, so one block
            aspects.append(height / width)
    assert len(aspects) > 50
    # sides are rounded to whole patches: of those that make some 30, 3 × 10 is the longest block near 0.3
    assert min(aspects) >= 3 / 10
    assert max(aspects) <= 10 / 3
    assert min(aspects) < 0.6
    assert max(aspects) > 1.6


def test_hidden_patches_have_hidden_neighbours() -> None:
    _, masks = drawn(200, 14)
    padded = torch.nn.functional.pad(masks.float(), (1, 1, 1, 1))
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    share = masks.float().mean()  # of neighbours, if patches were hidden one by one
    assert (around[masks].mean() / 4).item() > 2 * share.item()


@pytest.mark.parametrize("grid", [1, 2, 4, 7])
def test_small_grids_end_and_hide_no_more_than_asked(grid: int) -> None:
    counts, masks = drawn(64, grid)
    assert masks.shape == (64, grid, grid)
    assert (masks.flatten(1).sum(dim=1) <= counts).all()
    assert masks.any() == (grid > 1)


def test_places_find_every_hidden_patch_and_weigh_images_alike() -> None:
    for seed in range(3):
        counts, masks = drawn(20, 6, seed=seed)
        size = most_masked(20, 36, probability=0.5, ratio=RATIO)
        indices, weights = masked_places(masks, size=size)
        assert counts.sum() <= size == len(indices) == len(weights)
        expected = [
            (image * 36 + row * 6 + column, 1 / int(masks[image].sum()))
            for image in range(20)
            for row in range(6)
            for column in range(6)
            if masks[image, row, column]
        ]
        n = len(expected)
        assert indices[:n].tolist() == [place for place, _ in expected]
        assert weights[:n].tolist() == pytest.approx([weight for _, weight in expected])
        assert not weights[n:].any()


def test_equal_seeds_give_equal_masks() -> None:
    first, second, other = (drawn(32, 8, seed=seed)[1] for seed in (4, 4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
