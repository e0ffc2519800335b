"""What follows from a bound on memory."""

import pytest
from indexing import a_model

from dinosearch.errors import UsageError
from dinosearch.images import planes
from dinosearch.images.decode import BYTES_PER_PIXEL, pixel_budget
from dinosearch.index.limits import Limits, left_for_vectors, limits_for


def test_without_a_bound_the_machines_memory_decides():
    limits = limits_for(a_model(), workers=3)
    assert (limits.workers, limits.max_pixels) == (3, pixel_budget(3))


@pytest.mark.parametrize("megabytes", [700, 1000, 1500, 4000])
@pytest.mark.parametrize("workers", [1, 2, 16])
def test_all_that_may_be_held_at_once_fits_the_bound(megabytes, workers):
    limits = limits_for(a_model(), workers=workers, max_memory=megabytes << 20)
    assert 1 <= limits.workers <= workers
    assert limits.max_pixels >= 4_000_000
    held = limits.ahead_bytes + limits.workers * limits.max_pixels * BYTES_PER_PIXEL
    assert held < (megabytes - 450) << 20


def test_faiss_may_have_what_model_and_libraries_leave():
    model = a_model()
    assert left_for_vectors(model, None) is None
    left = left_for_vectors(model, 10**9)
    assert 10**9 - (600 << 20) < left < 10**9 - (400 << 20)
    assert left_for_vectors(model, 2 * 10**9) - left == 10**9
    assert left_for_vectors(model, 10**6) == 0


def test_too_little_is_refused_with_what_it_takes():
    with pytest.raises(UsageError, match=r"Give 0\.\d\dG or more"):
        limits_for(a_model(), workers=2, max_memory=100 << 20)


def test_bad_files_are_tried_again_with_a_larger_budget_only():
    small, large = (limits_for(a_model(), workers=1, max_memory=m << 20).decoder_keys() for m in (700, 900))
    assert small.of("corrupt") == large.of("corrupt")
    assert small.of("too-large") != large.of("too-large")


@pytest.mark.parametrize("name", ["tifffile", "imagecodecs"])
def test_bad_files_of_many_channels_are_tried_again_once_a_decoder_of_theirs_is_installed(name, monkeypatch):
    def keys(channels, *installed):
        monkeypatch.setattr(planes, "find_spec", lambda each: each if each in installed else None)
        return Limits(workers=1, max_pixels=10**6, channels=channels).decoder_keys()

    for status in ("unsupported", "too-large"):
        assert keys(5).of(status) != keys(5, name).of(status)
        assert keys(3).of(status) == keys(3, name).of(status)
