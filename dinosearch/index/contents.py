"""What an index holds, for reading: its figures, its failures, its vectors file by file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinosearch.index.catalog import Catalog, Failure


@dataclass(frozen=True)
class FaissInfo:
    """The FAISS file of an index."""

    type: str
    recall_at_10: float | None
    """Share of the 10 nearest found, measured against brute force when the file was written."""
    bytes_per_image: float


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
            faiss = FaissInfo(
                generation.kind, generation.recall_at_10, round(generation.size / max(1, generation.n), 1)
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
