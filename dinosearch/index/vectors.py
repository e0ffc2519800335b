"""The FAISS file of an index: written from the catalog, opened by memory mapping, searched exactly.

Knows nothing of files and folders of images. A generation is derived: whatever happens to its file, the catalog can
make it again. It holds float32 unit vectors under the catalog's ids (`IndexIDMap2(IndexFlatIP)`), so that FAISS alone
opens and searches it too. Scores are computed again for the candidates found, each from its two vectors alone; a score
therefore depends neither on the batch it was asked in nor on where the vector lies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.index.catalog import Catalog, Generation

if TYPE_CHECKING:
    import faiss

ALWAYS_HASHED = 32 << 20
"""Bytes. Smaller files are hashed at each opening (0.04 s); larger ones when inode or times are not the writer's."""

_SMALL = 20_000  # vectors: writing so few anew takes 0.1 s, so a small index has all its vectors in its FAISS file
_NEW_SHARE = 0.02  # of the generation: reading more newer rows than this makes a cold query wait
_BLOCK_VECTORS = 65536  # vectors compared at a time when recall is measured
_BLOCK_SCORES = 16 << 20  # scores held at a time when newer rows are searched


class DamagedGeneration(Exception):
    """The FAISS file is missing or is not what was written."""


@dataclass(frozen=True)
class Candidates:
    """Vectors near some queries, nearest first; ids int64 and scores float64, both [n_queries, k]."""

    ids: np.ndarray
    scores: np.ndarray


class Vectors:
    """All vectors of the answering model: a memory-mapped generation and the rows newer than it."""

    def __init__(self, fingerprint: str, base: _Base | None, newer_ids: np.ndarray, newer: np.ndarray) -> None:
        self.fingerprint = fingerprint
        """The model that made them."""
        self._base = base
        self._newer_ids = newer_ids  # int64 [n_newer]
        self._newer = newer  # float32 [n_newer, dim]

    def __len__(self) -> int:
        return len(self._newer_ids) + (len(self._base.ids) if self._base else 0)

    def search(self, queries: np.ndarray, k: int) -> Candidates:
        """The k vectors of highest cosine for each query float32 [n_queries, dim]; k is at most len(self)."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        ids = np.empty((len(queries), k), dtype=np.int64)
        scores = np.empty((len(queries), k), dtype=np.float64)
        newer = _nearest(queries, self._newer, min(k, len(self._newer_ids)))  # [n_queries, k_newer]
        base = self._base.search(queries, min(k, len(self._base.ids))) if self._base else None  # [n_queries, k_base]
        for row, query in enumerate(queries):
            near, near_ids = self._newer[newer[row]], self._newer_ids[newer[row]]
            if self._base is not None and base is not None:
                near = np.concatenate([near, self._base.vectors[base[row]]])  # [k_newer + k_base, dim]
                near_ids = np.concatenate([near_ids, self._base.ids[base[row]]])
            near_scores = np.multiply(near, query, dtype=np.float64).sum(axis=1)
            best = np.lexsort((near_ids, -near_scores))[:k]
            ids[row], scores[row] = near_ids[best], near_scores[best]
        return Candidates(ids, scores)


def open_vectors(catalog: Catalog, *, note: Callable[[str], None]) -> Vectors:
    """Vectors of the answering model. A FAISS file that is missing or damaged is done without, and said so."""
    with catalog.snapshot():
        fingerprint, dim, generation = catalog.fingerprint, int(catalog.meta("dim")), catalog.generation()
        base, after = None, 0
        if generation is not None:
            try:
                base, after = _open_generation(catalog.path.parent, generation, dim), generation.max_id
            except DamagedGeneration as error:
                note(f"{error}; answering from the catalog. The next run of index writes it anew")
        blocks = list(catalog.vector_blocks(fingerprint=fingerprint, after=after))
    newer_ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in blocks)])
    newer = np.concatenate([np.empty((0, dim), np.float32), *(vectors for _, vectors in blocks)])
    return Vectors(fingerprint, base, newer_ids, newer)


def wanted_generation(catalog: Catalog, fingerprint: str) -> str | None:
    """Why a new FAISS file should be written for a model, None when the present one does."""
    if fingerprint != catalog.fingerprint:
        return "another model"
    generation = catalog.generation()
    if generation is None:
        return "none yet"
    try:
        check_file(catalog.path.parent, generation)
    except DamagedGeneration as error:
        return str(error)
    n, n_newer = (
        catalog.n_vectors(fingerprint=fingerprint),
        catalog.n_vectors(fingerprint=fingerprint, after=generation.max_id),
    )
    n_pruned = generation.n + n_newer - n
    changed = max(n_newer, n_pruned)
    if changed > (0 if n <= _SMALL else _NEW_SHARE * n):
        return f"{n_newer} newer vectors, {n_pruned} pruned"
    return None


def write_generation(catalog: Catalog, *, fingerprint: str, dim: int) -> Generation:
    """Write the FAISS file of all vectors (at least one) of a model; the caller names it in the catalog.

    Raises DinosearchError when it cannot be written.
    """
    import faiss

    number, folder = catalog.next_generation(), catalog.path.parent
    path = folder / f"vectors-{number}.faiss"
    aside = folder / f"vectors-{number}.faiss.part"
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    max_id = 0
    for ids, vectors in catalog.vector_blocks(fingerprint=fingerprint):
        index.add_with_ids(vectors, ids)
        max_id = int(ids[-1])
    try:
        faiss.write_index(index, str(aside))
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(folder)
    except (RuntimeError, OSError) as error:  # FAISS reports a full disk as RuntimeError
        aside.unlink(missing_ok=True)
        raise DinosearchError(
            f"cannot write {path} ({error}). All images are saved and answer; free some space and run index again"
        ) from error
    return Generation(
        number=number,
        fingerprint=fingerprint,
        file=path.name,
        kind="Flat",
        size=path.stat().st_size,
        checksum=_checksum(path),
        stamp=_stamp(path),
        n=index.ntotal,
        max_id=max_id,
        recall_at_10=_recall(index.index, _view(index)),
    )


def remove_old_generations(catalog: Catalog) -> None:
    """Remove FAISS files that no reader can come upon any more, and what a killed writer left."""
    kept = set(catalog.generation_files())
    for path in catalog.path.parent.glob("vectors-*.faiss*"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def check_file(folder: Path, generation: Generation) -> Path:
    """Path of a generation's file. Raises DamagedGeneration unless it is, byte for byte, the one that was written."""
    path = folder / generation.file
    try:
        size, stamp = path.stat().st_size, _stamp(path)
        if size != generation.size:
            raise DamagedGeneration(f"{path} has {size} bytes instead of {generation.size}")
        trusted = stamp == generation.stamp and size > ALWAYS_HASHED
        if not trusted and _checksum(path) != generation.checksum:
            raise DamagedGeneration(f"{path} is damaged")
    except FileNotFoundError:
        raise DamagedGeneration(f"{path} is missing") from None
    except OSError as error:
        raise DamagedGeneration(f"{path} cannot be read ({error.strerror})") from error
    return path


