"""Which FAISS type suits so many vectors, trained on a sample and tuned until it finds what it should.

Below EXACT_BELOW vectors everything is compared with everything. Above it a graph of neighbours is walked (HNSW) over
the few directions in which the vectors vary most, two bytes for each, and the best candidates are compared by the
stored numbers (`PCA{m},HNSW16_SQfp16,Refine(SQfp16)`). How few, a sample tells: the walk is to lose next to nothing by
them. Where half do not suffice, or the target is missed, it is a graph of the whole vectors. Graph and codes are mapped
from the file, so a reader needs next to no memory of its own. Where memory does not suffice to build that, an inverted
file of 4-bit product codes is scanned: of the quarter of the directions that varies most, turned at random, half of a
byte for each (`PCAR{m},IVF{nlist},PQ{m}x4fsr`); with half of the directions if that is not enough. Measured on one core
with a million embeddings of 384 numbers: docs/benchmarks.md.

Protocol of the tuning: N_QUERIES stored vectors, drawn at random, are held out: neither trained on nor added. They are
asked for, as new images would be, and their 10 nearest among the others come from brute force. On one half of them the
settings are found that reach the target with a standard error to spare, and of these the one that answers fastest
here. Recall and latency are then measured on the other half; if that falls short, more is asked of the first. Then
the held-out vectors are added too. Recall counts what is found that scores no less than the true tenth: equal vectors
are equally right.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from dinosearch.images.machine import memory_bytes
from dinosearch.index.exact import BLOCK, nearest
from dinosearch.index.reader import unit
from dinosearch.index.stored import GraphStored, Stored, TunedStored, tuned_class

EXACT_BELOW = 100_000
"""Vectors: comparing so many of 384 numbers took 6 ms on one core, 50,000 took 3 ms, not worth a training."""
RECALL = 0.95
"""Share of the 10 nearest that a tuned type finds, unless told otherwise."""
N_QUERIES = 2000
K = 10
PROBED = 20_000
"""Vectors of the graph that tells whether a larger one is worth building: made in a few seconds."""
_PROBE_REPAYS = 5  # times as many vectors are to be built
_PROBES = 200  # queries
_PROBE_MARGIN = 0.02  # of recall: what so few queries may miss by chance
_NEAREST = 1e-6  # scores nearer than float32 products can tell apart
_LEAST_DIM = 8
_LINKS = 16  # of each vector in the graph: more made no better one, and take longer and more room
_EF_CONSTRUCTION = 150  # of 60, 150: 0.943 and 0.953 of the 10 nearest of 300,000 found at efSearch 16, in 28 and 58 s
_GRAPH_BYTES = 4 * (2 * _LINKS + 3) + 24  # of each vector, beside its codes: links, level, id
_LEAST_KEPT = 4  # directions
_POINTS_PER_LIST = 64  # training vectors: more made no better lists, and take longer
_CODE_POINTS = 65536  # training vectors of the codes
_SUPER_KMEANS = (1024, 128)  # from so many lists and numbers per vector on it is faster
_STANDARD_ERRORS = 1  # to spare; the other half, which has to reach the target too, is the second safeguard
_TUNINGS = 3  # of a type, before it is given up
_TIMED = 60  # queries of each pair
_KEPT = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # directions: multiples of what a register holds
_REDUCED_CANDIDATES = (12, 24)  # of so many by few directions the 10 nearest are chosen: fewer are tried first
_MISSED_BY_DIRECTIONS = 0.1  # of what may be missed; the walk misses the rest
_WALKED = 16384  # vectors whose neighbours are gathered at a time: 2 MB of links
_SHARE_OF_MEMORY = 0.25  # of the machine's, for what FAISS cannot map


@dataclass(frozen=True)
class Measured:
    """What a generation does."""

    recall_at_10: float
    p50_ms: float
    p95_ms: float


def tuned_type(
    ids: np.ndarray,
    halves: np.ndarray,
    norms: np.ndarray,
    *,
    recall: float,
    max_memory: int | None,
    note: Callable[[str], None],
) -> tuple[TunedStored, Measured] | None:
    """The first type that reaches the target on both halves of the held-out vectors; None, and said so, without.

    ids int64 [n], vectors float16 [n, dim] and their lengths float32 [n]; max_memory as in `candidate_types`.
    """
    budget = _budget(max_memory)
    n, dim = halves.shape
    names = candidate_types(n, dim, kept=fewest_directions(halves, recall=recall), max_memory=budget)
    promising = [name for name in names if within_reach(name, halves, norms, recall=recall)]
    if promising:
        held_out = held_out_queries(len(ids))
        queries = unit(halves[held_out])
        others = (unit(block) for block in _blocks_without(halves, held_out))
        truth = true_tenth(queries, others, len(halves) - len(held_out))
    for name in promising:
        built = build(name, ids, halves, norms, held_out=held_out)
        if _is_graph(name) and 2 * _graph_bytes(name, n, dim) <= budget:
            lay_neighbours_together(built.index)
        asked = recall
        for _ in range(_TUNINGS):
            tuned = tune(built, queries[::2], truth=truth[::2], recall=asked)
            if tuned is None:
                break
            measured = measure(tuned, queries[1::2], truth=truth[1::2])
            if measured.recall_at_10 >= recall:
                add(tuned, held_out)
                return tuned, measured
            asked += recall - measured.recall_at_10  # what held for one half did not for the other: ask for more
        del built, tuned  # the next one may take as much memory
    for name in names:
        note(f"{name} does not find {recall:.0%} of the 10 nearest of these vectors")
    note("every query is compared with all vectors" + ("" if names else ": too little memory for anything quicker"))
    return None


def candidate_types(n: int, dim: int, *, kept: int | None = None, max_memory: int | None = None) -> list[str]:
    """FAISS factory strings to try in turn, quickest first; none where only exact search is left.

    Where the graph of whole vectors fits no lists are tried: vectors in which it misses the target have no order for
    lists either. kept: directions that a graph may do with, as `fewest_directions` says. max_memory: bytes that
    building, or a reader's private memory, may take; by default a quarter of the machine's.
    """
    nlist = 1 << max(4, round(np.log2(4 * n**0.5)))
    budget = _budget(max_memory)
    whole = f"HNSW{_LINKS}_SQfp16"
    graphs = [f"IDMap,PCA{kept},{whole},Refine(SQfp16)"] if kept is not None else []
    graphs += [f"IDMap,{whole}"] if dim >= _LEAST_DIM else []
    names = [name for name in graphs if _graph_bytes(name, n, dim) <= budget]
    if graphs and names[-1:] == graphs[-1:]:
        return names
    for share in (4, 2):
        coded = dim // share
        if coded >= _LEAST_KEPT and n * (coded / 2 + 8) + 4 * coded * (nlist + dim) <= budget:
            names.append(f"PCAR{coded},IVF{nlist},PQ{coded}x4fsr")
    return names


def fewest_directions(halves: np.ndarray, *, recall: float) -> int | None:
    """So many of the directions in which vectors vary most let a graph find what it is to find; None if half do not.

    Asked of a sample by brute force: are the 10 nearest, but for a tenth of what may be missed, among a few more that
    are nearest by these directions alone? Among many vectors the nearest are nearer to each other, so that more have
    to be compared again: `tune` finds how many.
    """
    n, dim = halves.shape
    random = np.random.default_rng(3)
    sample = unit(halves[np.sort(random.choice(n, min(n, PROBED), replace=False))])
    asked = random.choice(len(sample), min(_PROBES, len(sample) // 20), replace=False)
    others = np.delete(sample, asked, axis=0)
    if len(asked) == 0 or len(others) <= _REDUCED_CANDIDATES[-1]:
        return None
    _, directions = np.linalg.eigh(np.cov(others.T))  # [dim, dim], those of most variance last
    directions = directions[:, ::-1].astype(np.float32)
    queries, turned = sample[asked] @ directions, others @ directions
    products = queries @ turned.T  # [n_asked, n_others]
    tenth = np.partition(products, -K, axis=1)[:, -K, None]
    most_missed = (1 - recall) * _MISSED_BY_DIRECTIONS
    for n_candidates in _REDUCED_CANDIDATES:
        for kept in (kept for kept in _KEPT if 2 * kept <= min(dim, len(others))):
            scores = queries[:, :kept] @ turned[:, :kept].T
            near = np.argpartition(scores, -n_candidates, axis=1)[:, -n_candidates:]
            n_found = (np.take_along_axis(products, near, axis=1) >= tenth - _NEAREST).sum(axis=1)
            if 1 - np.minimum(n_found, K).mean() / K <= most_missed:
                return kept
    return None


def _is_graph(name: str) -> bool:
    return issubclass(tuned_class(name), GraphStored)


def _graph_bytes(name: str, n: int, dim: int) -> int:
    """What building a graph takes: links, and the numbers that it walks over and compares."""
    reduced = re.search(r"PCA(\d+)", name)
    numbers = dim + int(reduced[1]) if reduced else dim
    return n * (2 * numbers + _GRAPH_BYTES)


def _budget(max_memory: int | None) -> int:
    return int(memory_bytes() * _SHARE_OF_MEMORY) if max_memory is None else max_memory


def build(name: str, ids: np.ndarray, halves: np.ndarray, norms: np.ndarray, *, held_out: np.ndarray) -> TunedStored:
    """An index of stored vectors float16 [n, dim], under their ids, but for those at the positions `held_out`."""
    import faiss

    n, dim = halves.shape
    index: Any = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    random = np.random.default_rng(0)
    allowed = np.delete(np.arange(n), held_out)
    graph = _is_graph(name)
    wanted = _CODE_POINTS if graph else max(_CODE_POINTS, _POINTS_PER_LIST * faiss.extract_index_ivf(index).nlist)
    size = min(len(allowed), wanted)
    sample = unit(halves[np.sort(random.choice(allowed, size, replace=False))])
    random.shuffle(sample)
    if graph:
        _graph_of(index).hnsw.efConstruction = _EF_CONSTRUCTION
        index.train(sample)
        _without_bias(index)
    else:
        _train_lists(index, sample)
    stored = tuned_class(name)(name, ids, halves, norms, index)
    for start in range(0, n, BLOCK):
        positions = allowed[np.searchsorted(allowed, start) : np.searchsorted(allowed, start + BLOCK)]
        add(stored, positions)
    return stored


def add(stored: TunedStored, positions: np.ndarray) -> None:
    """Take in the vectors at some positions, under their ids."""
    # Not of unit length: of these numbers float16 codes lose nothing.
    stored.index.add_with_ids(stored.halves[positions].astype(np.float32), stored.ids[positions])


def lay_neighbours_together(index: Any) -> None:
    """Number a graph's vectors in the order of a breadth-first walk.

    Ids and links stay, and so what is found, but for ties. Neighbours then mostly lie in pages of memory that a search
    has just been in: 1.05 times the single queries of a million vectors (docs/benchmarks.md). It takes the graph's
    memory once more while it does so.
    """
    import faiss

    graph = _graph_of(index)
    n, n_links = graph.ntotal, graph.hnsw.nb_neighbors(0)
    if n == 0:
        return
    links = faiss.vector_to_array(graph.hnsw.neighbors)  # of all levels; a vector's begin with those of the lowest
    begin = faiss.vector_to_array(graph.hnsw.offsets)[:n].astype(np.int64)
    seen = np.zeros(n, bool)
    order = np.empty(n, np.int64)
    order[0] = graph.hnsw.entry_point
    seen[order[0]] = True
    done, found = 0, 1  # order[done:found] is still to be walked from
    while done < found:
        here = order[done : min(found, done + _WALKED)]
        done += len(here)
        near = links[begin[here, None] + np.arange(n_links)].ravel()
        near = near[near >= 0]
        near = near[~seen[near]]
        near = near[np.sort(np.unique(near, return_index=True)[1])]  # each once, in the order of those it is next to
        seen[near] = True
        order[found : found + len(near)] = near
        found += len(near)
    order[found:] = np.flatnonzero(~seen)
    graph.permute_entries(order)
    if hasattr(inner := faiss.downcast_index(index.index), "refine_index"):
        faiss.downcast_index(inner.refine_index).permute_entries(order)
    faiss.copy_array_to_vector(faiss.vector_to_array(index.id_map)[order], index.id_map)


def _graph_of(index: Any) -> Any:
    """The graph within an IndexIDMap, on its own or below directions and what compares its candidates again."""
    import faiss

    inner: Any = faiss.downcast_index(index.index)
    while not hasattr(inner, "hnsw"):
        inner = faiss.downcast_index(inner.base_index if hasattr(inner, "base_index") else inner.index)
    return inner


def _without_bias(index: Any) -> None:
    """Have a graph's directions be of the vectors as they are: products of centred ones are other products."""
    import faiss

    refine: Any = faiss.downcast_index(index.index)
    if hasattr(refine, "base_index"):
        reduced: Any = faiss.downcast_index(refine.base_index)
        projection: Any = faiss.downcast_VectorTransform(reduced.chain.at(0))
        projection.have_bias = False


