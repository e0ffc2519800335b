"""How well vectors tell labelled images apart: the k-NN vote of DINO and a linear probe. Arrays in, report out.

The linear probe is scikit-learn's logistic regression on the vectors' principal axes, each scaled by the fourth root of
its variance. It stays linear in the vectors; axes unscaled, L-BFGS needs thousands of steps (variances of untrained
features span seven decades); scaled to equal variance, small training sets overfit. Accuracy on 5,000 images of
Fashion-MNIST with an untrained 6-block ViT and the best C, from 1,000 and from 10,000 training images: unscaled 0.607
and 0.694 (after 300 steps), equal variances 0.543 and 0.709, this 0.607 and 0.715.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.query.labels import TEST, TRAIN

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

TEMPERATURE = 0.07
"""Of the vote's weights exp(cosine / T): arXiv:2104.14294, section 4.1 and its code."""
MAX_K = 20
TEST_SHARE = 0.2
"""Of each class, held out when there is no split."""
N_FOLDS = 3
SEARCH_ROWS = 9000
"""C is searched on about so many images: a finer C changes accuracy less than the test set's noise."""
SEARCH_ROWS_PER_CLASS = 6
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Values of C, strongest penalty first, for features of mean square 1."""
UNSEARCHED_STRENGTH = 1e-1
_LEAST_VARIANCE = 1e-7  # of an axis, relative to the largest: below it float32 vectors hold noise
PATIENCE = 2
"""So many weaker penalties without a better accuracy end the search: they take longest."""
_SEARCH_STEPS = 150
_SEARCH_TOLERANCE = 1e-3  # of the gradient; a tenth of it changes some 0.1 points of accuracy
_FIT_STEPS = 500
_FIT_TOLERANCE = 3e-4


@dataclass(frozen=True)
class Knn:
    """The weighted vote of the nearest training images."""

    top1: float
    """Share of test images whose first guess is right, 0..1."""
    k: int


@dataclass(frozen=True)
class Linear:
    """Logistic regression."""

    top1: float
    """Share of test images whose first guess is right, 0..1."""
    c: float
    """Inverse strength of the penalty, chosen inside the training part."""


@dataclass(frozen=True)
class PerClass:
    """One class; accuracies are None where it has no test image."""

    label: str
    n_train: int
    n_test: int
    knn: float | None
    linear: float | None


@dataclass(frozen=True)
class ProbeReport:
    """What both probes found."""

    knn: Knn
    linear: Linear
    classes: int
    n_train: int
    n_test: int
    per_class: list[PerClass]


@dataclass(frozen=True)
class Task:
    """What is to be told apart."""

    names: np.ndarray
    """Of the classes."""
    classes: np.ndarray
    """Position in `names`, for each labelled image: int [n]."""
    training: np.ndarray
    """Rows to learn from."""
    testing: np.ndarray
    """Rows to guess."""

    @property
    def truth(self) -> np.ndarray:
        """Classes of the test images: int [n_test]."""
        return self.classes[self.testing]


@dataclass(frozen=True)
class Guesses:
    """What both probes say of the test images, in their order."""

    by_vote: np.ndarray
    """int [n_test]"""
    by_line: np.ndarray
    """int [n_test]"""
    k: int
    c: float


def probe(
    vectors: np.ndarray,
    labels: Sequence[str],
    *,
    split: Sequence[str] | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> ProbeReport:
    """Train both probes on one part of the labelled vectors and test them on the other.

    vectors: unit float32 [n, dim], a row for each of the n labels.
    split: "train" or "test" for each; without it, a fifth of each class is held out, by `seed`.
    Raises DinosearchError when there is nothing to tell apart, or nothing to train or test with.
    """
    task = pose_task(labels, split=split, seed=seed, note=note)
    names, classes, training = task.names, task.classes, task.training
    truth = task.truth
    guesses = guess(vectors, task, seed=seed, note=note)
    by_vote, by_line = guesses.by_vote, guesses.by_line

    n_train = np.bincount(classes[training], minlength=len(names))
    n_test = np.bincount(truth, minlength=len(names))
    knn_right = np.bincount(truth[by_vote == truth], minlength=len(names))
    linear_right = np.bincount(truth[by_line == truth], minlength=len(names))
    per_class = [
        PerClass(
            label=names[i],
            n_train=int(n_train[i]),
            n_test=int(n_test[i]),
            knn=float(knn_right[i] / n_test[i]) if n_test[i] else None,
            linear=float(linear_right[i] / n_test[i]) if n_test[i] else None,
        )
        for i in range(len(names))
        if n_train[i] + n_test[i]
    ]
    return ProbeReport(
        knn=Knn(float((by_vote == truth).mean()), guesses.k),
        linear=Linear(float((by_line == truth).mean()), guesses.c),
        classes=len(per_class),
        n_train=len(training),
        n_test=len(truth),
        per_class=per_class,
    )


def knn_accuracy(
    vectors: np.ndarray,
    labels: Sequence[str],
    *,
    split: Sequence[str] | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[float, int]:
    """Accuracy of the k-NN vote of `probe` alone, and the number of test images; it takes and raises the same."""
    task = pose_task(labels, split=split, seed=seed, note=note)
    train, test = vectors[task.training], vectors[task.testing]
    k = _k(task.classes[task.training])
    guess = knn_vote(train, task.classes[task.training], test, k=k)
    return float((guess == task.truth).mean()), len(task.truth)


def pose_task(
    labels: Sequence[str],
    *,
    split: Sequence[str] | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Task:
    """Which labelled images to learn from and which to guess, whatever their vectors. Raises as `probe` does."""
    names, classes = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    training, testing = _parts(names, classes, split, seed=seed, note=note)
    if len(np.unique(classes[training])) < 2:
        raise DinosearchError(
            f"all {len(training)} training images have the label {names[classes[training[0]]]!r}. "
            "Label images of two classes or more"
        )
    _note_untrained(names, classes, training, testing, note)
    return Task(names, classes, training, testing)


def guess(vectors: np.ndarray, task: Task, *, seed: int = 0, note: Callable[[str], None] = lambda _: None) -> Guesses:
    """Train both probes on a task's training part and let them guess the rest. vectors: unit float32 [n, dim]."""
    train, test = vectors[task.training], vectors[task.testing]
    known = task.classes[task.training]
    k = _k(known)
    note(f"k-NN vote of {k} among {len(train)} training images, {len(test)} test images")
    by_vote = knn_vote(train, known, test, k=k)
    note("linear probe: searching C")
    c = _search_strength(train, known, seed=seed)
    note(f"linear probe: fitting with C = {c:g}")
    return Guesses(by_vote, linear_guess(train, known, test, c=c), k=k, c=c)


