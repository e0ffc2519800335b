"""The vectors of an opened generation, searched exactly or by a tuned FAISS type. Knows neither files nor the catalog.

Both kinds give positions; ids and vectors are looked up by them. A tuned type finds candidates in its short codes and
compares them again by the exact vectors, which lie beside it in float16, memory-mapped.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dinosearch.images.machine import n_cores
from dinosearch.images.read import in_threads
from dinosearch.index.exact import gpu_repays, nearest, nearest_by_torch, unit_blocks
from dinosearch.index.reader import unit

if TYPE_CHECKING:
    import faiss

SPAN = 40
"""Answers asked for that the tuned number of candidates is meant for; more answers need more candidates."""
MOST_CANDIDATES = 4096
"""Beyond so many, comparing with all vectors is the better way."""
_FOR_BLAS = 16  # queries from which matrix products are faster, 3 times here and 7 times at 300; FAISS waits for 334
_CHUNK = 64  # queries whose candidates one thread compares


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

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Positions int64 [n_queries, k] of near vectors, in no order, for float32 [n_queries, dim]; -1 for none."""


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

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        import faiss

        if gpu_repays(len(queries)):
            return nearest_by_torch(queries, self.matrix, k, device="cuda")[0]
        faiss.cvar.distance_compute_blas_threshold = _FOR_BLAS * self.index.d
        return faiss.downcast_index(self.index.index).search(queries, k)[1]


@dataclass(frozen=True)
class TunedStored:
    """An inverted file of short codes, with the exact vectors beside it."""

    kind: str
    ids: np.ndarray
    halves: np.ndarray
    """float16 [n, dim]"""
    index: faiss.IndexPreTransform
    """An inverted file of projected vectors, under the same ids."""
    nprobe: int = 1
    """Lists looked into."""
    rerank: int = SPAN
    """Candidates compared exactly for up to SPAN answers."""

    @property
    def matrix(self) -> np.ndarray:
        return self.halves

    @property
    def nlist(self) -> int:
        import faiss

        return int(faiss.extract_index_ivf(self.index).nlist)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        return unit(self.halves[positions])

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        n_candidates = self.n_candidates(k)
        if n_candidates >= min(MOST_CANDIDATES, len(self.ids)):
            return self._search_all(queries, k)
        candidates = self.candidates(queries, n_candidates, nprobe=self.nprobe)
        chunks = [slice(start, start + _CHUNK) for start in range(0, len(queries), _CHUNK)]

        def best(chunk: slice) -> list[np.ndarray]:
            return [self._best(query, near, k) for query, near in zip(queries[chunk], candidates[chunk], strict=True)]

        found = in_threads(best, chunks, workers=n_cores()) if len(chunks) > 1 else map(best, chunks)
        return np.array([row for rows in found for row in rows], dtype=np.int64).reshape(len(queries), k)

    def n_candidates(self, k: int) -> int:
        """How many are compared exactly for k answers."""
        return -(-self.rerank * max(k, SPAN) // SPAN)

    def candidates(self, queries: np.ndarray, n: int, *, nprobe: int) -> np.ndarray:
        """Positions int64 [n_queries, n] by the codes alone, nearest first; -1 where the lists held fewer."""
        import faiss

        lists = faiss.SearchParametersIVF()
        lists.nprobe = nprobe
        parameters = faiss.SearchParametersPreTransform()
        parameters.index_params = lists
        _, ids = self.index.search(queries, n, params=parameters)
        return np.where(ids < 0, -1, np.searchsorted(self.ids, ids))

    def _best(self, query: np.ndarray, near: np.ndarray, k: int) -> np.ndarray:
        near = near[near >= 0]
        if len(near) > k:
            vectors = self.halves[near].astype(np.float32)
            lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
            scores = (vectors @ query) / np.maximum(lengths, np.finfo(np.float32).tiny)
            return near[np.argpartition(scores, -k)[-k:]]
        return np.concatenate([near, np.full(k - len(near), -1)])

    def _search_all(self, queries: np.ndarray, k: int) -> np.ndarray:
        if gpu_repays(len(queries)):
            return nearest_by_torch(queries, self.halves, k, device="cuda")[0]
        return nearest(queries, unit_blocks(self.halves), k)[0]