def _train_lists(index: Any, sample: np.ndarray) -> None:
    """Directions, lists and codes of an inverted file, from unit vectors float32 [n, dim] in random order."""
    import faiss

    ivf: Any = faiss.extract_index_ivf(index)
    projection: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    projection.train(sample[:_CODE_POINTS])
    projection.have_bias = False  # products of centred vectors are other products
    sample = projection.apply(sample)  # [size, kept]
    ivf.quantizer.add(_centroids(sample, ivf.nlist))
    ivf.train(sample[:_CODE_POINTS])  # the lists are there: only the codes are left to learn
    index.is_trained = True


def within_reach(name: str, halves: np.ndarray, norms: np.ndarray, *, recall: float) -> bool:
    """Whether a graph of so many vectors may find what it should: of a few of them, its greatest effort does.

    Of more vectors the same effort finds no larger share. That saves building in vain, which takes minutes, where the
    vectors have no order, as random ones. What is built quickly is not asked about.
    """
    n = len(halves)
    if not _is_graph(name) or n < _PROBE_REPAYS * PROBED:
        return True
    some = np.sort(np.random.default_rng(2).choice(n, PROBED, replace=False))
    halves, norms = halves[some], norms[some]
    held_out = held_out_queries(PROBED, n_queries=_PROBES)
    queries, others = unit(halves[held_out]), unit(np.delete(halves, held_out, axis=0))
    stored = build(name, np.arange(PROBED), halves, norms, held_out=held_out)
    most = replace(stored, effort=stored.efforts[-1], rerank=stored.reranks[-1])
    measured = measure(most, queries, truth=true_tenth(queries, [others], len(others)))
    return measured.recall_at_10 >= recall - _PROBE_MARGIN


