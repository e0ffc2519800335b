"""Which FAISS type suits so many vectors, trained on a sample and tuned until it finds what it should.

Below EXACT_BELOW vectors everything is compared with everything. Above it an inverted file of 4-bit product codes is
scanned, and the best candidates are compared exactly. The codes are of the quarter of the directions that varies most,
turned at random (`PCAR{m},IVF{nlist},PQ{m}x4fsr`), half of a byte for each; with half of the directions if that is not
enough. Measured with 60,000 embeddings of 384 numbers, 48 of 512 lists, on one core of a busy machine: share of the 10
nearest among 40 candidates, and microseconds to find 400

    PQ96x4fs 0.86, 77 · PQ96x4fsr 0.90, 75 · PQ192x4fs 0.94, 94 · PQ192x4fsr 0.96, 96 · RaBitQfs 1.00, 299
    PCAR64,PQ64x4fsr 0.97, 62 · PCAR96,PQ96x4fsr 0.98, 71 · PCAR128,PQ128x4fsr 0.98, 73

Codes of vectors as they are (PQ96x4fs) did not find 95 % of a million's 10 nearest at all.

Protocol of the tuning: N_QUERIES stored vectors, evenly spaced, are kept out of the training sample and asked for, each
without itself. Their 10 nearest come from brute force. On one half of them the number of lists looked into (`nprobe`)
and of candidates compared exactly (`rerank`) are found: all pairs that reach the target with two standard errors to
spare, and of these the one that answers fastest here. Recall and latency are then measured on the other half. Recall
counts what is found that scores no less than the true tenth: equal vectors are equally right.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dinosearch.images.machine import memory_bytes
from dinosearch.index.exact import nearest, unit_blocks
from dinosearch.index.reader import unit
from dinosearch.index.stored import MOST_CANDIDATES, Stored, TunedStored

if TYPE_CHECKING:
    import faiss

EXACT_BELOW = 100_000
"""Vectors: comparing so many of 384 numbers took 6 ms on one core, 50,000 took 3 ms, not worth a training."""
RECALL = 0.95
"""Share of the 10 nearest that a tuned type finds, unless told otherwise."""
N_QUERIES = 1000
K = 10
_NEAREST = 1e-6  # scores nearer than float32 products can tell apart
_LEAST_KEPT = 4  # directions
_POINTS_PER_LIST = 64  # training vectors: more made no better lists, and take longer
_CODE_POINTS = 65536  # training vectors of the codes
_SUPER_KMEANS = (1024, 128)  # from so many lists and numbers per vector on it is faster
_RERANK = (40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1280)
_ENOUGH_PAIRS = 4  # beyond these, more lists were never faster
_STANDARD_ERRORS = 2  # to spare, so that other queries reach the target too
_TIMED = 60  # queries of each pair
_SHARE_OF_MEMORY = 0.25  # of the machine's, for what FAISS cannot map


@dataclass(frozen=True)
class Measured:
    """What a generation does."""

    recall_at_10: float
    p50_ms: float
    p95_ms: float


def candidate_types(n: int, dim: int, *, max_memory: int | None = None) -> list[str]:
    """FAISS factory strings to try in turn, quickest first; none where only exact search is left.

    max_memory: bytes of private memory a reader may need, by default a quarter of the machine's.
    """
    nlist = 1 << max(4, round(np.log2(4 * n**0.5)))
    budget = memory_bytes() * _SHARE_OF_MEMORY if max_memory is None else max_memory
    names = []
    for share in (4, 2):
        kept = dim // share
        if kept >= _LEAST_KEPT and n * (kept / 2 + 8) + 4 * kept * (nlist + dim) <= budget:
            names.append(f"PCAR{kept},IVF{nlist},PQ{kept}x4fsr")
    return names


def build(name: str, ids: np.ndarray, halves: np.ndarray, *, held_out: np.ndarray) -> faiss.IndexPreTransform:
    """A trained index of all stored vectors float16 [n, dim] under their ids. held_out: positions not to train on."""
    import faiss

    n, dim = halves.shape
    index: Any = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    ivf: Any = faiss.extract_index_ivf(index)
    projection: Any = faiss.downcast_VectorTransform(index.chain.at(0))
    random = np.random.default_rng(0)
    allowed = np.delete(np.arange(n), held_out)
    size = min(len(allowed), max(_CODE_POINTS, _POINTS_PER_LIST * ivf.nlist))
    sample = unit(halves[np.sort(random.choice(allowed, size, replace=False))])
    random.shuffle(sample)
    projection.train(sample[:_CODE_POINTS])
    projection.have_bias = False  # products of centred vectors are other products
    sample = projection.apply(sample)  # [size, kept]
    ivf.quantizer.add(_centroids(sample, ivf.nlist))
    ivf.train(sample[:_CODE_POINTS])  # the lists are there: only the codes are left to learn
    index.is_trained = True
    start = 0
    for block in unit_blocks(halves):
        index.add_with_ids(block, ids[start : start + len(block)])
        start += len(block)
    return index


def held_out_queries(n: int, *, n_queries: int = N_QUERIES) -> np.ndarray:
    """Positions int64 of the vectors that are asked for."""
    return np.linspace(0, n - 1, min(n_queries, max(1, n // 20))).astype(np.int64)


def tune(stored: TunedStored, *, own: np.ndarray, truth: np.ndarray, recall: float) -> TunedStored | None:
    """The fastest setting that reaches the target, None where none does.

    own: positions of the held-out vectors to ask for; truth: `true_tenth` of them.
    """
    queries = stored.rows(own)
    pairs: list[TunedStored] = []
    most = min(_RERANK[-1], MOST_CANDIDATES - 1, len(stored.ids) - 1)
    for nprobe in _nprobes(stored.nlist):
        found = stored.candidates(queries, most + 1, nprobe=nprobe)
        hits = _hits(stored, queries, own, found, truth)  # bool [n_queries, most + 1]
        n_hits = hits.cumsum(axis=1)
        for rerank in _RERANK:
            shares = np.minimum(n_hits[:, min(rerank, most)], K) / K
            if shares.mean() - _STANDARD_ERRORS * shares.std() / len(shares) ** 0.5 >= recall:
                pairs.append(replace(stored, nprobe=nprobe, rerank=rerank))
                break
        if len(pairs) == _ENOUGH_PAIRS:
            break
    if not pairs:
        return None
    timed = queries[:_TIMED]
    return min(pairs, key=lambda pair: median(_seconds(pair, timed)))


def true_tenth(queries: np.ndarray, blocks: Iterable[np.ndarray], n: int) -> np.ndarray:
    """Score float32 [n_queries] of the tenth nearest of n vectors, or of the last where there are fewer.

    queries: stored vectors float32 [n_queries, dim], which do not count as near to themselves. blocks: all vectors.
    """
    _, scores = nearest(queries, blocks, min(K + 1, n))  # itself is among them, and scores highest
    return scores.min(axis=1)


def measure(stored: Stored, own: np.ndarray, *, truth: np.ndarray) -> Measured:
    """Recall and latency of stored vectors, those at the positions `own`, asked for one by one; truth: `true_tenth`."""
    n, seconds, shares = len(stored.ids), [], []
    for query, position, tenth in zip(stored.rows(own), own, truth, strict=True):
        began = time.perf_counter()
        found = stored.search(query[None], min(K + 1, n))[0]
        seconds.append(time.perf_counter() - began)
        found = found[(found >= 0) & (found != position)]
        n_hits = int((stored.rows(found) @ query >= tenth - _NEAREST).sum())
        shares.append(min(n_hits, K) / min(K, n - 1) if n > 1 else 1.0)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return Measured(float(np.mean(shares)), round(float(p50), 4), round(float(p95), 4))


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


def _nprobes(nlist: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 … up to all lists."""
    steps = [n for power in range(nlist.bit_length()) for n in (1 << power, 3 << power >> 1)]
    return sorted({n for n in steps if n < nlist} | {nlist})


def _hits(
    stored: TunedStored, queries: np.ndarray, own: np.ndarray, found: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """bool as found [n_queries, n]: whether each is as near as the true tenth, and not the query itself."""
    hits = np.empty(found.shape, dtype=bool)
    for row, query in enumerate(queries):
        scores = stored.rows(found[row]) @ query
        hits[row] = (scores >= truth[row] - _NEAREST) & (found[row] >= 0) & (found[row] != own[row])
    return hits


def _seconds(stored: Stored, queries: np.ndarray) -> list[float]:
    """How long each query takes alone."""
    seconds = []
    for query in queries:
        began = time.perf_counter()
        stored.search(query[None], K)
        seconds.append(time.perf_counter() - began)
    return seconds
