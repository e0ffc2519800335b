"""The loop over steps: feeds the run, keeps time, writes metrics and checkpoints, exports the model."""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinosearch.errors import DinosearchError, Interrupted
from dinosearch.pretrain.alarm import Alarm
from dinosearch.pretrain.bank import ImageBank, batch_indices
from dinosearch.pretrain.card import write_card
from dinosearch.pretrain.checkpoint import Checkpoint, save_checkpoint
from dinosearch.pretrain.device import use_huge_pages
from dinosearch.pretrain.guard import Guard
from dinosearch.pretrain.health import Health
from dinosearch.pretrain.logs import Log
from dinosearch.pretrain.metrics import METRICS, Metrics
from dinosearch.pretrain.plan import Plan
from dinosearch.pretrain.quality import Best, Look, Quality, measure_quality, sample_rows
from dinosearch.pretrain.recipe import momentum_for
from dinosearch.pretrain.run import Run
from dinosearch.pretrain.warmstart import improved
from dinosearch.vit.folder import ModelFacts, ModelFolder, Note, first_line, save_model

UNTIMED_STEPS = 3
"""Allocation and compilation make the first steps slow; rates are taken from the end of the third."""
REPLAN_AT = 10
"""The first step after which what depends on a time budget's steps is planned anew; later at every look."""
RECENT_STEPS = 100
"""Over so many steps the speed is taken that plans the rest of a time budget."""
LOOK_EVERY = 50
"""Steps between entries of metrics.jsonl, and looks at the teacher's health."""
MEASURE_EVERY = 200
"""Steps between measurements of quality: each costs about two steps, so all of them some 1 % of a run."""

