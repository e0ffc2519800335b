"""The vectors of an opened generation, searched exactly or by a tuned FAISS type. Knows neither files nor the catalog.

All kinds give positions; ids and vectors are looked up by them. The exact vectors lie beside a tuned type in float16,
memory-mapped. A graph holds the same float16 numbers, so what it computes of a candidate is its score but for the
length of the stored vector. Short codes only find candidates, which are compared again by the exact vectors.
"""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from dinosearch.images.machine import n_cores
from dinosearch.images.read import in_threads
from dinosearch.index.exact import gpu_repays, nearest, nearest_by_torch, unit_blocks

if TYPE_CHECKING:
    import faiss

MOST_CANDIDATES = 4096
"""Beyond so many, comparing with all vectors is the better way."""
_FOR_BLAS = 16  # queries from which matrix products are faster, 3 times here and 7 times at 300; FAISS waits for 334
_CHUNK = 64  # queries whose candidates one thread compares


class Near(NamedTuple):
    """Vectors near some queries, in no order. All arrays are [n_queries, k or more]."""

    positions: np.ndarray
    """int64, -1 for none."""
    ids: np.ndarray
    """int64, -1 for none."""
    scores: np.ndarray | None = None
    """Cosines float32, -inf for none; None where nobody computed them yet."""


def near_at(positions: np.ndarray, ids: np.ndarray) -> Near:
    """What is at positions int64 [n_queries, k] of stored vectors with ids int64 [n]; -1 stands for none."""
    return Near(positions, np.where(positions < 0, -1, ids[positions]))


def _has_gaps(ids: np.ndarray) -> bool:
    """Whether a query found fewer than were asked for: what it did not comes last."""
    return bool((ids[:, -1:] < 0).any())


