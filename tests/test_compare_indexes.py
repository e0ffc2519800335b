"""Comparisons of indexes on labelled images, against hand-made cases and scipy's and numpy's definitions."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.index.contents import IndexedFile
from dinosearch.query.compare import bootstrap_interval, compare, holm, mcnemar
from dinosearch.query.probe import probe

N = 200


@pytest.fixture
def catalog(tmp_path):
    """Indexed files, a CSV that labels them with three classes, and vectors that tell these apart."""
    root = tmp_path / "catalog"
    files = [IndexedFile(root / f"{i:03}.jpg", f"{i:03}.jpg", root, row=i) for i in range(N)]
    lines = "\n".join(f"catalog/{i:03}.jpg,{'abc'[i % 3]}" for i in range(N))
    (tmp_path / "labels.csv").write_text(f"path,label\n{lines}\n")
    return files, tmp_path / "labels.csv", vectors_of(0.4)


def vectors_of(noise, *, seed=0):
    random = np.random.default_rng(seed)
    vectors = np.eye(3, 8)[np.arange(N) % 3] + noise * random.standard_normal((N, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_good_vectors_are_better_than_noise(catalog):
    files, labels, good = catalog
    found = compare(labels, [("good", files, good), ("noise", files, vectors_of(30.0))])
    assert [difference.probe for difference in found.differences] == ["knn", "linear"]
    for difference in found.differences:
        assert difference.better == "good"
        assert 0 < difference.low <= difference.difference <= difference.high
    assert (found.n_train, found.n_test, found.classes) == (161, 39, 3)


def test_each_accuracy_is_what_probe_says(catalog):
    files, labels, good = catalog
    vectors = {"good": good, "noisy": vectors_of(1.5)}
    found = compare(labels, [(name, files, each) for name, each in vectors.items()], seed=4)
    for accuracy in found.indexes:
        report = probe(vectors[accuracy.index], ["abc"[i % 3] for i in range(N)], seed=4)
        assert (accuracy.knn, accuracy.linear) == (report.knn.top1, report.linear.top1)
    knn, _ = found.differences
    assert knn.difference == pytest.approx(found.indexes[0].knn - found.indexes[1].knn)


def test_of_equal_indexes_the_data_cannot_tell(catalog):
    files, labels, good = catalog
    found = compare(labels, [("a", files, good), ("b", files, good), ("c", files, good)])
    assert len(found.differences) == 2 * 3
    assert all(d.better is None and d.p == 1 and d.low == d.high == 0 for d in found.differences)


def test_images_that_are_not_in_all_indexes_are_left_out_and_counted(catalog):
    files, labels, good = catalog
    labels.write_text(labels.read_text() + "catalog/nowhere.jpg,a\n")
    fewer = [*files[30:120], *files[121:]][::-1]
    found = compare(labels, [("all", files, good), ("some", fewer, np.delete(good[30:], 90, axis=0)[::-1])])
    assert (found.left_out, found.unmatched) == (31, 1)
    assert found.n_train + found.n_test == N - 31
    assert all(d.only_first == d.only_second == 0 for d in found.differences)  # in another order, the same vectors


def test_files_are_compared_by_their_first_page_where_an_index_has_more(catalog):
    files, labels, good = catalog
    pages = [replace(file, frame=frame) for file in files for frame in range(2)]
    vectors = np.stack([good, vectors_of(30.0)], axis=1).reshape(2 * N, -1)  # pages of a file side by side
    found = compare(labels, [("first", files, good), ("pages", pages, vectors)])
    assert (found.left_out, found.n_train + found.n_test) == (0, N)
    assert all(d.only_first == d.only_second == 0 for d in found.differences)


def test_the_split_of_the_csv_is_used(catalog):
    files, labels, good = catalog
    lines = "\n".join(f"catalog/{i:03}.jpg,{'abc'[i % 3]},{'test' if i < 50 else 'train'}" for i in range(N))
    labels.write_text(f"path,label,split\n{lines}\n")
    found = compare(labels, [("a", files, good), ("b", files, good)])
    assert (found.n_train, found.n_test) == (150, 50)


def test_two_different_indexes_are_needed_that_share_images(catalog):
    files, labels, good = catalog
    for indexes in ([("a", files, good)], [("a", files, good)] * 2):
        with pytest.raises(UsageError, match="two different"):
            compare(labels, indexes)
    with pytest.raises(DinosearchError, match="in all of a, b"):
        compare(labels, [("a", files[:100], good[:100]), ("b", files[100:], good[100:])])


@pytest.mark.parametrize("counts", [(0, 0), (3, 3), (1, 9), (12, 2)])
def test_mcnemar_is_the_two_sided_binomial(counts):
    n = sum(counts)
    outcomes = [comb(n, k) / 2**n for k in range(n + 1)]
    as_odd = [share for share in outcomes if share <= outcomes[counts[0]] * (1 + 1e-7)]
    assert mcnemar(*counts) == pytest.approx(sum(as_odd))


def test_holm_multiplies_by_the_tests_that_are_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_interval_is_that_of_images_drawn_anew():
    outcomes = np.repeat([1, -1, 0], [9, 3, 28])
    random = np.random.default_rng(1)
    drawn = np.array([random.choice(outcomes, 40).mean() for _ in range(4000)])
    low, high = bootstrap_interval(9, 3, n=40, seed=0)
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.026)  # one image is 0.025


def test_verdicts_follow_the_corrected_p(catalog):
    files, labels, good = catalog
    vectors = [("a", files, good), ("b", files, vectors_of(30.0)), ("c", files, vectors_of(30.0, seed=1))]
    knn = [d for d in compare(labels, vectors).differences if d.probe == "knn"]
    assert [(d.first, d.second) for d in knn] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [d.better for d in knn] == ["a", "a", None]
    assert all(d.p >= mcnemar(d.only_first, d.only_second) for d in knn)
