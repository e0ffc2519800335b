"""How long a run is: a number of steps, or as many as fit before a deadline. Knows the clock and no model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinosearch.vit.folder import Note, quiet

DEFAULT_EPOCHS = 100
DEFAULT_MINUTES = {"cpu": 5.0, "cuda": 60.0, "mps": 30.0}
"""A run without --steps, --epochs or --minutes ends after these epochs or minutes, whichever come first."""
LEAST_STEPS = 200
"""By default even a handful of images is trained on for this many steps."""
COMPILE_FROM_STEPS = 2_000
COMPILE_FROM_MINUTES = 10.0
"""torch.compile takes a minute or two; shorter runs on a GPU go without."""
ENDING_SECONDS = 1.0
"""Of a time budget are kept for writing the model, its page and the last checkpoint."""
FEWEST_STEPS = 5
"""Made even if starting has used up the time, or no schedule would be more than its beginning."""
UNBOUNDED = 2**62
"""Steps of a run that only its deadline ends."""


@dataclass
class Plan:
    """How long the run is: a number of steps, or as many as fit before a deadline."""

    total_steps: int
    deadline: float | None
    """In time.monotonic() seconds; None when the number of steps is fixed."""
    most_steps: int = UNBOUNDED
    """With a deadline: end after this many steps all the same."""

    def adapt(self, step: int, *, seconds_per_step: float) -> None:
        """Plan anew how many steps fit, unless that is settled or the end is so near that schedules would jump.

        seconds_per_step: of the last steps, so that a slow spell (a busy machine) is forgotten when it ends.
        """
        if self.deadline is None or step > 0.95 * self.total_steps:
            return
        left = max(0.0, self.deadline - time.monotonic())
        self.total_steps = min(self.most_steps, max(step + 1, FEWEST_STEPS, step + int(left / seconds_per_step)))

    def facts(self) -> dict[str, Any]:
        """For a checkpoint, as JSON keeps it: of a time budget, what is left of it now."""
        seconds_left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        return {"total_steps": self.total_steps, "seconds_left": seconds_left, "most_steps": self.most_steps}

    @property
    def repays_compiling(self) -> bool:
        if self.deadline is None:
            return self.total_steps >= COMPILE_FROM_STEPS
        return (self.deadline - time.monotonic()) / 60 >= COMPILE_FROM_MINUTES


def plan_length(
    *,
    steps: int | None,
    epochs: float | None,
    minutes: float | None,
    steps_per_epoch: float,
    device_type: str,
    began: float,
    note: Note = quiet,
) -> Plan:
    """As long as the user asked for, in one of three ways; else a default that is told to `note`.

    steps_per_epoch: images by those of a batch, not rounded, so that few images are not seen less often than asked for.
    """
    if steps is not None:
        return Plan(steps, None)
    if epochs is not None:
        return Plan(max(1, round(epochs * steps_per_epoch)), None)
    if minutes is not None:
        return Plan(UNBOUNDED, began + 60 * minutes - ENDING_SECONDS)
    steps, minutes = max(LEAST_STEPS, round(DEFAULT_EPOCHS * steps_per_epoch)), DEFAULT_MINUTES[device_type]
    note(f"length: {minutes:g} minutes, or {steps} steps if they take less (--minutes, --steps or --epochs choose)")
    return Plan(steps, began + 60 * minutes, most_steps=steps)


def plan_from_facts(facts: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.facts` told, going on now: of a time budget only what was left is planned.

    Starting and reading again are not taken from it, or a run resumed near its end could not finish its schedules.
    """
    left = facts["seconds_left"]
    return Plan(facts["total_steps"], None if left is None else time.monotonic() + left, most_steps=facts["most_steps"])
