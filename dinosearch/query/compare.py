"""Which of several indexes tells labelled images apart best: the same images, the same split, paired. Arrays and labels
in, verdicts out; prints nothing.

Two accuracies on one test set are not independent, so what is compared is images, one by one: how many the one gets
right and the other wrong (McNemar's exact test), and how far the difference of accuracies may be off (the paired
bootstrap, Efron and Tibshirani 1993, chapter 13). The test decides, the interval says how much is at stake.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.query.labels import load_labels
from dinosearch.query.probe import guess, pose_task

if TYPE_CHECKING:
    from dinosearch.index.contents import IndexedFile

SIGNIFICANCE = 0.05
"""Chance of calling any index better when none is, over all pairs of one probe."""
CONFIDENCE = 0.95
N_BOOTSTRAP = 10_000


@dataclass(frozen=True)
class Accuracy:
    """What one index's vectors are worth."""

    index: str
    knn: float
    """Share of test images that the k-NN vote names right, 0..1."""
    linear: float
    """The same of the linear probe."""


@dataclass(frozen=True)
class Difference:
    """Two indexes under one probe."""

    probe: str
    """ "knn" or "linear"."""
    first: str
    second: str
    difference: float
    """Accuracy of the first less that of the second."""
    low: float
    high: float
    """Where the difference lies with 95 % confidence, by the paired bootstrap."""
    only_first: int
    """Test images that only the first names right."""
    only_second: int
    p: float
    """Of McNemar's exact test; with more than two indexes corrected for their number (Holm)."""
    better: str | None
    """The better index; None when the data cannot tell."""


@dataclass(frozen=True)
class Comparison:
    """Several indexes on the same labelled images."""

    indexes: list[Accuracy]
    differences: list[Difference]
    classes: int
    n_train: int
    n_test: int
    left_out: int
    """Labelled images that are not in all of the indexes."""
    unmatched: int
    """Lines of the CSV whose image is in none of them."""


def compare(
    labels: Path | str,
    indexes: Sequence[tuple[str, Sequence[IndexedFile], np.ndarray]],
    *,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Train and test both probes on each index with the same images.

    labels: as `load_labels` takes them.
    indexes: name, files and unit vectors float32 [n, dim] of each, two or more.
    Raises UsageError for fewer than two, DinosearchError when there is nothing to compare with.
    """
    names = [name for name, _, _ in indexes]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UsageError("a comparison takes two different indexes or more: --index a --index b")
    labelled = [load_labels(labels, files) for _, files, _ in indexes]
    rows = [
        {_key(files[row]): row for row in found.rows} for (_, files, _), found in zip(indexes, labelled, strict=True)
    ]
    shared = set(rows[0]).intersection(*rows[1:])
    if not shared:
        raise DinosearchError(
            f"no labelled image is in all of {', '.join(names)}. Index the same folder with each model"
        )
    first = labelled[0]
    chosen = [i for i, row in enumerate(first.rows) if _key(indexes[0][1][row]) in shared]
    keys = [_key(indexes[0][1][first.rows[i]]) for i in chosen]
    task = pose_task(
        [first.labels[i] for i in chosen],
        split=None if first.splits is None else [first.splits[i] for i in chosen],
        seed=seed,
        note=note,
    )
    right: dict[str, list[np.ndarray]] = {"knn": [], "linear": []}
    for (name, _, vectors), found in zip(indexes, rows, strict=True):
        note(f"{name}:")
        guesses = guess(vectors[[found[key] for key in keys]], task, seed=seed, note=note)
        right["knn"].append(guesses.by_vote == task.truth)
        right["linear"].append(guesses.by_line == task.truth)
    return Comparison(
        indexes=[
            Accuracy(name, float(knn.mean()), float(linear.mean()))
            for name, knn, linear in zip(names, right["knn"], right["linear"], strict=True)
        ],
        differences=[line for probe in right for line in _differences(probe, names, right[probe], seed=seed)],
        classes=len(np.unique(task.classes[np.concatenate([task.training, task.testing])])),
        n_train=len(task.training),
        n_test=len(task.testing),
        left_out=len(set().union(*rows)) - len(shared),
        unmatched=len(set.intersection(*({row.line for row in found.unmatched} for found in labelled))),
    )


def _key(file: IndexedFile) -> tuple[str, int]:
    return os.fspath(file.path), file.frame


def _differences(probe: str, names: Sequence[str], right: Sequence[np.ndarray], *, seed: int) -> list[Difference]:
    pairs = list(combinations(range(len(names)), 2))
    only = [(int((right[a] & ~right[b]).sum()), int((right[b] & ~right[a]).sum())) for a, b in pairs]
    found = []
    for (a, b), (only_a, only_b), p in zip(pairs, only, holm([mcnemar(*counts) for counts in only]), strict=True):
        n = len(right[a])
        low, high = bootstrap_interval(only_a, only_b, n=n, seed=seed)
        winner = a if only_a > only_b else b
        found.append(
            Difference(
                probe=probe,
                first=names[a],
                second=names[b],
                difference=(only_a - only_b) / n,
                low=low,
                high=high,
                only_first=only_a,
                only_second=only_b,
                p=p,
                better=names[winner] if p < SIGNIFICANCE else None,
            )
        )
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """Chance of so uneven a share of the images that only one gets right, were both equally good: exact, two-sided."""
    from scipy.stats import binomtest

    n = only_first + only_second
    return float(binomtest(only_first, n).pvalue) if n else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that keep the chance of any false alarm among them (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected.tolist()


def bootstrap_interval(only_first: int, only_second: int, *, n: int, seed: int) -> tuple[float, float]:
    """Where the difference of two accuracies on n images lies, by drawing the images again and again."""
    # An image adds 1, −1 or 0 to the difference; drawing n of them with replacement is one multinomial draw.
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, size=N_BOOTSTRAP)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [tail, 1 - tail])
    return float(low), float(high)