class Stored(Protocol):
    """An opened generation of n vectors."""

    @property
    def kind(self) -> str:
        """FAISS's name of its type."""

    @property
    def ids(self) -> np.ndarray:
        """int64 [n], rising."""

    @property
    def index(self) -> faiss.Index:
        """What FAISS writes to a file."""

    @property
    def matrix(self) -> np.ndarray:
        """[n, dim] without copying: float32 of unit length, or float16 of which `unit` makes that."""

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [n_positions, dim]."""

    def search(self, queries: np.ndarray, k: int) -> Near:
        """At least k vectors for each query float32 [n_queries, dim]."""


@dataclass(frozen=True)
class ExactStored:
    """A flat index: every answer is exact."""

    ids: np.ndarray
    index: faiss.IndexIDMap2
    """Owns the mapping of the vectors."""
    kind: str = "Flat"

    @property
    def matrix(self) -> np.ndarray:
        import faiss

        flat: Any = faiss.downcast_index(self.index.index)  # its type is only known when it runs
        numbers: Any = (ctypes.c_float * (flat.ntotal * flat.d)).from_address(int(flat.get_xb()))
        numbers.owner = self.index  # whoever holds the array holds the mapping
        vectors = np.frombuffer(numbers, np.float32).reshape(flat.ntotal, flat.d)
        vectors.flags.writeable = False
        return vectors

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return self.matrix[positions]

    def search(self, queries: np.ndarray, k: int) -> Near:
        import faiss

        if gpu_repays(len(queries)):
            return near_at(nearest_by_torch(queries, self.matrix, k, device="cuda")[0], self.ids)
        faiss.cvar.distance_compute_blas_threshold = _FOR_BLAS * self.index.d
        return near_at(faiss.downcast_index(self.index.index).search(queries, k)[1], self.ids)


@dataclass(frozen=True)
class TunedStored(ABC):
    """A quicker way than comparing with all vectors, which lie beside it; one class for each way."""

    kind: str
    ids: np.ndarray
    halves: np.ndarray
    """float16 [n, dim]"""
    norms: np.ndarray
    """Their lengths, float32 [n]."""
    index: Any
    """FAISS's, under the same ids."""
    effort: int = 1
    """How much is looked at: the more, the surer and the slower."""
    rerank: int = 0
    """Candidates compared exactly for up to `span` answers; more answers need more candidates."""

    effort_name: ClassVar[str]
    """FAISS's name of it."""
    span: ClassVar[int]
    reranks: ClassVar[tuple[int, ...]]
    """Numbers of candidates worth a try, rising."""
    enough: ClassVar[int]
    """So many efforts that reach a target: beyond these, more was never faster."""

    @property
    def matrix(self) -> np.ndarray:
        return self.halves

    @property
    @abstractmethod
    def efforts(self) -> list[int]:
        """Efforts worth a try, rising."""

    def rows(self, positions: np.ndarray) -> np.ndarray:
        vectors = self.halves[positions].astype(np.float32)
        vectors /= self.norms[positions, None]
        return vectors

    def search(self, queries: np.ndarray, k: int) -> Near:
        if self.is_exact(k):
            return near_at(self._search_all(queries, k), self.ids)
        return self._search_some(queries, self.n_candidates(k), k)

    def is_exact(self, k: int) -> bool:
        """Whether so many answers come from comparing with all vectors."""
        return self.n_candidates(k) >= min(MOST_CANDIDATES, len(self.ids))

    def n_candidates(self, k: int) -> int:
        """How many are compared exactly for k answers."""
        return -(-self.rerank * max(k, self.span) // self.span)

    def candidates(self, queries: np.ndarray, n: int, *, effort: int) -> np.ndarray:
        """Positions int64 [n_queries, n] by the codes alone, nearest first; -1 where fewer were found."""
        return self._found(queries, n, self._parameters(effort)).positions

    def most_candidates(self, effort: int) -> int:  # noqa: ARG002 - for graphs
        """So many are worth a try with an effort."""
        return min(self.reranks[-1], MOST_CANDIDATES - 1, self.index.ntotal)

    def _found(self, queries: np.ndarray, n: int, parameters: faiss.SearchParameters) -> Near:
        """What FAISS finds, where it is fewer than n -1 comes last; the scores are its products, of none any number."""
        products, ids = self.index.search(queries, n, params=parameters)
        first = self._first_of_dense
        positions = np.searchsorted(self.ids, ids) if first is None else ids - first
        if _has_gaps(ids):
            positions[ids < 0] = -1
        return Near(positions, ids, products)

    @functools.cached_property
    def _first_of_dense(self) -> np.int64 | None:
        """The first of ids without gaps, as most are: then there is nothing to look up, which waits for the memory."""
        first, last = self.ids[0], self.ids[-1]
        return first if last - first == len(self.ids) - 1 else None

    @abstractmethod
    def _search_some(self, queries: np.ndarray, n_candidates: int, k: int) -> Near:
        """So many candidates, or the k best of them."""

    @abstractmethod
    def _parameters(self, effort: int) -> faiss.SearchParameters: ...

    def _search_all(self, queries: np.ndarray, k: int) -> np.ndarray:
        if gpu_repays(len(queries)):
            return nearest_by_torch(queries, self.halves, k, device="cuda")[0]
        return nearest(queries, unit_blocks(self.halves), k)[0]


class GraphStored(TunedStored):
    """A graph of neighbours (HNSW) over the stored float16 vectors, both mapped from the file."""

    effort_name = "efSearch"
    span = 10
    reranks: ClassVar[tuple[int, ...]] = (12,)  # lengths, which the walk does not see, differ by less than 0.001
    enough = 1

    @property
    def efforts(self) -> list[int]:
        return [*range(16, 33), 36, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768]

    def most_candidates(self, effort: int) -> int:
        return min(super().most_candidates(effort), effort)  # a walk for more looks at more

    def _search_some(self, queries: np.ndarray, n_candidates: int, k: int) -> Near:
        n = min(n_candidates, -(-GraphStored.reranks[0] * max(k, self.span) // self.span))
        positions, ids, products = self._found(queries, n, self._parameters(self.effort, n_candidates / n))
        assert products is not None
        if _has_gaps(ids):
            products[ids < 0] = -np.inf
        return Near(positions, ids, products / self.norms[positions])

    def single_search(self, k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """As `search`, for one query float32 [1, dim] after another, sorted: ids int64 [k] and cosines float32 [k].

        With the fewest calls of Python and numpy, which between two walks take a quarter of a walk's time.
        """
        from faiss import swig_ptr

        n = min(-(-GraphStored.reranks[0] * max(k, self.span) // self.span), len(self.ids))
        parameters = self._parameters(self.effort, self.n_candidates(k) / n)
        walk, norms, first, shape, dim = self.index.search_c, self.norms, self._first_of_dense, (1, n), self.index.d

        def search(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if query.shape != (1, dim):
                raise ValueError(f"a query is [1, {dim}], not {list(query.shape)}")
            products, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
            walk(1, swig_ptr(query), n, swig_ptr(products), swig_ptr(ids), parameters)
            ids = ids[0]
            positions = np.searchsorted(self.ids, ids) if first is None else ids - first
            if ids.item(-1) < 0:  # fewer than n were found
                positions[ids < 0] = 0
                products[0, ids < 0] = -np.inf
            scores = products[0] / norms[positions]
            best = np.lexsort((ids, -scores))[:k]
            return ids[best], scores[best]

        return search

    def _parameters(self, effort: int, factor: float = 1) -> faiss.SearchParameters:  # noqa: ARG002 - for the next class
        return _walk(effort)


class ReducedGraphStored(GraphStored):
    """A graph over the directions in which vectors vary most (PCA). FAISS compares what it finds by the stored numbers.

    All is mapped from the file, which holds these numbers too, in the order of the graph. A walk looks at vectors all
    over the memory, which is what takes its time: of a few numbers of each it takes half as long.
    """

    reranks = (12, 14, 16, 20, 24, 32, 40)
    enough = 4

    def candidates(self, queries: np.ndarray, n: int, *, effort: int) -> np.ndarray:
        import faiss

        refine: Any = faiss.downcast_index(self.index.index)
        _, rows = refine.base_index.search(queries, n, params=_reduced_walk(effort))
        ids = faiss.vector_to_array(self.index.id_map)
        return np.where(rows < 0, -1, np.searchsorted(self.ids, ids[rows]))

    def _parameters(self, effort: int, factor: float = 1) -> faiss.SearchParameters:
        return _refined_walk(effort, factor)


@functools.cache
def _walk(effort: int) -> faiss.SearchParameters:
    """Made once: that takes a tenth of a search."""
    import faiss

    parameters: Any = faiss  # its stubs lack the class
    return parameters.SearchParametersHNSW(efSearch=effort)


@functools.cache
def _reduced_walk(effort: int) -> faiss.SearchParameters:
    import faiss

    parameters: Any = faiss
    return parameters.SearchParametersPreTransform(index_params=_walk(effort))


@functools.cache
def _refined_walk(effort: int, factor: float) -> faiss.SearchParameters:
    """factor: times as many as are asked for are compared by the stored numbers."""
    import faiss

    parameters: Any = faiss
    exceeding = 1e-3  # FAISS rounds down
    return parameters.IndexRefineSearchParameters(k_factor=factor + exceeding, base_index_params=_reduced_walk(effort))


class ListsStored(TunedStored):
    """An inverted file of product codes, which FAISS has to read into memory."""

    effort_name = "nprobe"
    span = 40
    reranks = (40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1280)
    enough = 4

    @property
    def efforts(self) -> list[int]:
        """1, 2, 3, 4, 6, 8, 12 … up to all lists."""
        import faiss

        nlist = int(faiss.extract_index_ivf(self.index).nlist)
        steps = [n for power in range(nlist.bit_length()) for n in (1 << power, 3 << power >> 1)]
        return sorted({n for n in steps if n < nlist} | {nlist})

    def _search_some(self, queries: np.ndarray, n_candidates: int, k: int) -> Near:
        found = self.candidates(queries, n_candidates, effort=self.effort)
        if n_candidates <= k:
            return near_at(found, self.ids)
        chunks = [slice(start, start + _CHUNK) for start in range(0, len(queries), _CHUNK)]

        def best(chunk: slice) -> list[np.ndarray]:
            return [self._best(query, near, k) for query, near in zip(queries[chunk], found[chunk], strict=True)]

        rows = in_threads(best, chunks, workers=n_cores()) if len(chunks) > 1 else map(best, chunks)
        best_rows = np.array([row for some in rows for row in some], dtype=np.int64)
        return near_at(best_rows.reshape(len(queries), k), self.ids)

    def _best(self, query: np.ndarray, near: np.ndarray, k: int) -> np.ndarray:
        """The k best of many candidates; few are compared once, by who asked."""
        near = near[near >= 0]
        if len(near) > k:
            scores = (self.halves[near].astype(np.float32) @ query) / self.norms[near]
            return near[np.argpartition(scores, -k)[-k:]]
        return np.concatenate([near, np.full(k - len(near), -1)])

    def _parameters(self, effort: int) -> faiss.SearchParameters:
        import faiss

        parameters: Any = faiss
        return parameters.SearchParametersPreTransform(index_params=parameters.SearchParametersIVF(nprobe=effort))


def tuned_class(kind: str) -> type[TunedStored]:
    """Which way to find candidates FAISS's name of a type stands for."""
    if "HNSW" not in kind:
        return ListsStored
    return ReducedGraphStored if "PCA" in kind else GraphStored
