"""What an index holds, for reading: its figures, its failures, its vectors file by file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinosearch.index.catalog import Catalog, Failure
from dinosearch.index.generation import details_of


@dataclass(frozen=True)
class FaissInfo:
    """What searches an index; measured when it was written."""

    type: str
    """FAISS's name of it, as its index_factory takes it."""
    recall_at_10: float | None
    """Share of the 10 nearest found, against brute force on held-out vectors."""
    bytes_per_image: float
    """On disk, with the exact vectors."""
    exact: bool
    """Every vector is compared; else the best candidates are."""
    p50_ms: float | None
    p95_ms: float | None
    """Latency of a single query."""
    parameters: dict[str, int] | None
    """What the type was tuned to: lists looked into (nprobe), candidates compared exactly (rerank)."""
    recall_target: float | None
    """What it was tuned for."""


@dataclass(frozen=True)
class IndexInfo:
    """Figures of an index."""

    index: str
    images: int
    """Files that can be searched."""
    vectors: int
    """Vectors of the answering model; equal files share one, and those of deleted files stay until pruned."""
    failed: int
    model: str
    fingerprint: str
    roots: list[str]
    faiss: FaissInfo | None
    """None until a first run has come to its end."""


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A file with a vector."""

    path: Path
    """Absolute."""
    relative: str
    """Below its root, "/" between parts."""
    root: Path


def index_info(index_path: Path) -> IndexInfo:
    """Figures of an index. Raises IndexNotFound or IndexUnusable."""
    with Catalog.open(index_path) as catalog:
        fingerprint, generation = catalog.fingerprint, catalog.generation()
        faiss = None
        if generation is not None:
            details = details_of(generation)
            faiss = FaissInfo(
                type=generation.kind,
                recall_at_10=generation.recall_at_10,
                bytes_per_image=details.bytes_per_image or round(generation.size / max(1, generation.n), 1),
                exact=details.exact,
                p50_ms=details.p50_ms,
                p95_ms=details.p95_ms,
                parameters=details.parameters,
                recall_target=details.target,
            )
        return IndexInfo(
            index=index_path.name,
            images=catalog.n_images(),
            vectors=catalog.n_vectors(fingerprint=fingerprint),
            failed=catalog.n_failed(),
            model=catalog.meta("model"),
            fingerprint=fingerprint,
            roots=[str(root) for root in catalog.roots().values()],
            faiss=faiss,
        )


def failures(index_path: Path) -> Iterator[Failure]:
    """Files without a vector (absolute path, status, reason), by path."""
    with Catalog.open(index_path) as catalog:
        yield from catalog.failures()


def read_vectors(index_path: Path) -> tuple[list[IndexedFile], np.ndarray]:
    """Files that can be searched, by root and path, and their unit vectors float32 [n, dim], a row for each."""
    with Catalog.open(index_path) as catalog:
        files: list[IndexedFile] = []
        found = np.empty((catalog.n_images(), int(catalog.meta("dim"))), dtype=np.float32)
        for block, vectors in catalog.live_vectors():
            block = block[: len(found) - len(files)]  # a writer may have added some since they were counted
            found[len(files) : len(files) + len(block)] = vectors[: len(block)]
            files += [IndexedFile(file.root / file.path, file.path, file.root) for file in block]
    return files, found[: len(files)]
