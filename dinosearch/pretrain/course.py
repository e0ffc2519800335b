"""The loop over steps: feeds the run, keeps time, writes metrics and checkpoints, exports the model."""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinosearch.errors import DinosearchError, Interrupted
from dinosearch.pretrain.bank import ImageBank, batch_indices
from dinosearch.pretrain.plan import Plan
from dinosearch.pretrain.run import Run
from dinosearch.vit.folder import ModelFolder

UNTIMED_STEPS = 3
"""Allocation and compilation make the first steps slow; rates are taken from the end of the third."""
RECENT_STEPS = 100
"""Over so many steps the speed is taken that plans the rest of a time budget."""
LOOK_EVERY = 50
"""Steps between entries of metrics.jsonl, and looks at the teacher's health."""


@dataclass(frozen=True)
class TrainReport:
    """How a run ended: what `train --json` prints."""

    model: str
    """Path of the model's folder."""
    fingerprint: str
    steps: int
    epochs: float
    images: int
    images_per_second: float | None
    """From the end of the third step to the last."""
    seconds: float
    loss: float | None
    """Mean DINO loss of the last steps."""
    knn_top1: float | None
    """k-NN accuracy, for those who trained with labels at hand."""
    resumed_from_step: int | None
    health: dict[str, float]
    stopped: bool = False
    """The run was asked to stop before its end; --resume goes on."""


@dataclass(frozen=True)
class Progress:
    """One look at a run."""

    phase: str
    """"reading" (images are decoded), "training" or "done"."""
    done: int
    """Images read, or steps made."""
    total: int
    """Images to read, or steps planned; with a time budget the plan adapts to the speed."""
    images_per_second: float | None = None
    """Over the last steps."""
    seconds_left: float | None = None
    loss: float | None = None
    """Mean DINO loss of the last steps; ln(out_dim) means that nothing is learnt."""
    teacher_entropy: float | None = None
    """Mean entropy of the teacher's assignments, in nats; it falls from ln(out_dim) as prototypes gain meaning."""
    teacher: nn.Module | None = None
    """The teacher's backbone as it is now, for whoever wants to measure it."""
    report: TrainReport | None = None
    """With the last item: how it ended."""


class Course:
    """The loop over steps: feeds the run, keeps time, writes metrics and checkpoints, exports the model."""

    def __init__(
        self,
        run: Run,
        bank: ImageBank,
        plan: Plan,
        *,
        folder: Path,
        first_step: int,
        began: float,
        kept: Mapping[str, Any],
        trained: Mapping[str, Any],
    ) -> None:
        self.run = run
        self.bank = bank
        self.plan = plan
        self.folder = folder
        self.first_step = first_step
        self.began = began
        self.kept = kept
        """What every checkpoint says beside its step."""
        self.trained = trained
        """What model.json says beside the outcome."""
        self.health: dict[str, float] = {}
        self._losses: deque[torch.Tensor] = deque(maxlen=LOOK_EVERY)
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)

    def follow(self, *, checkpoint_every: float, stop: Callable[[], bool]) -> Iterator[Progress]:
        batch = self.run.recipe.batch_size
        timed_from = saved_at = shown_at = time.monotonic()
        step = self.first_step
        stopped = stop()
        rate: float | None = None
        while step < self.plan.total_steps and not stopped:
            chosen = batch_indices(step, n=len(self.bank), batch_size=batch, seed=self.run.seed)
            done = step / self.plan.total_steps
            outcome = self.run.step(self.bank.pixels[chosen], self.bank.aspect[chosen], step=step, done=done)
            self._losses.append(outcome.loss)
            step += 1
            now = time.monotonic()
            n_timed = step - self.first_step - UNTIMED_STEPS
            if n_timed <= 0:
                timed_from = now
            else:
                rate = n_timed * batch / (now - timed_from)
            if n_timed >= 0:
                self._ends.append(now)
            recent = self._seconds_per_step()
            if recent is not None:
                self.plan.adapt(step, seconds_per_step=recent)
            last = step >= self.plan.total_steps
            if step % LOOK_EVERY == 0 or last or step == self.first_step + 1:
                self.health = self.run.look(outcome).facts()
                self._record(step, lr=outcome.lr, rate=rate)
            if now - saved_at > checkpoint_every and not last:
                self._save(step, report=None)
                saved_at = time.monotonic()
            if now - shown_at > 0.1 and not last:
                shown_at = now
                yield self._progress(step)
            stopped = stop()
        finished = step >= self.plan.total_steps
        yield self._end(step, rate=rate, stopped=not finished)

    def mean_loss(self) -> float | None:
        """Over the last steps; raises DinosearchError when it is no number, before that reaches a file."""
        if not self._losses:
            return None
        loss = torch.stack(list(self._losses)).mean().item()
        if not math.isfinite(loss):
            raise DinosearchError(
                f"the loss became {loss} and training stopped; {self.folder}/training keeps the last good state. "
                "Try a lower --lr, such as a third of this run's"
            )
        return loss

    def _seconds_per_step(self) -> float | None:
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def _progress(self, step: int) -> Progress:
        recent = self._seconds_per_step()
        return Progress(
            "training",
            step,
            self.plan.total_steps,
            images_per_second=self.run.recipe.batch_size / recent if recent else None,
            seconds_left=(self.plan.total_steps - step) * recent if recent else None,
            loss=self.mean_loss(),
            teacher_entropy=self.health.get("teacher_entropy"),
            teacher=self.run.teacher.backbone,
        )

    def _record(self, step: int, *, lr: float, rate: float | None) -> None:
        line = {"step": step, "loss": self.mean_loss(), "lr": lr, "images_per_second": rate, **self.health}
        with (self.folder / "training" / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, step: int, *, report: TrainReport | None) -> None:
        self.mean_loss()
        facts = {
            **self.kept,
            "step": step,
            "total_steps": self.plan.total_steps,
            "report": asdict(report) if report else None,
        }
        self.run.save(self.folder / "training", facts=facts)

    def _end(self, step: int, *, rate: float | None, stopped: bool) -> Progress:
        """Export what the teacher has become. A run that was stopped before its first step leaves no model."""
        if stopped and step == 0:
            shutil.rmtree(self.folder)
            raise Interrupted("stopped before the first step: there is nothing to save")
        loss = self.mean_loss()
        epochs = step * self.run.recipe.batch_size / len(self.bank)
        trained = {**self.trained, "steps": step, "epochs": round(epochs, 3), "loss": loss, "health": self.health}
        model = self.run.export(self.folder, trained=trained)
        report = report_on(
            model,
            trained,
            seconds=time.monotonic() - self.began,
            rate=rate,
            resumed_from_step=self.first_step or None,
            stopped=stopped,
        )
        self._save(step, report=None if stopped else report)
        return Progress("done", step, self.plan.total_steps, teacher=self.run.teacher.backbone, report=report)


def report_on(
    model: ModelFolder,
    trained: Mapping[str, Any],
    *,
    seconds: float,
    rate: float | None = None,
    resumed_from_step: int | None = None,
    stopped: bool = False,
) -> TrainReport:
    return TrainReport(
        model=str(model.path),
        fingerprint=model.fingerprint,
        steps=trained["steps"],
        epochs=trained.get("epochs", 0.0),
        images=trained["images"],
        images_per_second=round(rate, 2) if rate else None,
        seconds=round(seconds, 2),
        loss=trained.get("loss"),
        knn_top1=None,
        resumed_from_step=resumed_from_step,
        health=trained.get("health", {}),
        stopped=stopped,
    )
