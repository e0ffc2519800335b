from dataclasses import replace

import faiss
import numpy as np
import pytest
from stores import brute_force, clustered, unit_vectors

from dinosearch.index import faiss_type
from dinosearch.index.exact import unit_blocks
from dinosearch.index.faiss_type import (
    add,
    build,
    candidate_types,
    fewest_directions,
    held_out_queries,
    lay_neighbours_together,
    measure,
    true_tenth,
    tune,
    tuned_type,
    within_reach,
)
from dinosearch.index.reader import norms, unit
from dinosearch.index.stored import GraphStored

N, DIM = 3000, 64
GRAPH, LISTS = "IDMap,HNSW16_SQfp16", "PCAR16,IVF32,PQ16x4fsr"
REDUCED = "IDMap,PCA32,HNSW16_SQfp16,Refine(SQfp16)"


@pytest.fixture(scope="module", params=[GRAPH, REDUCED, LISTS])
def stored(request):
    """Of 3,000 vectors, without those that are held out."""
    halves, ids = clustered(N, DIM).astype(np.float16), np.arange(N) * 3 + 5
    return build(request.param, ids, halves, norms(halves.astype(np.float32)), held_out=held_out_queries(N))


@pytest.fixture(scope="module")
def others():
    """Positions of what the index holds."""
    return np.delete(np.arange(N), held_out_queries(N))


@pytest.fixture(scope="module")
def asked(stored, others):
    """The held-out vectors and their truth."""
    queries = stored.rows(held_out_queries(N))
    return queries, true_tenth(queries, unit_blocks(stored.halves[others]), len(others))


def test_types_follow_the_number_of_vectors_and_the_memory():
    quarter, half = "PCAR96,IVF4096,PQ96x4fsr", "PCAR192,IVF4096,PQ192x4fsr"
    reduced = "IDMap,PCA96,HNSW16_SQfp16,Refine(SQfp16)"
    assert candidate_types(1_000_000, 384, max_memory=500 << 20) == [quarter, half]
    assert candidate_types(1_000_000, 384, kept=96, max_memory=2 * 10**9) == [reduced, GRAPH]
    assert candidate_types(1_000_000, 384, kept=96, max_memory=10**9) == [GRAPH]
    assert candidate_types(1_000_000, 384, max_memory=10**9) == [GRAPH]
    assert candidate_types(200_000, 384, max_memory=10**8) == ["PCAR96,IVF2048,PQ96x4fsr", "PCAR192,IVF2048,PQ192x4fsr"]
    assert candidate_types(1_000_000, 384, max_memory=80 << 20) == [quarter]
    assert candidate_types(1_000_000, 384, max_memory=1 << 20) == []
    assert candidate_types(1_000_000, 3, max_memory=10**9) == []


def few_directions(n, dim, kept, *, rest=0.003, seed=0):
    """Unit vectors that vary evenly in `kept` random directions, and by little in all others."""
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.standard_normal((dim, dim)))
    sizes = np.where(np.arange(dim) < kept, 1.0, rest)
    return unit(((random.standard_normal((n, dim)) * sizes) @ turn).astype(np.float16))


@pytest.mark.parametrize(("varied", "kept"), [(10, 16), (24, 32), (40, None)])
def test_so_many_directions_are_kept_as_the_vectors_vary_in(varied, kept):
    halves = few_directions(4000, DIM, varied).astype(np.float16)
    assert fewest_directions(halves, recall=0.95) == kept
    assert fewest_directions(few_directions(4000, DIM, varied, rest=0.5).astype(np.float16), recall=0.95) is None
    assert fewest_directions(halves[:10], recall=0.95) is None


def test_vectors_of_few_directions_get_a_graph_over_these_and_exact_scores():
    halves = few_directions(N, DIM, 12).astype(np.float16)
    lengths = norms(halves.astype(np.float32))
    ids = np.arange(N) * 2 + 1
    found, measured = tuned_type(ids, halves, lengths, recall=0.9, max_memory=None, note=pytest.fail)
    assert found.kind == "IDMap,PCA16,HNSW16_SQfp16,Refine(SQfp16)"
    assert measured.recall_at_10 >= 0.9
    queries = few_directions(200, DIM, 12)
    near = found.search(queries, 10)
    exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), unit(halves).astype(np.float64)[near.positions])
    assert np.allclose(near.scores, exact, rtol=0, atol=3e-7)
    assert np.array_equal(near.ids, ids[near.positions])
    _, scores = brute_force(unit(halves), queries, 10)
    best = -np.sort(-near.scores, axis=1)[:, :10]
    assert (best >= scores[:, 9:] - 1e-6).mean() >= 0.88
    many = found.search(queries[:3], 100)
    assert many.positions.shape[1] == 120
    assert len(np.unique(many.positions[0])) == 120


