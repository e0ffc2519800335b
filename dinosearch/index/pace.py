"""How fast a pipeline runs and which of its stages the others wait for. Knows nothing of what they do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_WINDOW_SECONDS = 5.0
_STEP_SECONDS = 0.5


class Pace:
    """Where one thread's time goes that waits for readers, feeds a model and writes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent = {"read": 0.0, "write": 0.0}
        self._marks = deque([(clock(), self._spent | {"disk": 0.0, "decode": 0.0})])

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Count the time inside as spent on "read" (waiting for readers) or "write"."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent[on] += self._clock() - began

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each comes is counted as "read"."""
        while True:
            with self.spending("read"):
                item = next(items, None)
            if item is None:
                return
            yield item

    def limit(self, *, reading: float, decoding: float) -> str:
        """The stage that the others waited for in the last seconds: disk, decode, model or write.

        `reading` and `decoding` are the seconds that readers have spent so far; what is not waited for nor written in
        this thread is the model's time.
        """
        now, so_far = self._clock(), self._spent | {"disk": reading, "decode": decoding}
        while len(self._marks) > 1 and now - self._marks[1][0] > _WINDOW_SECONDS:
            self._marks.popleft()
        since, before = self._marks[0]
        if now - self._marks[-1][0] > _STEP_SECONDS:
            self._marks.append((now, so_far))
        recent = {stage: seconds - before[stage] for stage, seconds in so_far.items()}
        model = now - since - recent["read"] - recent["write"]
        if max(model, recent["write"]) > recent["read"]:
            return "write" if recent["write"] > model else "model"
        return "disk" if recent["disk"] > recent["decode"] else "decode"