Evaluate = Callable[[nn.Module, ModelFacts], tuple[float, int]]
"""Accuracy, 0..1, of a backbone in eval mode whose inputs are made as the facts say, and the number of images that it
is a share of; whoever calls knows labels."""


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
    health: dict[str, Any]
    """The last look at the teacher, and under `alarms` what went wrong on the way and what was changed."""
    quality: dict[str, Any] = field(default_factory=dict)
    """Recall and rank of the weights exported, and the step that they are of."""
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
    health: Health | None = None
    """The last look at the teacher."""
    quality: Quality | None = None
    """The last measurement of its features."""
    knn_top1: float | None = None
    """With labels, their k-NN accuracy then."""
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
        began: float,
        kept: Mapping[str, Any],
        trained: Mapping[str, Any],
        note: Note,
        checkpoint: Checkpoint | None = None,
        logs: Sequence[Log] = (),
        evaluate: Evaluate | None = None,
        select: str = "quality",
        momentum_by_length: bool = False,
    ) -> None:
        """kept: what every checkpoint says beside its state. trained: what model.json says beside the outcome.

        checkpoint: what to go on from. evaluate: accuracy by labels. select: "quality" or "labels", what chooses the
        weights that are exported. momentum_by_length: of the teacher, it follows the steps that a time budget allows.
        """
        self.run = run
        self.bank = bank
        self.plan = plan
        self.folder = folder
        self.began = began
        self.kept = kept
        self.trained = trained
        self.logs = list(logs)
        self.note = note
        self.first_step = 0
        self.health: Health | None = None
        self.quality: Quality | None = None
        self.knn_top1: float | None = None
        self.evaluate = evaluate
        self.select = select
        self._planned_momentum = run.recipe.teacher_momentum if momentum_by_length else None
        self._measured: Look | None = None
        self._waited = 0.0  # seconds in which steps waited for images, since rates are taken
        self._looked_loss: float | None = None  # what a GPU need not be waited for
        self._rows = sample_rows(len(bank), batch_size=run.recipe.batch_size)
        self._losses: deque[Tensor] = deque(maxlen=LOOK_EVERY)
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        if checkpoint is None:
            self.guard = Guard(run, step=0, note=note)
            self.best = Best()
        else:
            facts, tensors = checkpoint.facts, checkpoint.tensors()
            self.first_step = facts["step"]
            if "planned_momentum" in facts:  # the recipe's may be an alarm's
                self._planned_momentum = facts["planned_momentum"]
            run.put_back(tensors)
            self._losses.extend(torch.tensor(loss, device=run.device) for loss in facts["losses"])
            self.guard = Guard(run, step=self.first_step, note=note, remembered=facts["guard"], tensors=tensors)
            self.best = Best(facts["best"], tensors)
        if run.team.leads:  # later lines are about steps that will be made again
            n_bytes = checkpoint.facts["metrics_bytes"] if checkpoint else 0
            self.metrics = Metrics(folder / "training" / METRICS, n_bytes=n_bytes, note=note)

    def follow(self, *, checkpoint_every: float, strict: bool, stop: Callable[[], bool]) -> Iterator[Progress]:
        batch, team = self.run.recipe.batch_size, self.run.team
        timed_from = saved_at = shown_at = time.monotonic()
        step = self.first_step
        n_made = 0
        self.plan.total_steps, stopped = team.follow(self.plan.total_steps, stop())
        rate: float | None = None
        while step < self.plan.total_steps and not stopped:
            chosen = batch_indices(step, n=len(self.bank), batch_size=batch, seed=self.run.seed)
            chosen = team.part(chosen)
            done = step / self.plan.total_steps
            asked_at = time.monotonic()
            pixels, aspect = self.bank.take(chosen)
            self._waited += time.monotonic() - asked_at
            self.bank.expect(team.part(batch_indices(step + 1, n=len(self.bank), batch_size=batch, seed=self.run.seed)))
            outcome = self.run.step(pixels, aspect, step=step, done=done)
            self._losses.append(outcome.loss)
            step += 1
            n_made += 1
            if n_made == UNTIMED_STEPS and self.run.device.type == "cpu":
                use_huge_pages()
            now = time.monotonic()
            n_timed = n_made - UNTIMED_STEPS
            if n_timed <= 0:
                timed_from, self._waited = now, 0.0
            else:
                rate = n_timed * batch / (now - timed_from)
            if n_timed >= 0:
                self._ends.append(now)
            recent = self._seconds_per_step()
            if recent is not None:
                self.plan.adapt(step, seconds_per_step=recent)
            # what depends on clocks and signals is decided by one process for all
            self.plan.total_steps, save, stopped = team.follow(
                self.plan.total_steps, now - saved_at > checkpoint_every, stop()
            )
            if step % LOOK_EVERY == 0 or step == REPLAN_AT:
                self._replan()
            last = step >= self.plan.total_steps
            if step % LOOK_EVERY == 0 or last or n_made == 1:
                loss = self._looked_loss = self.mean_loss()
                self.health = self.guard.look(outcome, loss=loss)
                judged = step % LOOK_EVERY == 0 or last  # never at a step that a resumed run would not look at
                alarm = self.guard.judge(self.health, loss=loss, step=step, done=done) if judged else None
                sound = alarm is None and self.health is not None
                measured = self._measure(step) if sound and (step % MEASURE_EVERY == 0 or last) else {}
                self._record(step, loss=loss, lr=outcome.lr, rate=rate, measured=measured)
                if alarm is not None:
                    step = self._recover(alarm, step=step, done=done, strict=strict)
                    last, save = False, True
            if save and not last and self._save(step, report=None):
                saved_at = time.monotonic()
            if now - shown_at > 0.1 and not last:
                shown_at = now
                yield self._progress(step)
        finished = step >= self.plan.total_steps
        data_wait = self._waited * rate / batch / (n_made - UNTIMED_STEPS) if rate else None
        yield self._end(step, rate=rate, data_wait=data_wait, stopped=not finished)

    def _replan(self) -> None:
        """The speed measured says more of a time budget's steps than the forecast: a machine may have been busy then.

        What an alarm has changed stays.
        """
        recipe, before = self.run.recipe, self._planned_momentum
        momentum, why = momentum_for(self.plan.total_steps)
        if before is None or recipe.teacher_momentum != before or momentum == before:
            return
        if abs(momentum - before) > 0.1 * (1 - before):
            self.note(f"teacher momentum {momentum:.4g}: {why}")
        self._planned_momentum = momentum
        self.run.adopt(replace(recipe, teacher_momentum=momentum))
        self.trained = {**self.trained, "reasons": {**self.trained.get("reasons", {}), "teacher momentum": why}}

    def mean_loss(self) -> float | None:
        """Over the last steps; None before the first, and when it is no number."""
        if not self._losses:
            return None
        loss = torch.stack(list(self._losses)).mean().item()
        return loss if math.isfinite(loss) else None

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
            loss=self.mean_loss() if self.run.device.type == "cpu" else self._looked_loss,
            health=self.health,
            quality=self.quality,
            knn_top1=self.knn_top1,
            teacher=self.run.teacher.backbone,
        )

    def _recover(self, alarm: Alarm, *, step: int, done: float, strict: bool) -> int:
        """The step gone back to; also when it raises, the last sound state is what lies on disk."""
        try:
            back = self.guard.recover(alarm, step=step, done=done, strict=strict)
        except DinosearchError:
            self._losses.clear()
            self._save(self.guard.sound_step, report=None)
            raise
        self._losses.clear()
        self.best.forget_after(back)
        self._write_line({"alarm": self.guard.alarms[-1]})
        return back

    def _record(
        self, step: int, *, loss: float | None, lr: float, rate: float | None, measured: Mapping[str, Any]
    ) -> None:
        health = self.health.facts() if self.health else {}
        self._write_line({"step": step, "loss": loss, "lr": lr, "images_per_second": rate, **health, **measured})

    def _measure(self, step: int) -> dict[str, Any]:
        """Figures of the teacher's features, by name; the weights are kept if they are the best so far."""
        backbone = self.run.teacher.backbone
        self.quality = self._quality_of(backbone)
        measured: dict[str, Any] = dict(self.quality.facts())
        score, n = self.quality.recall_at_1, len(self._rows)
        accuracy = self._accuracy_of(backbone)
        if accuracy is not None:
            self.knn_top1, n_asked = accuracy
            measured["knn_top1"] = round(self.knn_top1, 4)
            if self.select == "labels":
                score, n = self.knn_top1, n_asked
        self._measured = Look(step=step, score=score, n=n, measured={"step": step, **measured})
        self.best.offer(self._measured, backbone)
        return measured

    def _quality_of(self, backbone: nn.Module) -> Quality:
        run = self.run
        pixels, aspect = map(torch.from_numpy, self.bank.take(self._rows))
        return measure_quality(
            backbone.to(run.device), pixels, aspect, run.recipe.views, device=run.device, seed=run.seed
        )

    def _accuracy_of(self, backbone: nn.Module) -> tuple[float, int] | None:
        """By labels, and of how many images; None without labels, and when too few of their images can be read."""
        if self.evaluate is None:
            return None
        try:
            return self.evaluate(backbone, self.run.facts)
        except DinosearchError as error:  # no reason to lose what was learnt without labels
            self.note(f"no accuracy is reported from here on: {error}")
            self.evaluate = None
            return None

    def _write_line(self, facts: Mapping[str, Any]) -> None:
        if not self.run.team.leads:
            return
        self.metrics.write(facts)
        self._tell_logs(lambda log: log.write(facts))

    def _tell_logs(self, tell: Callable[[Log], None]) -> None:
        """A log that cannot be written, on a full disk say, is given up: it costs no run."""
        for log in list(self.logs):
            try:
                tell(log)
            except OSError as error:
                self.note(f"a log of --log ends here ({first_line(error)}); training goes on")
                self.logs.remove(log)

    def _save(self, step: int, *, report: TrainReport | None) -> bool:
        """Write a checkpoint, unless a weight is no number. On a full disk those before stay, and the run goes on."""
        losses = [loss.item() for loss in self._losses]
        if not self.run.finite() or not all(map(math.isfinite, losses)):
            return False
        if not self.run.team.leads:
            return True
        facts = {
            **self.kept,
            "recipe": self.run.recipe.facts(),
            "planned_momentum": self._planned_momentum,
            "step": step,
            "plan": self.plan.facts(),
            "losses": losses,
            "guard": self.guard.facts(),
            "best": self.best.facts(),
            "metrics_bytes": self.metrics.n_bytes,
            "report": asdict(report) if report else None,
        }
        tensors = self.guard.tensors(step) | self.best.tensors()
        try:
            save_checkpoint(self.folder / "training", step=step, tensors=tensors, facts=facts)
        except OSError as error:
            self.note(f"no checkpoint at step {step} ({first_line(error)}); the one before stays, training goes on")
        return True

    def _end(self, step: int, *, rate: float | None, data_wait: float | None, stopped: bool) -> Progress:
        """Export what the teacher has become. A run that was stopped before its first step leaves no model."""
        if not self.run.finite():  # stopped between going wrong and the next look
            step = self.guard.go_back()
            self._losses.clear()
        if stopped and step == 0:
            raise Interrupted("stopped before anything was learnt: there is nothing to save")
        if not self.run.team.leads:
            return Progress("done", step, self.plan.total_steps)
        if stopped:  # whoever stops it again, impatient with what follows, loses nothing
            self._save(step, report=None)
        backbone: nn.Module = self.run.teacher.backbone
        quality: dict[str, Any] = {}
        last = self._measured
        if not stopped and last is not None and last.step == step:
            exported, backbone = self.best.chosen(last, backbone)
            quality = exported.measured
            if exported is not last:
                self.note(
                    f"exported are the weights of step {exported.step}: {exported.score:.3f} of the sample recognised, "
                    f"{last.score:.3f} at the end"
                )
        origin: dict[str, Any] = {}
        if self.run.start is not None:
            backbone, judged = self._start_unless_improved(backbone, self.run.start)
            origin = {"start": {**self.trained["start"], **judged}}
            quality = judged["quality"] if judged["exported"] else quality
        loss = self.mean_loss()
        epochs = step * self.run.recipe.batch_size / len(self.bank)
        trained = {
            **self.trained,
            **origin,
            "recipe": self.run.recipe.facts(),
            "steps": step,
            "epochs": round(epochs, 3),
            "loss": loss,
            "health": (self.health.facts() if self.health else {})
            | self._pace(data_wait)
            | {"alarms": self.guard.alarms},
            "quality": quality,
        }
        try:
            model = save_model(self.folder, backbone, self.run.facts, trained=trained)
            write_card(model)
        except OSError as error:
            raise DinosearchError(
                f"the model cannot be written ({first_line(error)}). Free some space; --resume then goes on"
            ) from error
        self._tell_logs(lambda log: log.close())
        report = report_on(
            model,
            trained,
            seconds=time.monotonic() - self.began,
            rate=rate,
            resumed_from_step=self.first_step or None,
            stopped=stopped,
        )
        if not stopped:
            self._save(step, report=report)
        return Progress("done", step, self.plan.total_steps, teacher=backbone, report=report)

    def _pace(self, data_wait: float | None) -> dict[str, Any]:
        """What held the run up: the share of its time that it waited for images, and a GPU's memory at its fullest."""
        pace: dict[str, Any] = {} if data_wait is None else {"data_wait": round(data_wait, 4)}
        if self.run.device.type == "cuda":
            pace["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated(self.run.device) / 1e6)
        return pace

    def _start_unless_improved(self, backbone: nn.Module, start: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """What to export, and what model.json says of it: the start where the run has not made it better.

        By the figure that chooses weights in this run.
        """
        learner = copy.deepcopy(start)  # by the same operations, whose rounding would else tell equals apart
        learner.load_state_dict(backbone.state_dict())
        found, before = self._quality_of(learner), self._quality_of(start)
        better, measure = improved(found, before), "of the sample recognised"
        learnt, known = found.recall_at_1, before.recall_at_1
        figures: dict[str, Any] = {"step": 0, **before.facts()}
        by_labels, learnt_by_labels = self._accuracy_of(start), self._accuracy_of(learner)
        if by_labels is not None and learnt_by_labels is not None:
            figures["knn_top1"] = round(by_labels[0], 4)
            if self.select == "labels":
                learnt, known, measure = learnt_by_labels[0], by_labels[0], "right by k-NN"
                better = learnt > known
        if not better:
            self.note(
                f"nothing learnt improved on the start ({learnt:.3f} {measure}, by the start {known:.3f}): "
                "its weights are exported"
            )
        judged = {"quality": figures, "exported": not better}
        return (backbone if better else start), judged


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
        knn_top1=trained.get("quality", {}).get("knn_top1"),
        resumed_from_step=resumed_from_step,
        health=trained.get("health", {}),
        quality=trained.get("quality", {}),
        stopped=stopped,
    )