@pytest.mark.parametrize("name", [GRAPH, REDUCED])
@pytest.mark.parametrize("step", [1, 3])
def test_single_queries_by_the_quick_way_find_what_a_batch_finds(name, step):
    halves, ids = clustered(N, DIM).astype(np.float16), np.arange(N) * step + 5
    graph = build(name, ids, halves, norms(halves.astype(np.float32)), held_out=np.empty(0, np.int64))
    graph = replace(graph, effort=40, rerank=graph.reranks[-1])
    queries = clustered(30, DIM, seed=8)
    for k in (1, 10, 37):
        single, batch = graph.single_search(k), graph.search(queries, k)
        for row, query in enumerate(queries):
            found, scores = single(query[None])
            order = np.lexsort((batch.ids[row], -batch.scores[row]))[:k]
            assert np.array_equal(found, batch.ids[row][order])
            assert np.array_equal(scores, batch.scores[row][order])
            exact = unit(halves)[(found - 5) // step].astype(np.float64) @ query
            assert np.allclose(scores, exact, rtol=0, atol=3e-7)
    with pytest.raises(ValueError, match="a query is"):
        graph.single_search(10)(queries[:1, :10].copy())
    lengths = norms(halves[:100].astype(np.float32))
    half = build(name, ids[:100], halves[:100], lengths, held_out=np.arange(1, 100, 2))
    found, scores = replace(half, effort=128, rerank=12).single_search(60)(queries[:1])
    assert np.isin(found[:45], ids[:100:2]).all()
    assert np.all(np.diff(scores[:45]) <= 0)
    assert np.array_equal(found[50:], [-1] * 10), "fewer than were asked for"
    assert np.all(scores[50:] == -np.inf)


def test_what_is_held_out_is_not_found_before_it_is_added(stored, others):
    assert stored.index.ntotal == len(others)
    halves, ids = clustered(600, DIM, seed=3).astype(np.float16), np.arange(600) + 7
    held_out = held_out_queries(600)
    own = build(stored.kind, ids, halves, norms(halves.astype(np.float32)), held_out=held_out)
    queries = own.rows(held_out)
    most = own.efforts[-1]
    assert not np.isin(own.candidates(queries, 10, effort=most), held_out).any()
    add(own, held_out)
    assert own.index.ntotal == 600
    found = own.candidates(queries, 10, effort=most)
    assert np.mean([position in near for position, near in zip(held_out, found, strict=True)]) > 0.85


def link_gaps(index):
    """How far apart in memory the ends of the lowest level's links lie."""
    graph = faiss_type._graph_of(index)
    begin = faiss.vector_to_array(graph.hnsw.offsets)[: graph.ntotal].astype(int)
    links = faiss.vector_to_array(graph.hnsw.neighbors)[begin[:, None] + np.arange(graph.hnsw.nb_neighbors(0))]
    return np.abs(links - np.arange(graph.ntotal)[:, None])[links >= 0]


@pytest.mark.parametrize("name", [GRAPH, REDUCED])
def test_neighbours_laid_together_are_found_as_before_and_lie_nearer(name, monkeypatch):
    monkeypatch.setattr(faiss_type, "_WALKED", 100)  # more than one part, in most rounds
    halves, ids = clustered(N, DIM).astype(np.float16), np.random.default_rng(0).permutation(N * 3)[:N]
    ids.sort()
    graph = build(name, ids, halves, norms(halves.astype(np.float32)), held_out=np.arange(0, N, 50))
    asked = graph.rows(np.arange(0, N, 50))
    before, products, gaps = *graph.index.search(asked, 10)[::-1], link_gaps(graph.index)
    lay_neighbours_together(graph.index)
    after, products_after = graph.index.search(asked, 10)[::-1]
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(products_after, products)
    after_gaps = link_gaps(graph.index)
    assert len(after_gaps) == len(gaps)
    assert after_gaps.mean() < 0.8 * gaps.mean()
    add(graph, np.arange(0, N, 50))
    assert np.mean(graph.candidates(asked, 1, effort=128)[:, 0] == np.arange(0, N, 50)) > 0.95


@pytest.mark.parametrize(("max_memory", "laid"), [(1_000_000, 0), (2_000_000, 1)])
def test_neighbours_are_laid_together_where_memory_holds_the_graph_twice(max_memory, laid, monkeypatch):
    calls = []
    monkeypatch.setattr(faiss_type, "lay_neighbours_together", calls.append)
    halves = clustered(N, DIM).astype(np.float16)  # a graph of 876,000 bytes
    lengths = norms(halves.astype(np.float32))
    found = tuned_type(np.arange(N), halves, lengths, recall=0.5, max_memory=max_memory, note=print)
    assert found is not None
    assert found[0].kind == GRAPH
    assert len(calls) == laid


def test_a_graph_without_vectors_is_laid_as_it_is():
    empty = faiss.index_factory(DIM, GRAPH, faiss.METRIC_INNER_PRODUCT)
    lay_neighbours_together(empty)
    assert empty.ntotal == 0


def test_the_true_tenth_is_that_of_brute_force(stored, others, asked):
    queries, truth = asked
    _, scores = brute_force(unit(stored.halves[others]), queries, 10)
    assert np.allclose(truth, scores[:, 9], atol=1e-6)


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.98])
def test_what_is_tuned_meets_its_target_against_brute_force(stored, others, asked, recall):
    queries, truth = asked
    tuned = tune(stored, queries[::2], truth=truth[::2], recall=recall)
    assert measure(tuned, queries[::2], truth=truth[::2]).recall_at_10 >= recall
    new = clustered(200, DIM, seed=4)
    _, scores = brute_force(unit(stored.halves[others]), new, 10)
    shares = []
    for query, tenth in zip(new, scores[:, 9], strict=True):
        found = tuned.search(query[None], 10).positions[0]
        shares.append(min(10, (stored.rows(found[found >= 0]) @ query >= tenth - 1e-6).sum()) / 10)
    assert np.mean(shares) >= recall - 0.03


