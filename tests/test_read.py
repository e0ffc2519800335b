"""Reading files, and work in threads."""

import os
import threading
import time

import pytest

from dinosearch.images import BadImage, in_threads, machine, n_cores, read, read_bytes
from dinosearch.images.read import trusted_time
from dinosearch.images.source import UNTRUSTED_TIME


def test_the_whole_file_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert read_bytes(tmp_path / "a") == b"x" * 100_000
    assert read_bytes(str(tmp_path / "a")) == b"x" * 100_000


def test_what_cannot_be_read_says_why(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in [("missing", "No such file"), ("", "folder"), ("pipe", "not a regular file"), ("a\0b", "name")]:
        with pytest.raises(BadImage, match=reason) as caught:
            read_bytes(tmp_path / name)
        assert caught.value.status == "unreadable"


def test_a_giant_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_FILE_BYTES", 10)
    (tmp_path / "a").write_bytes(b"x" * 11)
    with pytest.raises(BadImage) as caught:
        read_bytes(tmp_path / "a")
    assert caught.value.status == "too-large"


def test_results_come_in_the_order_of_the_items():
    def slow_if_even(i: int) -> int:
        time.sleep(0.01 * (i % 2 == 0))
        return i * i

    assert list(in_threads(slow_if_even, range(20), workers=4, ahead=8)) == [i * i for i in range(20)]


def test_items_are_pulled_no_further_than_ahead():
    pulled = []

    def items():
        for i in range(1000):
            pulled.append(i)
            yield i

    results = in_threads(lambda i: i, items(), workers=2, ahead=5)
    assert next(results) == 0
    assert len(pulled) == 6
    results.close()


def test_heavy_items_wait_until_lighter_ones_are_done():
    pulled = []

    def items():
        for i in range(100):
            pulled.append(i)
            yield i

    results = in_threads(lambda i: i, items(), workers=2, ahead=50, weight=lambda _: 10, most_weight=35)
    assert next(results) == 0
    assert len(pulled) == 4
    assert list(results) == list(range(1, 100))


def test_an_exception_reaches_the_caller_and_no_thread_stays():
    def fail_at_three(i: int) -> int:
        if i == 3:
            raise KeyError(i)
        return i

    before = threading.active_count()
    results = in_threads(fail_at_three, range(100), workers=3, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
    assert threading.active_count() == before


def test_a_caller_that_stops_early_leaves_no_thread():
    before = threading.active_count()
    results = in_threads(lambda seconds: time.sleep(seconds), [0.001] * 100, workers=3, ahead=50)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_cores_are_those_of_the_affinity_mask():
    assert 1 <= n_cores() <= len(os.sched_getaffinity(0))


def test_a_container_quota_of_one_and_a_half_cores_is_one_core(monkeypatch):
    files = {"cpu.max": ["150000 100000", "max 100000"], "memory.max": ["1000000", "max"]}
    monkeypatch.setattr(machine, "_cgroup_files", lambda _controller, name: files.get(name, []))
    assert machine.n_cores.__wrapped__() == 1
    assert machine.memory_bytes.__wrapped__() == 1_000_000


def test_a_time_is_not_trusted_within_a_tick_of_the_clock_of_its_file_system():
    fine, coarse = 1_700_000_000_123_456_789, 1_700_000_000_000_000_000
    assert trusted_time(fine, now=fine + 10_000_000) == UNTRUSTED_TIME
    assert trusted_time(fine, now=fine + 30_000_000) == fine
    assert trusted_time(coarse, now=coarse + 1_000_000_000) == UNTRUSTED_TIME
    assert trusted_time(coarse, now=coarse + 3_000_000_000) == coarse
