"""Schedules against their closed forms."""

import math

import pytest

from dinosearch.pretrain.schedules import cosine, linear_then_constant


def test_cosine_goes_from_start_to_end_along_half_a_cosine() -> None:
    for done in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        assert cosine(0.99, 1.0, done) == pytest.approx(1.0 - 0.01 * (math.cos(math.pi * done) + 1) / 2)


def test_warmup_rises_in_a_straight_line_and_meets_the_cosine() -> None:
    assert cosine(1e-3, 1e-6, 0.0, warmup=0.1) == 0.0
    assert cosine(1e-3, 1e-6, 0.05, warmup=0.1) == pytest.approx(5e-4)
    assert cosine(1e-3, 1e-6, 0.1, warmup=0.1) == pytest.approx(1e-3)
    assert cosine(1e-3, 1e-6, 0.55, warmup=0.1) == pytest.approx((1e-3 + 1e-6) / 2)
    assert cosine(1e-3, 1e-6, 1.0, warmup=0.1) == pytest.approx(1e-6)


def test_temperature_rises_and_stays() -> None:
    assert linear_then_constant(0.04, 0.07, 0.0, warmup=0.3) == pytest.approx(0.04)
    assert linear_then_constant(0.04, 0.07, 0.15, warmup=0.3) == pytest.approx(0.055)
    assert linear_then_constant(0.04, 0.07, 0.3, warmup=0.3) == 0.07
    assert linear_then_constant(0.04, 0.07, 1.0, warmup=0.3) == 0.07
