"""Which stage limits, from a clock that the test turns."""

import pytest

from dinosearch.index.pace import Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def spend(pace: Pace, clock: Clock, on: str, seconds: float) -> None:
    if on == "model":
        clock.now += seconds
        return
    with pace.spending(on):
        clock.now += seconds


@pytest.mark.parametrize(
    ("read", "model", "write", "disk", "decode", "limit"),
    [
        (1, 8, 1, 1, 2, "model"),
        (8, 1, 1, 1, 2, "decode"),
        (8, 1, 1, 3, 2, "disk"),
        (1, 2, 7, 1, 2, "write"),
    ],
)
def test_the_stage_that_takes_most_of_the_time_limits(read, model, write, disk, decode, limit):
    clock = Clock()
    pace = Pace(clock)
    for on, seconds in (("read", read), ("model", model), ("write", write)):
        spend(pace, clock, on, seconds)
    assert pace.limit(reading=disk, decoding=decode) == limit


def test_only_the_last_seconds_count():
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        spend(pace, clock, "write", 1.0)
        assert pace.limit(reading=0, decoding=0) == "write"
    for _ in range(10):
        spend(pace, clock, "model", 1.0)
        limit = pace.limit(reading=0, decoding=0)
    assert limit == "model"


def test_waiting_for_items_is_reading():
    clock = Clock()
    pace = Pace(clock)

    def items():
        for i in range(3):
            clock.now += 2.0
            yield i

    assert list(pace.waiting(items())) == [0, 1, 2]
    assert pace.limit(reading=0, decoding=1) == "decode"
