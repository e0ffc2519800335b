"""One training run: images in, a model folder out. Composes survey, recipe, bank, run and checkpoints.

`train` yields progress and prints nothing. All that is random comes from (seed, epoch) and (seed, step), none from
state that a resumed process would lack: a run that was interrupted ends with the tensors of one that was not.
"""

import hashlib
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dinosearch.errors import DinosearchError, Interrupted, UsageError
from dinosearch.images import compiler_present, find_images, n_cores
from dinosearch.pretrain.bank import ImageBank, Survey, survey_images
from dinosearch.pretrain.checkpoint import read_facts
from dinosearch.pretrain.recipe import Reason, Recipe, plan_recipe, recipe_from_facts
from dinosearch.pretrain.run import Run
from dinosearch.vit.folder import ModelFolder, Note, free_name, quiet, remove_model

DEFAULT_EPOCHS = 100
DEFAULT_MINUTES = {"cpu": 5.0, "cuda": 60.0, "mps": 30.0}
"""A run without --steps, --epochs or --minutes ends after these epochs or minutes, whichever come first."""
LEAST_STEPS = 200
"""By default even a handful of images is trained on for this many steps."""
UNTIMED_STEPS = 3
"""Allocation and compilation make the first steps slow; rates are taken from the end of the third."""
COMPILE_FROM_STEPS = 2_000
COMPILE_FROM_MINUTES = 10.0
"""torch.compile takes a minute or two; shorter runs on a GPU go without."""
RECENT_STEPS = 100
"""Over so many steps the speed is taken that plans the rest of a time budget."""
UNBOUNDED = 2**62
"""Steps of a run that only its deadline ends."""
LOOK_EVERY = 50
"""Steps between entries of metrics.jsonl, and looks at the teacher's health."""
BANK_MARGIN = 8 / 7
"""Squares are kept this much larger than the crops made of them, if the images have the pixels (256 for 224)."""


@dataclass(frozen=True)
class TrainConfig:
    """What the user asked for. None leaves a choice to the recipe."""

    images: tuple[Path, ...]
    """Folders, searched recursively."""
    models: Path = Path("models")
    """Where the model's folder is made."""
    name: str | None = None
    """Name of the model; without one, that of the first folder of images, with a number if taken."""
    steps: int | None = None
    """Optimizer steps; 0 saves the initial weights at once, which is an untrained model."""
    epochs: float | None = None
    """Passes over the images."""
    minutes: float | None = None
    """Wall-clock budget of the whole run, reading included; the schedules end with it."""
    seed: int = 0
    """Equal seeds give equal runs, on the CPU with equal thread counts bit for bit."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The user's choices among the recipe's, by name: see plan_recipe."""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    overwrite: bool = False
    """Replace a model of this name."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints; a kill loses at most these."""


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