@dataclass(frozen=True)
class _Base:
    """An opened generation."""

    ids: np.ndarray  # int64 [n], rising
    vectors: np.ndarray  # float32 [n, dim], a view of the mapped file
    index: faiss.IndexIDMap2  # owns the mapping

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Positions int64 [n_queries, k] of the nearest vectors."""
        import faiss

        return faiss.downcast_index(self.index.index).search(queries, k)[1]


def _open_generation(folder: Path, generation: Generation, dim: int) -> _Base:
    path = check_file(folder, generation)
    import faiss

    # No part of the file can be longer than the file: FAISS's own limit is a terabyte.
    faiss.set_deserialization_vector_byte_limit(generation.size)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DamagedGeneration(f"{path} cannot be read by FAISS ({str(error).splitlines()[0]})") from error
    if not isinstance(index, faiss.IndexIDMap2) or index.ntotal != generation.n or index.d != dim:
        raise DamagedGeneration(f"{path} holds something else than was written")
    return _Base(faiss.vector_to_array(index.id_map), _view(index), index)


def _view(index: faiss.IndexIDMap2) -> np.ndarray:
    """Vectors float32 [n, dim] of a flat index, without copying; valid while the index is."""
    import faiss

    flat: Any = faiss.downcast_index(index.index)  # its type is only known when it runs
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


def _nearest(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Positions int64 [n_queries, k] of the k vectors of highest inner product, in no order, by brute force."""
    positions = np.empty((len(queries), k), dtype=np.int64)
    if k == 0:
        return positions
    step = max(1, _BLOCK_SCORES // len(vectors))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ vectors.T  # [step, n_vectors]
        positions[start : start + step] = np.argpartition(scores, -k, axis=1)[:, -k:]
    return positions


def _recall(index: faiss.Index, vectors: np.ndarray) -> float:
    """Share of the 10 nearest vectors, found by brute force for up to 100 stored vectors, that the index finds too."""
    queries = vectors[np.linspace(0, len(vectors) - 1, min(100, len(vectors))).astype(np.int64)]
    k = min(10, len(vectors))
    best = np.empty((len(queries), 0), dtype=np.float32)
    for start in range(0, len(vectors), _BLOCK_VECTORS):
        scores = np.concatenate([best, queries @ vectors[start : start + _BLOCK_VECTORS].T], axis=1)
        best = np.partition(scores, -k, axis=1)[:, -k:] if scores.shape[1] > k else scores
    _, found = index.search(queries, k)  # [n_queries, k]
    scores = np.einsum("qkd,qd->qk", vectors[found], queries)
    # Equal vectors are equally right, in whatever order they come.
    return float((scores >= best.min(axis=1, keepdims=True) - 1e-6).mean())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_ino}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle for folders; its rename is written through
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
