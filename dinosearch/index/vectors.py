"""All vectors of the answering model: a generation and the rows newer than it, searched as one.

Knows nothing of files and folders of images. The score of a candidate is computed from the two vectors alone, in
float64 or, where all lie in one graph, in float32 by FAISS. Equal vectors therefore have equal scores, whatever
batch they were asked in and wherever they lie. Vectors whose files are gone are still found here: which files there
are, the catalog knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dinosearch.index.catalog import Catalog
from dinosearch.index.exact import nearest
from dinosearch.index.generation import DamagedGeneration, open_generation
from dinosearch.index.reader import unit
from dinosearch.index.stored import GraphStored, Stored


@dataclass(frozen=True)
class Candidates:
    """Vectors near some queries, nearest first; ids int64 and scores float64, both [n_queries, k].

    Where a tuned type found fewer than k, the rest has id -1 and score -inf.
    """

    ids: np.ndarray
    scores: np.ndarray


class Vectors:
    """A memory-mapped generation and the rows newer than it."""

    def __init__(self, fingerprint: str, stored: Stored | None, newer_ids: np.ndarray, newer: np.ndarray) -> None:
        self.fingerprint = fingerprint
        """The model that made them."""
        self._stored = stored
        self._newer_ids = newer_ids  # int64 [n_newer]
        self._newer = newer  # float32 [n_newer, dim]
        self._singles: dict[int, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None] = {}

    def __len__(self) -> int:
        return len(self._newer_ids) + (len(self._stored.ids) if self._stored else 0)

    def search(self, queries: np.ndarray, k: int) -> Candidates:
        """The k vectors of highest cosine for each query float32 [n_queries, dim]; k is at most len(self), and some."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if len(queries) == 1 and (single := self._single(k)):
            ids, scores = single(queries)
            return Candidates(ids[None], scores[None].astype(np.float64))
        stored, n_newer = self._stored, len(self._newer_ids)
        parts = []  # ids and scores, each [n_queries, k or more]
        if stored is not None:
            near = stored.search(queries, min(k, len(stored.ids)))
            # Beside newer vectors that equal them, stored ones must not differ by float32 rounding.
            scores = _scores(queries, near.positions, stored.rows) if near.scores is None or n_newer else near.scores
            parts.append((near.ids, scores.astype(np.float64)))
        if n_newer:
            newer = nearest(queries, [self._newer], min(k, n_newer))[0]
            parts.append((self._newer_ids[newer], _scores(queries, newer, self._newer.__getitem__)))
        ids, scores = (
            parts[0] if len(parts) == 1 else (np.concatenate(same, axis=1) for same in zip(*parts, strict=True))
        )
        best = np.lexsort((ids, -scores))[:, :k]
        rows = np.arange(len(queries))[:, None]
        return Candidates(ids[rows, best], scores[rows, best])

    def _single(self, k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
        """The quick way for single queries, where a graph holds all vectors and k is not so large that it is exact."""
        if k not in self._singles:
            stored, single = self._stored, None
            if isinstance(stored, GraphStored) and len(self._newer_ids) == 0 and not stored.is_exact(k):
                single = stored.single_search(k)
            self._singles[k] = single
        return self._singles[k]

    def only(self, ids: np.ndarray) -> Vectors:
        """Those of some ids int64 [n], rising, that are there: copied into memory and searched exactly."""
        kept, found = [np.empty(0, np.int64)], []
        for own, matrix in self.parts():
            at = np.searchsorted(own, ids)
            there = own[np.minimum(at, len(own) - 1)] == ids
            kept.append(ids[there])
            found.append(matrix[at[there]] if matrix.dtype == np.float32 else unit(matrix[at[there]]))
        return Vectors(self.fingerprint, None, np.concatenate(kept), np.concatenate(found or [np.empty((0, 0))]))

    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """All vectors without copying those on disk: ids int64 [n] and vectors [n, dim] of each part.

        float32 is of unit length; float16, which lies beside a tuned type, is what `catalog.unit` makes unit vectors
        of.
        """
        newer = [(self._newer_ids, self._newer)] if len(self._newer_ids) else []
        return ([(self._stored.ids, self._stored.matrix)] if self._stored else []) + newer


def _scores(queries: np.ndarray, positions: np.ndarray, vectors_at: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cosines float64 [n_queries, k] of unit queries with the unit vectors at int64 [n_queries, k]; -inf for none."""
    scores = np.empty(positions.shape)
    for row, query in enumerate(queries):  # a query at a time: all their candidates may not fit in memory
        scores[row] = np.multiply(vectors_at(positions[row]), query, dtype=np.float64).sum(axis=1)
    scores[positions < 0] = -np.inf
    return scores


def open_vectors(catalog: Catalog, *, note: Callable[[str], None]) -> Vectors:
    """Vectors of the answering model. A generation that is missing or damaged is done without, and said so."""
    with catalog.snapshot():
        fingerprint, dim, generation = catalog.fingerprint, int(catalog.meta("dim")), catalog.generation()
        stored, after = None, 0
        if generation is not None:
            try:
                stored, after = open_generation(catalog.path.parent, generation, dim), generation.max_id
            except DamagedGeneration as error:
                note(f"{error}; answering from the catalog. The next run of index writes it anew")
        blocks = list(catalog.vector_blocks(fingerprint=fingerprint, after=after))
    newer_ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in blocks)])
    newer = np.concatenate([np.empty((0, dim), np.float32), *(vectors for _, vectors in blocks)])
    return Vectors(fingerprint, stored, newer_ids, newer)
