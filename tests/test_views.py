"""Crops and distortions against torchvision, operation by operation, and their probabilities by counting."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

from dinosearch.pretrain.views import (
    ViewSettings,
    blur,
    crop_boxes,
    distort_colours,
    luma,
    multi_crop,
    normalise,
    resample,
    solarize,
    turn_hue,
)

STILL = ViewSettings(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0), flip=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(n: int = 4, *, channels: int = 3, side: int = 40) -> torch.Tensor:
    """Smooth colours with edges, in 0..1."""
    coarse = torch.rand(n, channels, 5, 5, generator=seeded(7))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="nearest")


@pytest.mark.parametrize(("left", "top", "width", "height"), [(3, 5, 20, 30), (0, 0, 40, 40), (10, 0, 12, 9)])
@pytest.mark.parametrize("size", [8, 16, 48])
def test_resampling_is_torchvisions_antialiased_bicubic(
    left: int, top: int, width: int, height: int, size: int
) -> None:
    images = some_images()
    box = torch.tensor([[left, top, width, height]]).repeat(4, 1) / 40
    ours = resample(images, box, torch.zeros(4, dtype=torch.bool), size=size)
    theirs = reference.resized_crop(
        images,
        top,
        left,
        height,
        width,
        [size, size],
        antialias=True,
        interpolation=reference.InterpolationMode.BICUBIC,
    )
    torch.testing.assert_close(ours, theirs.clamp(0, 1), atol=2e-4, rtol=0)


def test_a_flip_mirrors_left_and_right() -> None:
    images = some_images(2)
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6]] * 2)
    plain = resample(images, box, torch.tensor([False, False]), size=16)
    mixed = resample(images, box, torch.tensor([False, True]), size=16)
    torch.testing.assert_close(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], plain[1].flip(-1))


def test_several_crops_of_an_image_are_those_taken_one_by_one() -> None:
    images = some_images(3)
    box = crop_boxes(torch.ones(3 * 4), scale=(0.1, 0.6), generator=seeded(1))
    flip = torch.rand(12, generator=seeded(2)) < 0.5
    together = resample(images, box, flip, size=16)
    for i in range(12):
        alone = resample(images[i // 4 : i // 4 + 1], box[i : i + 1], flip[i : i + 1], size=16)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_local_crops_are_of_the_image_they_stand_for() -> None:
    """Images of one tone each: every crop must have its own image's."""
    tones = torch.tensor([10, 80, 150, 220], dtype=torch.uint8)
    pixels = tones[:, None, None, None].expand(4, 3, 24, 24).contiguous()
    settings = replace(STILL, global_size=16, local_size=8, n_local=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    for views in multi_crop(pixels, torch.ones(4), settings, generator=seeded(3)):
        expected = (tones / 255)[None, :, None, None, None].expand_as(views)
        torch.testing.assert_close(views, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aspect", [0.4, 1.0, 1.5])
def test_boxes_are_distributed_as_torchvisions(aspect: float) -> None:
    n, scale = 4000, (0.2, 1.0)
    height, width = 600, round(600 * aspect)
    boxes = crop_boxes(torch.full((n,), aspect), scale=scale, generator=seeded())
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    top, left, h, w = (theirs[:, i].float() for i in range(4))
    for ours, expected in (
        (boxes[:, 0], left / width),
        (boxes[:, 1], top / height),
        (boxes[:, 2], w / width),
        (boxes[:, 3], h / height),
    ):
        error = 4 * expected.std().item() / math.sqrt(n) + 2e-3  # four standard errors and torchvision's rounding
        assert ours.mean().item() == pytest.approx(expected.mean().item(), abs=1.5 * error)
        assert ours.std().item() == pytest.approx(expected.std().item(), abs=1.5 * error)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()


@pytest.mark.parametrize("turn", [-0.1, 0.03, 0.5])
def test_hue_turns_as_torchvision_turns_it(turn: float) -> None:
    images = torch.rand(3, 3, 6, 6, generator=seeded())
    ours = turn_hue(images, torch.full((3,), turn))
    torch.testing.assert_close(ours, reference.adjust_hue(images, turn), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("only", "operation"),
    [
        ("brightness", reference.adjust_brightness),
        ("contrast", reference.adjust_contrast),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_jitter_is_torchvisions_with_some_strength_in_its_range(only: str, operation) -> None:
    images = torch.rand(1, 3, 8, 8, generator=seeded())
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | {only: 0.4}
    settings = replace(STILL, jitter=1.0, **strengths)
    seen = []
    for seed in range(20):
        ours = distort_colours(images, settings, generator=seeded(seed))
        errors = [(ours - operation(images, 0.6 + 0.01 * i)).abs().max().item() for i in range(81)]
        assert min(errors) < 0.01
        seen.append(0.6 + 0.01 * errors.index(min(errors)))
    assert min(seen) < 0.75
    assert max(seen) > 1.25


def test_grayscale_is_luma_in_a_fifth_of_images() -> None:
    images = torch.rand(2000, 3, 2, 2, generator=seeded())
    grey = distort_colours(images, replace(STILL, grayscale=0.2), generator=seeded(1))
    changed = (grey - images).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.float().mean().item() == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(grey[changed], luma(images[changed]).expand(-1, 3, -1, -1))
    torch.testing.assert_close(luma(images), reference.rgb_to_grayscale(images), atol=1e-3, rtol=0)


def test_blur_happens_as_often_as_published() -> None:
    images = torch.rand(1500, 1, 56, 56, generator=seeded())
    for probability, expected in zip(ViewSettings().blur, (1.0, 0.1, 0.5), strict=True):
        blurred = blur(images, probability, (4.0, 8.0), generator=seeded(2))
        changed = (blurred - images).abs().amax(dim=(1, 2, 3)) > 1e-3
        assert changed.float().mean().item() == pytest.approx(expected, abs=0.04 if expected < 1 else 0)


def test_each_view_is_really_blurred_as_often_as_published() -> None:
    """Through the whole pipeline: the same crops with and without blur, view by view."""
    pixels = (255 * torch.rand(400, 1, 32, 32, generator=seeded())).to(torch.uint8)
    settings = ViewSettings(global_size=32, local_size=32, n_local=2, blur_sigma=(14.0, 28.0))
    never = replace(settings, blur=(0.0, 0.0, 0.0))
    views, sharp = (
        torch.cat(multi_crop(pixels, torch.ones(400), chosen, generator=seeded(1))) for chosen in (settings, never)
    )
    changed = ((views - sharp).abs().amax(dim=(2, 3, 4)) > 1e-3).float().mean(dim=1)
    assert settings.blur == (1.0, 0.1, 0.5)
    assert changed.tolist() == pytest.approx([1.0, 0.1, 0.5, 0.5], abs=0.06)


def test_blur_is_torchvisions_gaussian_away_from_the_border() -> None:
    images = torch.rand(1, 3, 112, 112, generator=seeded())
    ours = blur(images, 1.0, (3.0, 3.0), generator=seeded())
    theirs = reference.gaussian_blur(images, [13, 13], [1.5, 1.5])
    torch.testing.assert_close(ours[..., 12:-12, 12:-12], theirs[..., 12:-12, 12:-12], atol=2e-4, rtol=0)


def test_solarize_is_torchvisions_in_a_fifth_of_second_global_crops() -> None:
    assert ViewSettings().solarize == (0.0, 0.2, 0.0)
    images = torch.rand(3000, 1, 2, 2, generator=seeded())
    ours = solarize(images, 0.2, generator=seeded(1))
    changed = (ours - images).abs().amax(dim=(1, 2, 3)) > 0
    bright = (images >= 128 / 255).flatten(1).any(dim=1)
    assert (changed.sum() / bright.sum()).item() == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(ours[changed], reference.solarize(images[changed], 128 / 255))


def test_an_untouched_view_is_the_normalised_image() -> None:
    pixels = (some_images(2, side=32) * 255).round().to(torch.uint8)
    settings = replace(
        STILL, global_size=32, local_size=16, n_local=0, global_scale=(1.0, 1.0), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    views, local = multi_crop(pixels, torch.ones(2), settings, generator=seeded(3))
    assert local.shape == (0, 2, 3, 16, 16)
    whole = normalise(pixels / 255, settings.mean, settings.std)
    widest = (views - whole).abs().mean()  # the ratio of sides still varies: not the same, but near
    assert views.shape == (2, 2, 3, 32, 32)
    assert widest < 0.6


def test_equal_seeds_give_equal_views_and_grey_images_stay_grey() -> None:
    pixels = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=seeded())
    settings = ViewSettings(global_size=28, local_size=14, n_local=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    first, second = (multi_crop(pixels, torch.ones(3), settings, generator=seeded(5)) for _ in range(2))
    other = multi_crop(pixels, torch.ones(3), settings, generator=seeded(6))
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert torch.equal(a[:, :, 0], a[:, :, 2])
    assert first[1].shape == (3, 3, 3, 14, 14)
