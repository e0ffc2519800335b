import numpy as np
import pytest
from stores import brute_force, clustered, unit_vectors

from dinosearch.index.exact import unit_blocks
from dinosearch.index.faiss_type import build, candidate_types, held_out_queries, measure, true_tenth, tune
from dinosearch.index.reader import unit
from dinosearch.index.stored import TunedStored

N = 3000


@pytest.fixture(scope="module")
def stored():
    halves, ids = clustered(N, 64).astype(np.float16), np.arange(N) * 3 + 5
    return TunedStored(
        "PCAR16,IVF32,PQ16x4fsr",
        ids,
        halves,
        build("PCAR16,IVF32,PQ16x4fsr", ids, halves, held_out=held_out_queries(N)),
    )


@pytest.fixture(scope="module")
def queries(stored):
    """Positions and truth of the held-out vectors."""
    own = held_out_queries(N)
    return own, true_tenth(stored.rows(own), unit_blocks(stored.halves), N)


def test_types_follow_the_number_of_vectors_and_the_memory():
    quarter, half = "PCAR96,IVF4096,PQ96x4fsr", "PCAR192,IVF4096,PQ192x4fsr"
    assert candidate_types(1_000_000, 384, max_memory=10**9) == [quarter, half]
    assert candidate_types(200_000, 384, max_memory=10**9)[0] == "PCAR96,IVF2048,PQ96x4fsr"
    assert candidate_types(1_000_000, 384, max_memory=80 << 20) == [quarter]
    assert candidate_types(1_000_000, 384, max_memory=1 << 20) == []
    assert candidate_types(1_000_000, 3, max_memory=10**9) == []


def test_the_true_tenth_does_not_count_the_query_itself(stored, queries):
    own, truth = queries
    vectors = unit(stored.halves)
    _, scores = brute_force(vectors, vectors[own], 11)
    assert np.allclose(truth, scores[:, 10], atol=1e-6)


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
def test_what_is_tuned_meets_its_target_against_brute_force(stored, queries, recall):
    own, truth = queries
    tuned = tune(stored, own=own[::2], truth=truth[::2], recall=recall)
    assert measure(tuned, own[::2], truth=truth[::2]).recall_at_10 >= recall
    asked = clustered(200, 64, seed=4)
    order, _ = brute_force(unit(stored.halves), asked, 10)
    shares = [
        len(set(tuned.search(query[None], 10)[0]) & set(best)) / 10 for query, best in zip(asked, order, strict=True)
    ]
    assert np.mean(shares) >= recall - 0.03


def test_a_higher_target_costs_no_less(stored, queries):
    own, truth = queries
    low, high = (tune(stored, own=own, truth=truth, recall=recall) for recall in (0.6, 0.99))
    assert low.nprobe * low.rerank < high.nprobe * high.rerank


def test_a_target_out_of_reach_gives_nothing(stored, queries):
    own, truth = queries
    assert tune(stored, own=own, truth=truth, recall=1.01) is None


def test_recall_is_measured_not_assumed(stored, queries):
    own, truth = queries
    rough = TunedStored(stored.kind, stored.ids, stored.halves, stored.index, nprobe=1, rerank=40)
    vectors = unit(stored.halves)
    order, _ = brute_force(vectors, vectors[own], 11)
    shares = []
    for position, best in zip(own, order, strict=True):
        found = set(rough.search(vectors[position][None], 11)[0])
        shares.append(len(found & set(best) - {position}) / 10)
    assert 0.05 < np.mean(shares) < 0.98
    assert measure(rough, own, truth=truth).recall_at_10 == pytest.approx(np.mean(shares), abs=0.01)


def test_a_single_vector_can_be_measured():
    halves = unit_vectors(1, 16).astype(np.float16)
    assert true_tenth(unit(halves), unit_blocks(halves), 1) == pytest.approx(1)
