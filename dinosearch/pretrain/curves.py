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
LEGEND = 20
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
    image = Image.new("RGB", (2 * WIDTH, n_rows * HEIGHT + (LEGEND if course.alarms else 0)), "white")
    draw = ImageDraw.Draw(image)
    last_step = max(step for piece in course.pieces for values in piece.values() for step, _ in values)
    for i, name in enumerate(names):
        _panel(draw, (i % 2 * WIDTH, i // 2 * HEIGHT), name, course, last_step)
    if course.alarms:
        _legend(draw, n_rows * HEIGHT)
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
    low, high = _range(course, name, last_step)

    def point(step: int, value: float) -> tuple[float, float]:
        return (
            left + (right - left) * step / max(1, last_step),
            bottom - (bottom - top) * (min(max(value, low), high) - low) / (high - low),
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
        points = piece.get(name, [])
        _line(draw, [point(*p) for p in points], GIVEN_UP)
        _line(draw, [point(*p) for p in points if p[0] <= _kept_to(course, i, last_step)], CURVE)


def _legend(draw: ImageDraw.ImageDraw, top: int) -> None:
    left, font = LEFT, ImageFont.load_default(11)
    for colour, meaning in ((CURVE, "the run"), (GIVEN_UP, "given up after an alarm"), (ALARM, "alarm")):
        draw.line([(left, top + 8), (left + 24, top + 8)], fill=colour, width=2)
        draw.text((left + 30, top + 8), meaning, fill=INK, font=font, anchor="lm")
        left += 46 + round(draw.textlength(meaning, font=font))


def _kept_to(course: Course, piece: int, last_step: int) -> int:
    """The step up to which a piece was not given up."""
    return min((back for _, back in course.alarms[piece:]), default=last_step)


def _range(course: Course, name: str, last_step: int) -> tuple[float, float]:
    """Of the axis: all that was kept; what was given up may add half of that, and is cut off beyond."""
    values = [value for piece in course.pieces for _, value in piece.get(name, ())]
    kept = [
        value
        for i, piece in enumerate(course.pieces)
        for step, value in piece.get(name, ())
        if step <= _kept_to(course, i, last_step)
    ]
    kept = kept if len(kept) > 1 and max(kept) > min(kept) else values
    room = (max(kept) - min(kept)) / 2
    low, high = max(min(values), min(kept) - room), min(max(values), max(kept) + room)
    if high - low < 1e-9 * max(1.0, abs(high)):
        return low - 0.5, high + 0.5
    return low, high


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=2)