def knn_vote(train: np.ndarray, classes: np.ndarray, test: np.ndarray, *, k: int) -> np.ndarray:
    """Class of each test vector by the vote of its k nearest, weighted exp(cosine / 0.07): int [n_test].

    train: unit float32 [n_train, dim] of `classes` int [n_train]; test: unit float32 [n_test, dim].
    """
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: np.ndarray) -> np.ndarray:
        # ‖a − b‖² = 2 − 2 cos for unit vectors; the constant factor exp(1 / T) does not change the vote.
        return np.exp(-distances / (2 * TEMPERATURE))

    voters = KNeighborsClassifier(n_neighbors=k, weights=weights, algorithm="brute", metric="sqeuclidean")
    return voters.fit(train, classes).predict(test)


def linear_guess(train: np.ndarray, classes: np.ndarray, test: np.ndarray, *, c: float) -> np.ndarray:
    """Class of each test vector by logistic regression of strength `c`: int [n_test]. Arrays as for `knn_vote`."""
    axes = _Axes(train)
    model = _regression(_FIT_STEPS, tolerance=_FIT_TOLERANCE).set_params(C=c)
    return _fit(model, axes.of(train), classes).predict(axes.of(test))


def _search_strength(train: np.ndarray, classes: np.ndarray, *, seed: int) -> float:
    """C of the best accuracy over three folds of the training part; the smallest of equals."""
    rows = _sample(classes, seed=seed)
    folds = _folds(classes[rows], seed=seed)
    if folds.max() < 0:
        return UNSEARCHED_STRENGTH  # one image of each class: nothing to test with
    searches = []
    for fold in range(folds.max() + 1):
        inside, outside = rows[folds != fold], rows[folds == fold]
        axes = _Axes(train[inside])
        searches.append(
            (
                _regression(_SEARCH_STEPS, tolerance=_SEARCH_TOLERANCE),
                (axes.of(train[inside]), classes[inside]),
                (axes.of(train[outside]), classes[outside]),
            )
        )
    best, best_right, n_worse = STRENGTHS[0], -1, 0
    for c in STRENGTHS:
        n_right = 0
        for model, (features, known), (held_out, truth) in searches:
            model.set_params(C=c)  # goes on from the solution of the stronger penalty
            n_right += int((_fit(model, features, known).predict(held_out) == truth).sum())
        if n_right > best_right:
            best, best_right, n_worse = c, n_right, 0
        else:
            n_worse += 1
        if n_worse == PATIENCE:
            break
    return best


