import itertools
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from dinosearch.errors import DinosearchError
from dinosearch.query import probe as probing
from dinosearch.query.probe import knn_vote, linear_guess, probe


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def blobs(n, *, dim=32, n_classes=5, apart=1.0, seed=0):
    """Unit vectors [n, dim] around one direction for each class, and their labels."""
    random = np.random.default_rng(seed)
    classes = np.arange(n) % n_classes
    centers = random.standard_normal((n_classes, dim))
    vectors = apart * centers[classes] + random.standard_normal((n, dim))
    return unit(vectors), [f"c{c}" for c in classes]


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return unit(data.data + 1e-3), [str(label) for label in data.target]


def test_the_vote_is_that_of_the_paper_written_as_loops():
    vectors, labels = blobs(300, apart=0.3)
    train, test = vectors[:240], vectors[240:]
    classes = np.array([int(label[1:]) for label in labels[:240]])
    expected = []
    for query in test:
        cosines = [float(query @ vector) for vector in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:20]
        votes = dict.fromkeys(range(5), 0.0)
        for i in nearest:
            votes[int(classes[i])] += np.exp(cosines[i] / 0.07)
        expected.append(max(votes, key=votes.get))
    assert knn_vote(train, classes, test, k=20).tolist() == expected


def test_near_voters_outweigh_many_far_ones():
    near, far = [1.0, 0.05, 0.0], [1.0, 1.0, 0.0]
    train, query = unit([near, far, far, far]), unit([[1.0, 0.0, 0.0]])
    assert knn_vote(train, np.array([0, 1, 1, 1]), query, k=4).tolist() == [0]


def test_both_probes_read_digits(digits):
    report = probe(*digits)
    assert report.knn.top1 > 0.95
    assert report.linear.top1 > 0.93
    assert report.knn.k == 20
    assert report.classes == 10
    assert report.n_train + report.n_test == 1797
    assert report.n_test == pytest.approx(0.2 * 1797, abs=6)


def test_accuracies_are_those_of_the_classes_together(digits):
    report = probe(*digits)
    for name in ("knn", "linear"):
        right = sum(getattr(row, name) * row.n_test for row in report.per_class)
        assert right / report.n_test == pytest.approx(getattr(report, name).top1)
    assert sum(row.n_train for row in report.per_class) == report.n_train
    assert sum(row.n_test for row in report.per_class) == report.n_test


@pytest.mark.parametrize("apart", [0.15, 0.5])
def test_the_linear_probe_is_as_good_as_scikit_learns_own_search(apart):
    vectors, labels = blobs(3000, apart=apart)
    split = ["train"] * 2000 + ["test"] * 1000
    ours = probe(vectors, labels, split=split).linear.top1
    full = LogisticRegressionCV(
        Cs=np.logspace(-2, 4, 7),
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
        l1_ratios=(0,),
        use_legacy_attributes=False,
        scoring="accuracy",
        max_iter=2000,
    ).fit(vectors[:2000], labels[:2000])
    theirs = full.score(vectors[2000:], labels[2000:])
    assert ours > theirs - 0.02


def test_axes_of_tiny_variance_are_learnt_all_the_same():
    """Features of an untrained network: everything lies near one direction, and what tells classes apart is small."""
    random = np.random.default_rng(0)
    classes = np.arange(2000) % 4
    shifts = random.standard_normal((4, 64)) * 1e-3
    vectors = unit(10 + random.standard_normal(64) + random.standard_normal((2000, 1)) * 0.5
                   + shifts[classes] * 3 + random.standard_normal((2000, 64)) * 1e-3)  # fmt: skip
    assert (linear_guess(vectors[:1600], classes[:1600], vectors[1600:], c=1.0) == classes[1600:]).mean() > 0.95


def test_a_split_is_obeyed():
    vectors, labels = blobs(60)
    split = ["train", "test", "test"] * 20
    report = probe(vectors, labels, split=split)
    assert (report.n_train, report.n_test) == (20, 40)
    assert report.knn.k == 4, "the smallest class has four training images"


