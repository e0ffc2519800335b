"""What the tests of the vector store share: a catalog of given vectors, and brute force to compare with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dinosearch.index.catalog import Catalog
from dinosearch.index.rows import FileRow

MODEL = "f" * 16


def unit_vectors(n: int, dim: int, *, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(n: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Unit vectors as embeddings of images are: in many clusters of few directions, some near to others."""
    random = np.random.default_rng(seed)
    places = unit_vectors(max(4, n // 50), 12, seed=99) @ unit_vectors(12, dim, seed=98)
    vectors = places[random.integers(0, len(places), n)] + 0.1 * random.standard_normal((n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@contextmanager
def catalog_of(folder: Path, vectors: np.ndarray) -> Iterator[Catalog]:
    with Catalog.create(folder, fingerprint=MODEL, model="m", dim=vectors.shape[1]) as catalog:
        add(catalog, vectors)
        yield catalog


def add(catalog: Catalog, vectors: np.ndarray, *, start: int = 0) -> None:
    root = catalog.add_root("folder", str(catalog.path.parent))
    names = [f"{i:06}" for i in range(start, start + len(vectors))]
    catalog.put_vectors([(name, 0, 1, 1) for name in names], vectors, fingerprint=MODEL)
    catalog.put_files(FileRow(root, name, 1, 1, name, "ok") for name in names)
    catalog.commit()


def brute_force(stored: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ stored.astype(np.float64).T
    order = np.argsort(-scores, axis=1)[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def all_vectors(catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    ids, vectors = zip(*catalog.vector_blocks(fingerprint=MODEL), strict=True)
    return np.concatenate(ids), np.concatenate(vectors)