def _sample(classes: np.ndarray, *, seed: int) -> np.ndarray:
    """Rows for the search: all of a small set, else a share of each class."""
    share = min(1.0, SEARCH_ROWS / len(classes))
    random = np.random.default_rng(seed)
    picked = []
    for members in _members(classes):
        n = min(len(members), max(SEARCH_ROWS_PER_CLASS, round(share * len(members))))
        picked.append(random.permutation(members)[:n])
    return np.concatenate(picked)


def _folds(classes: np.ndarray, *, seed: int) -> np.ndarray:
    """The fold that holds each row out; −1, never, for the only image of a class. Classes are spread evenly."""
    random = np.random.default_rng(seed)
    folds = np.full(len(classes), -1)
    start = 0
    for members in _members(classes):
        if len(members) > 1:
            folds[random.permutation(members)] = (start + np.arange(len(members))) % N_FOLDS
            start += len(members)
    return folds


class _Axes:
    """Principal axes of a training part, scaled so that variances are the square roots of what they were."""

    def __init__(self, train: np.ndarray) -> None:
        self._mean = train.mean(axis=0)
        centred = train - self._mean
        variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(train))
        variances = np.maximum(variances, max(variances.max() * _LEAST_VARIANCE, np.finfo(np.float32).tiny))
        scale = variances**-0.25
        scale /= np.sqrt(np.mean(variances * scale**2))  # features of mean square 1, so that C means the same anywhere
        self._rotation = (axes * scale).astype(np.float32)  # [dim, dim]

    def of(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [n, dim]"""
        return (vectors - self._mean) @ self._rotation


def _regression(n_steps: int, *, tolerance: float) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=n_steps, tol=tolerance, warm_start=True)


def _fit(model: LogisticRegression, features: np.ndarray, classes: np.ndarray) -> LogisticRegression:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Separable classes with a weak penalty: accuracy has settled long before the gradient has.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, classes)


def _k(training_classes: np.ndarray) -> int:
    return int(min(MAX_K, _counts(training_classes).min(), len(training_classes)))


def _parts(
    names: np.ndarray, classes: np.ndarray, split: Sequence[str] | None, *, seed: int, note: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to test with."""
    if split is not None:
        parts = np.asarray(split)
        training, testing = np.flatnonzero(parts == TRAIN), np.flatnonzero(parts == TEST)
        for rows, part in ((training, TRAIN), (testing, TEST)):
            if not len(rows):
                raise DinosearchError(
                    f"the split names no {part} image that is indexed. Label some, or delete the column split"
                )
        return training, testing
    random = np.random.default_rng(seed)
    held_out, kept, single = [], [], []
    for members in _members(classes):
        if len(members) == 1:
            single.append(names[classes[members[0]]])
            continue
        shuffled = random.permutation(members)
        n_test = max(1, round(TEST_SHARE * len(members)))
        held_out.append(shuffled[:n_test])
        kept.append(shuffled[n_test:])
    if single:
        note(f"left out, with a single labelled image each: {_some(single)}")
    if not kept:
        raise DinosearchError("no class has two labelled images, one to train and one to test with. Label more images")
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def _note_untrained(
    names: np.ndarray, classes: np.ndarray, training: np.ndarray, testing: np.ndarray, note: Callable[[str], None]
) -> None:
    unknown = np.setdiff1d(classes[testing], classes[training])
    if len(unknown):
        note(f"cannot be right, with test images but none to train with: {_some(list(names[unknown]))}")


def _some(labels: list[str]) -> str:
    shown = ", ".join(labels[:5])
    return shown if len(labels) <= 5 else f"{shown} and {len(labels) - 5} more classes"


def _members(classes: np.ndarray) -> list[np.ndarray]:
    """Rows of each class that occurs."""
    order = np.argsort(classes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)


def _counts(classes: np.ndarray) -> np.ndarray:
    return np.unique(classes, return_counts=True)[1]