def test_the_held_out_part_is_stratified_and_seeded():
    vectors, labels = blobs(500, apart=0.1)
    first, again, other = (probe(vectors, labels, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert {row.n_test for row in first.per_class} == {20}


def test_two_images_of_each_class_suffice():
    vectors, labels = blobs(10, apart=3.0)
    report = probe(vectors, labels)
    assert (report.n_train, report.n_test, report.knn.k) == (5, 5, 1)
    assert report.linear.c == probing.UNSEARCHED_STRENGTH


def test_a_class_with_one_image_is_left_out_and_named():
    vectors, labels = blobs(50)
    notes = []
    report = probe(vectors, [*labels[:-1], "lonely"], note=notes.append)
    assert report.n_train + report.n_test == 49
    assert "lonely" not in {row.label for row in report.per_class}
    assert any("lonely" in note for note in notes)


def test_a_class_that_is_only_tested_counts_as_wrong_and_is_named():
    vectors, labels = blobs(50)
    labels[0] = "unseen"
    notes = []
    report = probe(vectors, labels, split=["test"] + ["train"] * 39 + ["test"] * 10, note=notes.append)
    row = next(row for row in report.per_class if row.label == "unseen")
    assert (row.n_train, row.n_test, row.knn, row.linear) == (0, 1, 0.0, 0.0)
    assert any("unseen" in note for note in notes)


def test_a_class_that_is_only_trained_has_no_accuracy():
    vectors, labels = blobs(50, n_classes=5)
    labels[:10] = ["extra"] * 10
    report = probe(vectors, labels, split=["train"] * 40 + ["test"] * 10)
    row = next(row for row in report.per_class if row.label == "extra")
    assert (row.n_train, row.n_test, row.knn, row.linear) == (10, 0, None, None)


def test_one_label_for_all_is_an_error():
    vectors, _ = blobs(20)
    with pytest.raises(DinosearchError, match="two classes"):
        probe(vectors, ["cat"] * 20)


def test_single_images_only_are_an_error():
    vectors, _ = blobs(20)
    with pytest.raises(DinosearchError, match="Label more"):
        probe(vectors, [str(i) for i in range(20)])


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_split_without_one_part_is_an_error(part):
    vectors, labels = blobs(20)
    with pytest.raises(DinosearchError, match="split"):
        probe(vectors, labels, split=[part] * 20)


def test_equal_vectors_and_separable_classes_pass_without_a_warning():
    same = unit(np.ones((40, 8)))
    apart, labels = blobs(400, apart=20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(same, ["a", "b"] * 20).n_test == 8
        assert probe(apart, labels).linear.top1 == 1.0


def test_more_classes_than_dimensions():
    vectors, labels = blobs(1200, n_classes=200, dim=24, apart=4.0)
    report = probe(vectors, labels)
    assert report.classes == 200
    assert report.knn.top1 > 0.8
    assert report.linear.top1 > 0.8


def test_folds_are_balanced_and_never_hold_out_the_only_image_of_a_class():
    classes = np.array([0] * 30 + [1] * 7 + [2] * 2 + [3])
    folds = probing._folds(classes, seed=0)
    assert folds[-1] == -1
    assert folds[:-1].min() == 0
    for members in (slice(0, 30), slice(30, 37), slice(37, 39)):
        counts = np.bincount(folds[members], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert np.ptp(np.bincount(folds[:-1])) <= 1


def test_the_search_sees_every_class_of_a_large_set():
    classes = np.array([0] * 40_000 + [1] * 300 + [2] * 3)
    rows = probing._sample(classes, seed=0)
    counts = np.bincount(classes[rows])
    assert counts[2] == 3
    assert counts[1] == pytest.approx(300 * 9000 / 40_303, abs=1)
    assert len(set(rows.tolist())) == len(rows)
    assert len(rows) == pytest.approx(9000, abs=10)


def test_the_search_prefers_a_weaker_penalty_for_more_data_of_less_noise():
    chosen = []
    for n, apart in itertools.product((40, 4000), (0.3, 2.0)):
        vectors, labels = blobs(n, apart=apart)
        chosen.append(probing._search_strength(vectors, np.array([int(x[1:]) for x in labels]), seed=0))
    assert set(chosen) <= set(probing.STRENGTHS)
    assert len(set(chosen)) > 1


@pytest.mark.slow
def test_seventy_thousand_images_take_less_than_three_minutes():
    import time

    vectors, labels = blobs(70_000, dim=384, n_classes=10, apart=0.1)
    began = time.monotonic()
    report = probe(vectors, labels)
    assert time.monotonic() - began < 180
    assert report.n_train + report.n_test == 70_000
