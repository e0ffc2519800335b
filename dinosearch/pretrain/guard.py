"""Keeps the last sound state of a run, and goes back to it with other settings when training goes wrong."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinosearch.errors import DinosearchError
from dinosearch.pretrain.alarm import MOST_ALARMS, Alarm, Watch, not_a_number, remedy, ruinous
from dinosearch.pretrain.health import Health
from dinosearch.pretrain.run import Outcome, Run
from dinosearch.vit.folder import Note

EARLY = 0.25
"""In this first share of a run, a state that leads to the same trouble twice is given up for the initial weights."""
PREFIX = "sound."
"""Of the last sound state's tensors in a checkpoint."""


class Guard:
    """Looks after one run.

    remembered: what `facts` gave for a checkpoint, with the checkpoint's tensors; without them the run is at its start.
    """

    def __init__(
        self,
        run: Run,
        *,
        step: int,
        note: Note,
        remembered: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.run = run
        self.note = note
        self.alarms: list[dict[str, Any]] = list(remembered["alarms"]) if remembered else []
        """Step, kind, reason, the step gone back to, and what was changed, of every alarm so far."""
        self.sound_step = step
        self._watch = Watch(remembered["recent"]) if remembered else Watch()
        self._sound = run.state()
        if remembered and remembered["sound_step"] != step:
            self.sound_step = remembered["sound_step"]
            kept = tensors or {}
            self._sound = {name.removeprefix(PREFIX): kept[name] for name in kept if name.startswith(PREFIX)}

    def look(self, outcome: Outcome, *, loss: float | None) -> Health | None:
        """The teacher's health, or None where there are no numbers any more."""
        return self.run.look(outcome, loss=loss) if loss is not None and self.run.finite() else None

    def judge(self, health: Health | None, *, loss: float | None, step: int, done: float) -> Alarm | None:
        """The alarm at this step, if any; without one and with good signals, this becomes the last sound state."""
        if health is None:
            return not_a_number(loss)
        alarm = self._watch.judge(health, done=done, recipe=self.run.recipe)
        if alarm is None and self._watch.calm:
            self.sound_step, self._sound = step, self.run.state()
        if alarm is not None and len(self.alarms) >= MOST_ALARMS:
            return None
        return alarm

    def recover(self, alarm: Alarm, *, step: int, done: float, strict: bool) -> int:
        """Go back and change the recipe; returns the step gone back to.

        Raises DinosearchError with `strict`, or when nothing has helped; the run is at its last sound state then.
        """
        repeated = bool(self.alarms) and self.sound_step <= self.alarms[-1]["step"]
        back = self.go_back()
        told = f"{alarm.kind} at step {step}: {alarm.why}"
        if strict or len(self.alarms) >= MOST_ALARMS:
            advice = "leave --strict out, and settings are changed on the way" if strict else "try a lower --lr"
            raise DinosearchError(f"{told}. Training stopped; the state of step {back} is kept. To go on, {advice}")
        recipe, changes = remedy(self.run.recipe, alarm)
        if back > 0 and (ruinous(self.run.recipe) or (repeated and done < EARLY)):
            self._begin_again()
            back = 0
        self.run.adopt(recipe)
        entry = {"step": step, "kind": alarm.kind, "why": alarm.why, "back_to_step": back, "changed": changes}
        self.alarms.append(entry)
        self.note(f"{told}. Back to step {back} with {changes}")
        return back

    def go_back(self) -> int:
        """Become the last sound state; returns its step."""
        self.run.put_back(self._sound)
        self._watch.forget()
        return self.sound_step

    def facts(self) -> dict[str, Any]:
        """For a checkpoint, as JSON keeps it."""
        return {"alarms": self.alarms, "recent": self._watch.recent, "sound_step": self.sound_step}

    def tensors(self, step: int) -> dict[str, Tensor]:
        """For a checkpoint at `step`: the run as it is, and its last sound state where that is another."""
        sound_too = {} if step == self.sound_step else {PREFIX + name: t for name, t in self._sound.items()}
        return self.run.state() | sound_too

    def _begin_again(self) -> None:
        run = self.run
        start = Run(run.recipe, seed=run.seed, device=run.device, start=run.start, mentor=run.mentor).state()
        run.put_back(start)
        self.sound_step, self._sound = 0, start