def test_a_higher_target_costs_no_less(stored, asked, monkeypatch):
    # a clock that no other work disturbs
    monkeypatch.setattr(faiss_type, "_seconds", lambda pair, _queries: [pair.effort * pair.rerank])
    queries, truth = asked
    low, high = (tune(stored, queries, truth=truth, recall=recall) for recall in (0.6, 0.98))
    assert low.effort * low.rerank <= high.effort * high.rerank


def test_a_target_out_of_reach_gives_nothing(stored, asked):
    queries, truth = asked
    assert tune(stored, queries, truth=truth, recall=1.01) is None


def test_recall_is_measured_not_assumed(asked, stored):
    queries, truth = asked
    rough = replace(stored, effort=1, rerank=stored.reranks[0])
    shares = []
    for query, tenth in zip(queries, truth, strict=True):
        found = rough.search(query[None], 10).positions[0]
        shares.append(min(10, (stored.rows(found[found >= 0]) @ query >= tenth - 1e-6).sum()) / 10)
    assert 0.05 < np.mean(shares) < 0.999
    assert measure(rough, queries, truth=truth).recall_at_10 == pytest.approx(np.mean(shares), abs=0.01)


def test_a_single_vector_can_be_measured():
    halves = unit_vectors(1, 16).astype(np.float16)
    assert true_tenth(unit(halves), unit_blocks(halves), 1) == pytest.approx(1)


def test_a_small_graph_tells_that_a_large_one_is_not_worth_building(monkeypatch):
    monkeypatch.setattr(faiss_type, "PROBED", 2000)
    halves = unit_vectors(10_000, DIM).astype(np.float16)
    lengths = norms(halves.astype(np.float32))
    assert within_reach(GRAPH, halves, lengths, recall=0.99)
    monkeypatch.setattr(GraphStored, "efforts", [12])
    assert not within_reach(GRAPH, halves, lengths, recall=0.99)
    assert within_reach(GRAPH, halves[:9000], lengths[:9000], recall=0.99)  # too few to ask
    assert within_reach(LISTS, halves, lengths, recall=0.99)