def train(config: TrainConfig, *, note: Note = quiet, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
    """Train and save a model, yielding progress; the last item carries the report. `stop` is asked between steps.

    Raises DinosearchError: no images, a taken name, sizes that do not fit, a loss that is no number.
    """
    began = time.monotonic()
    device = choose_device(config.device)
    torch.set_num_threads(min(torch.get_num_threads(), n_cores()))  # a container's quota, not the host's cores
    _check(config)
    paths = _find(config.images)
    folder = _folder_for(config)
    kept = read_facts(folder / "training") if config.resume else None
    if config.resume and kept is None:
        note(f"{folder} has no checkpoint yet: starting over")
    digest = _digest(paths)
    if kept is None:
        survey = survey_images(paths)
        recipe, reasons = plan_recipe(survey, accelerator=device.type != "cpu", overrides=config.overrides)
        _tell(reasons, note)
        seed, grey, side = config.seed, survey.grey, _bank_side(recipe, survey)
    else:
        _refuse_other_settings(kept, config, digest=digest, folder=folder)
        if kept["report"] is not None:
            note(f"{folder} is finished: nothing to resume")
            yield Progress("done", kept["step"], kept["step"], report=TrainReport(**kept["report"]))
            return
        note(f"resuming {folder} at step {kept['step']} of {kept['total_steps']}")
        recipe, seed, grey, side = recipe_from_facts(kept["recipe"]), kept["seed"], kept["grey"], kept["side"]
    run = Run(recipe, seed=seed, device=device)
    if config.overwrite and kept is None and folder.exists():
        remove_model(folder)
    (folder / "training").mkdir(parents=True, exist_ok=True)
    note(f"model: {folder}, on {describe_device(device)}")
    if config.steps == 0:
        facts = _trained(config, recipe, seed=seed, n_images=len(paths)) | {"method": "none", "steps": 0}
        model = run.export(folder, trained=facts)
        yield Progress("done", 0, 0, report=_report(model, facts, seconds=time.monotonic() - began))
        return

    bank = ImageBank(paths, side=side, grey=grey, folder=folder / "training")
    for n_read in bank.read():
        yield Progress("reading", n_read, len(paths))
        if stop():
            break
    if bank.failed:
        path, reason = bank.failed[0]
        note(f"{len(bank.failed)} of {len(paths)} files are left out, such as {path} ({reason})")
    if len(bank) < recipe.batch_size:
        raise UsageError(f"only {len(bank)} images can be read: choose --batch-size {len(bank)} or less")
    steps_per_epoch = len(bank) // recipe.batch_size
    if kept is None:
        plan = _plan(config, steps_per_epoch=steps_per_epoch, device=device, began=began, note=note)
    else:
        run.restore(folder / "training")
        plan = Plan(kept["total_steps"], deadline=None)
        if plan.total_steps == UNBOUNDED:  # a time budget, stopped before any step was timed
            plan.deadline = began + 60 * kept["asked"]["minutes"]
    if device.type == "cuda" and _repays_compiling(plan):
        if compiler_present():
            note("compiling the model, once per run (a minute or two)")
            run.compile()
        else:
            note("no C++ compiler found, so the model is not compiled and trains slower")
    course = Course(
        run,
        bank,
        plan,
        folder=folder,
        first_step=0 if kept is None else kept["step"],
        began=began,
        kept={
            "recipe": recipe.facts(),
            "seed": seed,
            "grey": grey,
            "side": side,
            "images_digest": digest,
            "asked": _asked(config),
        },
        trained=_trained(config, recipe, seed=seed, n_images=len(bank)),
    )
    yield from course.follow(checkpoint_every=config.checkpoint_every, stop=stop)


def choose_device(wanted: str) -> torch.device:
    """auto → the GPU if there is one, else the CPU. Raises UsageError for a device that is not there."""
    mps = torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"no device {wanted!r}: choose auto, cpu, cuda, cuda:N or mps") from None
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not {"cpu": True, "mps": mps, "cuda": (device.index or 0) < n_cuda}.get(device.type, False):
        raise UsageError(f"this machine has no {wanted}: leave --device out, or choose cpu")
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)


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
        self.total_steps = min(self.most_steps, max(step + 1, step + int(left / seconds_per_step)))


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
        report = _report(
            model,
            trained,
            seconds=time.monotonic() - self.began,
            rate=rate,
            resumed_from_step=self.first_step or None,
            stopped=stopped,
        )
        self._save(step, report=None if stopped else report)
        return Progress("done", step, self.plan.total_steps, teacher=self.run.teacher.backbone, report=report)