def held_out_queries(n: int, *, n_queries: int = N_QUERIES) -> np.ndarray:
    """Positions int64, rising, of the vectors that are asked for: evenly spaced ones may fall in step with the data."""
    return np.sort(np.random.default_rng(1).choice(n, min(n_queries, max(1, n // 20)), replace=False))


def tune(stored: TunedStored, queries: np.ndarray, *, truth: np.ndarray, recall: float) -> TunedStored | None:
    """The fastest setting that reaches the target, None where none does.

    queries: unit vectors float32 [n_queries, dim] that the index does not hold; truth: `true_tenth` of them.
    """
    pairs: list[TunedStored] = []
    for effort in stored.efforts:
        most = stored.most_candidates(effort)
        found = stored.candidates(queries, most, effort=effort)
        n_hits = _hits(stored, queries, found, truth).cumsum(axis=1)  # [n_queries, most]
        for rerank in [rerank for rerank in stored.reranks if rerank <= max(most, stored.reranks[0])]:
            shares = np.minimum(n_hits[:, min(rerank, most) - 1], K) / K
            if shares.mean() - _STANDARD_ERRORS * shares.std() / len(shares) ** 0.5 >= recall:
                pairs.append(replace(stored, effort=effort, rerank=rerank))
                break
        if len(pairs) == stored.enough:
            break
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    timed = queries[:_TIMED]
    return min(pairs, key=lambda pair: median(_seconds(pair, timed)))


def true_tenth(queries: np.ndarray, blocks: Iterable[np.ndarray], n: int) -> np.ndarray:
    """Score float32 [n_queries] of the tenth nearest of n vectors, or of the last where there are fewer.

    queries: float32 [n_queries, dim]. blocks: the vectors.
    """
    _, scores = nearest(queries, blocks, min(K, n))
    return scores.min(axis=1)


def measure(stored: Stored, queries: np.ndarray, *, truth: np.ndarray) -> Measured:
    """Recall and latency of queries float32 [n_queries, dim] asked for one by one; truth: their `true_tenth`."""
    k, seconds, shares = min(K, stored.index.ntotal), [], []
    for query, tenth in zip(queries, truth, strict=True):
        began = time.perf_counter()
        found = stored.search(query[None], k).positions[0]
        seconds.append(time.perf_counter() - began)
        scores = np.sort(stored.rows(found[found >= 0]) @ query)[-k:]
        shares.append(int((scores >= tenth - _NEAREST).sum()) / k)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return Measured(float(np.mean(shares)), round(float(p50), 4), round(float(p95), 4))


def _blocks_without(halves: np.ndarray, positions: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(halves), BLOCK):
        block = halves[start : start + BLOCK]
        yield np.delete(block, positions[(positions >= start) & (positions < start + len(block))] - start, axis=0)


def _centroids(sample: np.ndarray, nlist: int) -> np.ndarray:
    """Centres float32 [nlist, dim] of unit length, on the GPUs where there are some."""
    import faiss

    options = {"spherical": True, "niter": 10, "seed": 0, "max_points_per_centroid": _POINTS_PER_LIST}
    least_lists, least_dim = _SUPER_KMEANS
    dim = sample.shape[1]
    if faiss.get_num_gpus() > 0:
        kmeans = faiss.Kmeans(dim, nlist, gpu=True, **options)
    elif nlist >= least_lists and dim >= least_dim and hasattr(faiss, "SuperKmeans"):
        kmeans = faiss.SuperKmeans(dim, nlist, **options)
    else:
        kmeans = faiss.Kmeans(dim, nlist, min_points_per_centroid=1, **options)
    kmeans.train(sample)
    assert kmeans.centroids is not None
    return kmeans.centroids


def _hits(stored: TunedStored, queries: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """bool as found [n_queries, n]: whether each is as near as the true tenth."""
    hits = np.empty(found.shape, dtype=bool)
    for row, query in enumerate(queries):
        hits[row] = (stored.rows(found[row]) @ query >= truth[row] - _NEAREST) & (found[row] >= 0)
    return hits


def _seconds(stored: Stored, queries: np.ndarray) -> list[float]:
    """How long each query takes alone."""
    seconds = []
    for query in queries:
        began = time.perf_counter()
        stored.search(query[None], K)
        seconds.append(time.perf_counter() - began)
    return seconds
