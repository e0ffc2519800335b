"""When training goes wrong, and which knob to turn then. Sees looks at the teacher and recipes; changes no model."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinosearch.pretrain.health import Health
from dinosearch.pretrain.recipe import Recipe, usual_lr

LEAST_KL = 0.003
"""Nats, whatever K and batch: for small spreads KL is half the variance of logits over the temperature, which neither
enters. Sound recipes stayed above 0.017 (docs/health.md); with everything in one prototype it is below 0.0001."""
LEAST_KL_AT_RISK = 0.05
"""With a setting that is known to collapse, less has to be seen: at teacher temperature 0.2, runs whose loss was
ln(out_dim) kept between 0.005 and 0.024; Fashion-MNIST at 0.04 gave more than 0.35."""
FEW_PROTOTYPES = 4
"""In use by a whole batch: a collapse, unless images differ as much as so few allow. Runs that learn use hundreds."""
LEAST_STD = 0.02
"""Of features: below it they are one point, whatever the head makes of them."""
MOST_LOSS = 1.2
"""Of ln(out_dim): a student that is surely wrong. Uniform is 1."""
MOST_LOSS_AT_RISK = 0.98
"""With a setting that is known to ruin runs, having learnt nothing is sign enough: steps a hundred times too large
scatter the assignments, but leave the student to guess. Sound runs on Fashion-MNIST stayed below 0.97."""
PATIENCE = 3
"""The median of so many looks decides, so that one odd batch alarms nobody."""
MOST_ALARMS = 6
"""After so many alarms in one run, turning knobs has proven useless."""
HIGHEST_TEMPERATURE = 0.07
"""Of the teacher; 0.08 collapses (table 8 of arXiv 2104.14294)."""
HIGHEST_CENTER_MOMENTUM = 0.99
"""0.999 collapses (same table)."""
HIGHEST_LR = 10.0
"""Times the usual learning rate: nothing learns from steps above it."""


@dataclass(frozen=True)
class Alarm:
    """What is wrong."""

    kind: str
    """"collapse", "divergence" or "nan"."""
    why: str
    """The signal that told, for people."""


class Watch:
    """Judges looks at the teacher, one after another.

    recent: looks remembered from before, oldest first, as `recent` gives them.
    """

    def __init__(self, recent: Sequence[Sequence[float]] = ()) -> None:
        self._recent = deque((tuple(look) for look in recent), maxlen=PATIENCE)

    @property
    def recent(self) -> list[tuple[float, ...]]:
        return list(self._recent)

    @property
    def calm(self) -> bool:
        """All the looks remembered show a state worth coming back to."""
        return not any(
            _diverged(loss) or _alike(kl, LEAST_KL) or _few(kl, mean_entropy, used) or _one_point(std)
            for kl, mean_entropy, used, std, loss in self._recent
        )

    def forget(self) -> None:
        """After a step back the looks since then no longer count."""
        self._recent.clear()

    def judge(self, health: Health, *, done: float, recipe: Recipe) -> Alarm | None:
        """The alarm that this look and those before it give, if any.

        done: share of the run that is over; while the learning rate rises little is learnt, and nothing alarms.
        """
        mean_entropy = health.teacher_entropy + health.teacher_kl
        self._recent.append(
            (health.teacher_kl, mean_entropy, health.prototypes_used, health.feature_std, health.loss_of_ln_k)
        )
        if len(self._recent) < PATIENCE or done < recipe.warmup:
            return None
        kl, mean_entropy, used, std, loss = (
            sorted(signal)[PATIENCE // 2] for signal in zip(*self._recent, strict=True)
        )
        at_risk = risky(recipe)
        if _diverged(loss):
            return Alarm("divergence", f"the loss is {loss:.2f} times ln(out_dim)")
        if _few(kl, mean_entropy, used):
            n = math.exp(mean_entropy)
            return Alarm("collapse", f"{n:.1f} prototypes serve all images (KL from the mean {kl:.2g})")
        if _alike(kl, LEAST_KL_AT_RISK if at_risk else LEAST_KL):
            return Alarm("collapse", f"all images are assigned alike (KL from the mean {kl:.2g})")
        if at_risk and loss > MOST_LOSS_AT_RISK:
            return Alarm("divergence", f"nothing is learnt (the loss is {loss:.2f} times ln(out_dim))")
        if _one_point(std):
            return Alarm("collapse", f"all images have the same features (standard deviation {std:.2g})")
        return None


def _diverged(loss: float) -> bool:
    return loss > MOST_LOSS


def _alike(kl: float, least: float) -> bool:
    return kl < least


def _few(kl: float, mean_entropy: float, used: float) -> bool:
    n_used = math.exp(mean_entropy)
    # kl = mean_entropy when every image has one prototype for sure: few kinds of images, well told apart
    return n_used < min(FEW_PROTOTYPES, n_used / used / 8) and kl <= 0.8 * mean_entropy


def _one_point(std: float) -> bool:
    return std < LEAST_STD


def not_a_number(loss: float | None) -> Alarm:
    what = "a weight" if loss is None or math.isfinite(loss) else "the loss"
    return Alarm("nan", f"{what} became infinite or no number")


def ruinous(recipe: Recipe) -> bool:
    """Its steps are so large that no weights made by them are worth keeping, however good they look."""
    return recipe.lr > HIGHEST_LR * usual_lr(recipe.batch_size)


def risky(recipe: Recipe) -> bool:
    """It has a setting that is known to collapse or diverge."""
    hottest = max(recipe.teacher_temperature, recipe.warmup_teacher_temperature)
    return hottest > HIGHEST_TEMPERATURE or recipe.center_momentum > HIGHEST_CENTER_MOMENTUM or ruinous(recipe)


def remedy(recipe: Recipe, alarm: Alarm) -> tuple[Recipe, str]:
    """The recipe to go on with, and what was changed in it.

    Known causes are mended first; else steps get smaller, and after a collapse the teacher sharper and steadier.
    """
    mended: dict[str, float] = {}
    if ruinous(recipe):
        mended["lr"] = usual_lr(recipe.batch_size)
    if max(recipe.teacher_temperature, recipe.warmup_teacher_temperature) > HIGHEST_TEMPERATURE:
        mended |= dict.fromkeys(("teacher_temperature", "warmup_teacher_temperature"), 0.04)
    if recipe.center_momentum > HIGHEST_CENTER_MOMENTUM:
        mended["center_momentum"] = 0.9
    if mended:
        return _changed(recipe, **mended)
    if alarm.kind != "collapse":
        return _changed(recipe, lr=recipe.lr / 10)
    return _changed(
        recipe,
        lr=recipe.lr / 4,
        teacher_temperature=max(0.02, 0.75 * recipe.teacher_temperature),
        warmup_teacher_temperature=max(0.02, 0.75 * recipe.warmup_teacher_temperature),
        teacher_momentum=(1 + recipe.teacher_momentum) / 2,
    )


def _changed(recipe: Recipe, **values: float) -> tuple[Recipe, str]:
    for name in ("teacher_temperature", "warmup_teacher_temperature"):  # sharper only
        if name in values:
            values[name] = min(values[name], getattr(recipe, name))
    changes = {name: (getattr(recipe, name), value) for name, value in values.items() if getattr(recipe, name) != value}
    told = [f"{name.replace('_', ' ')} {before:.3g} → {after:.3g}" for name, (before, after) in changes.items()]
    changed: dict[str, Any] = dict(values)
    return replace(recipe, **changed), ", ".join(told)