def batch_indices(step: int, *, n: int, batch_size: int, seed: int) -> np.ndarray:
    """Which images step number `step` sees: int64 [batch_size]. Every epoch shuffles anew, by (seed, epoch)."""
    epoch, at = divmod(step, n // batch_size)
    order = _epoch_order(epoch, n, seed)
    return np.sort(order[at * batch_size : (at + 1) * batch_size])  # sorted: kinder to a memory-mapped bank


_ORDER: dict[tuple[int, int, int], np.ndarray] = {}


def _epoch_order(epoch: int, n: int, seed: int) -> np.ndarray:
    key = (epoch, n, seed)
    if key not in _ORDER:
        _ORDER.clear()
        _ORDER[key] = np.random.default_rng((seed, epoch)).permutation(n)
    return _ORDER[key]


def _plan(config: TrainConfig, *, steps_per_epoch: int, device: torch.device, began: float, note: Note) -> Plan:
    if config.steps is not None:
        return Plan(config.steps, None)
    if config.epochs is not None:
        return Plan(max(1, round(config.epochs * steps_per_epoch)), None)
    if config.minutes is not None:
        return Plan(UNBOUNDED, began + 60 * config.minutes)
    steps, minutes = max(LEAST_STEPS, DEFAULT_EPOCHS * steps_per_epoch), DEFAULT_MINUTES[device.type]
    note(f"length: {minutes:g} minutes, or {steps} steps if they take less (--minutes, --steps or --epochs choose)")
    return Plan(steps, began + 60 * minutes, most_steps=steps)


def _repays_compiling(plan: Plan) -> bool:
    if plan.deadline is None:
        return plan.total_steps >= COMPILE_FROM_STEPS
    return (plan.deadline - time.monotonic()) / 60 >= COMPILE_FROM_MINUTES


def _check(config: TrainConfig) -> None:
    if sum(limit is not None for limit in (config.steps, config.epochs, config.minutes)) > 1:
        raise UsageError("--steps, --epochs and --minutes exclude each other: choose one")
    if (config.steps is not None and config.steps < 0) or any(
        limit is not None and not 0 < limit < math.inf for limit in (config.epochs, config.minutes)
    ):
        raise UsageError("--steps must be 0 or more, --epochs and --minutes more than 0")
    if config.resume and config.overwrite:
        raise UsageError("--resume goes on and --overwrite starts over: choose one")


def _find(folders: tuple[Path, ...]) -> list[Path]:
    paths = [folder / image.path for folder in folders for image in find_images(folder).images]
    if not paths:
        raise DinosearchError(f"no images in {', '.join(map(str, folders))}. Name a folder that holds some")
    return paths


def _folder_for(config: TrainConfig) -> Path:
    """Where the model goes. Raises UsageError when the name is taken and neither --resume nor --overwrite was given."""
    if config.name is not None:
        if not config.name or Path(config.name).name != config.name or config.name.startswith("."):
            raise UsageError(f"--name {config.name!r} is no name for a folder: leave out slashes and leading dots")
        folder = config.models / config.name
        if folder.exists() and not (config.resume or config.overwrite):
            raise UsageError(f"{folder} exists. Choose another --name, or --resume it, or --overwrite it")
        return folder
    base = config.images[0].resolve().name
    if config.resume:
        begun = list(config.models.glob("*/training/checkpoint.safetensors"))
        if not begun:
            raise DinosearchError(f"no run in {config.models}/ has a checkpoint. Leave --resume out")
        return max(begun, key=lambda path: path.stat().st_mtime_ns).parent.parent
    return config.models / free_name(base, config.models)


def _refuse_other_settings(kept: Mapping[str, Any], config: TrainConfig, *, digest: str, folder: Path) -> None:
    asked, before = _asked(config), kept["asked"]
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            raise UsageError(
                f"{folder} was begun with --{name.replace('_', '-')} {before.get(name)}, not {value}. "
                "Resume without it, or train under another --name"
            )
    if digest != kept["images_digest"]:
        raise DinosearchError(
            f"the images are not those that {folder} was begun with. Restore them, or train under another --name"
        )


def _asked(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share, as JSON keeps them."""
    limits = {"steps": config.steps, "epochs": config.epochs, "minutes": config.minutes}
    return limits | {"seed": config.seed or None} | dict(config.overrides)


def _digest(paths: list[Path]) -> str:
    """Over names and sizes of all files: cheap, and enough to notice that a run would see other images."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _bank_side(recipe: Recipe, survey: Survey) -> int:
    wanted = max(8, 8 * round(recipe.image_size * BANK_MARGIN / 8))
    return max(recipe.image_size, min(wanted, min(survey.width, survey.height)))


def _tell(reasons: list[Reason], note: Note) -> None:
    width = max(len(reason.name) for reason in reasons)
    value_width = max(len(reason.value) for reason in reasons)
    for reason in reasons:
        note(f"  {reason.name:<{width}}  {reason.value:<{value_width}}  {reason.why}")


def _trained(config: TrainConfig, recipe: Recipe, *, seed: int, n_images: int) -> dict[str, Any]:
    return {
        "method": "dino",
        "data": [str(folder) for folder in config.images],
        "images": n_images,
        "seed": seed,
        "recipe": recipe.facts(),
    }


def _report(
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
