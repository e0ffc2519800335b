"""A picture of how a run went, drawn from its metrics. Knows no model.

Drawn with Pillow, which every installation has: a picture that only an extra could draw would be missing where it is
needed, and half a dozen small line charts do not weigh a plotting library's 60 MB.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dinosearch.vit.folder import write_whole

PANELS = {
    "loss": "DINO loss",
    "loss_of_ln_k": "loss / ln K (1: nothing learnt)",
    "teacher_entropy": "teacher entropy, nats",
    "teacher_kl": "KL from the mean assignment, nats (0: collapsed)",
    "prototypes_used": "share of prototypes in use",
    "center_norm": "length of the center",
    "feature_std": "spread of features (1: even, 0: one point)",
    "rank": "effective rank of features (RankMe)",
    "recall_at_1": "recall@1 of distorted images",
    "embedding_rank": "effective rank of undistorted images",
    "knn_top1": "k-NN accuracy",
    "lr": "learning rate",
}
"""What is drawn, where the metrics hold it, and its title."""
WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 28
"""Of one panel, and of the margins around its curve, in pixels."""
INK, FAINT, CURVE, GIVEN_UP, ALARM = "#222222", "#dddddd", "#1f5fa8", "#b9c7d6", "#c62828"


@dataclass
class Course:
    """What the metrics tell: one piece of curve per stretch between alarms."""

    pieces: list[dict[str, list[tuple[int, float]]]] = field(default_factory=lambda: [{}])
    """Values by name, each (step, value); a step back begins another piece."""
    alarms: list[tuple[int, int]] = field(default_factory=list)
    """The step of each alarm, and the step gone back to."""

    @property
    def names(self) -> list[str]:
        return [name for name in PANELS if any(name in piece for piece in self.pieces)]


def draw_curves(lines: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Write a PNG with a panel per signal; False, and no file, when there are not two points to draw a line between.

    lines: what metrics.jsonl holds. Pale is what was given up after an alarm, red where an alarm sounded.
    """
    course = _course(lines)
    names = [name for name in course.names if sum(len(piece.get(name, ())) for piece in course.pieces) > 1]
    if not names:
        return False
    n_rows = math.ceil(len(names) / 2)
    image = Image.new("RGB", (2 * WIDTH, n_rows * HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    last_step = max(step for piece in course.pieces for values in piece.values() for step, _ in values)
    for i, name in enumerate(names):
        _panel(draw, (i % 2 * WIDTH, i // 2 * HEIGHT), name, course, last_step)
    file = io.BytesIO()
    image.save(file, "PNG")
    write_whole(path, file.getvalue())
    return True


def _course(lines: Iterable[Mapping[str, Any]]) -> Course:
    course = Course()
    for line in lines:
        if "alarm" in line:
            course.alarms.append((line["alarm"]["step"], line["alarm"]["back_to_step"]))
            course.pieces.append({})
            continue
        for name in PANELS:
            value = line.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                course.pieces[-1].setdefault(name, []).append((line["step"], float(value)))
    return course


def _panel(draw: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, course: Course, last_step: int) -> None:
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    values = [value for piece in course.pieces for _, value in piece.get(name, ())]
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5

    def point(step: int, value: float) -> tuple[float, float]:
        return (
            left + (right - left) * step / last_step,
            bottom - (bottom - top) * (value - low) / (high - low),
        )

    small, font = ImageFont.load_default(11), ImageFont.load_default(13)
    draw.text((left, corner[1] + 10), PANELS[name], fill=INK, font=font)
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        height = point(0, value)[1]
        draw.line([(left, height), (right, height)], fill=FAINT)
        draw.text((left - 6, height), f"{value:.3g}", fill=INK, font=small, anchor="rm")
    draw.text((left, bottom + 6), "0", fill=INK, font=small)
    draw.text((right, bottom + 6), f"step {last_step}", fill=INK, font=small, anchor="ra")
    for step, _ in course.alarms:
        draw.line([point(step, low), point(step, high)], fill=ALARM)
    for i, piece in enumerate(course.pieces):
        kept_to = min((back for _, back in course.alarms[i:]), default=last_step)
        points = piece.get(name, [])
        _line(draw, [point(*p) for p in points], GIVEN_UP)
        _line(draw, [point(*p) for p in points if p[0] <= kept_to], CURVE)


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=2)
