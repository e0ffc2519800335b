"""What an index holds, for reading: its figures, its failures, its vectors file by file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinosearch.images.sources import is_url
from dinosearch.index.catalog import Catalog
from dinosearch.index.generation import DamagedGeneration, details_of
from dinosearch.index.rows import Generation, LiveFile
from dinosearch.index.sources import FollowedSources


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
class SourceInfo:
    """A source that an index follows."""

    kind: str
    """folder, files, glob, list, table, archive or remote."""
    location: str
    exclude: tuple[str, ...]
    include_hidden: bool
    all_pages: bool


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
    """Locations of the sources."""
    sources: list[SourceInfo]
    metadata: list[str]
    """Columns that tables give besides the path."""
    shard: str | None
    """i/n, if this is one of n parts that `merge` makes one index of."""
    faiss: FaissInfo | None
    """None until a first run has come to its end, and where what is known of it is damaged."""


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A file with a vector."""

    path: Path | str
    """Absolute; a member of an archive is named below it, photos.zip/a.jpg. A str where it is a URL."""
    relative: str
    """Below its root, "/" between parts."""
    root: Path | str
    """Location of its source."""
    member: str = ""
    """Name inside an archive."""
    frame: int = 0
    row: int = 0
    """Of its vector, in the array that the files came with."""


class Failure(NamedTuple):
    """A file without a vector, and why."""

    path: str
    """Absolute path or URL."""
    status: str
    reason: str
    frame: int = 0


def index_info(index_path: Path) -> IndexInfo:
    """Figures of an index. Raises IndexNotFound or IndexUnusable."""
    with Catalog.open(index_path) as catalog:
        fingerprint, generation = catalog.fingerprint, catalog.generation()
        roots = catalog.roots().values()
        return IndexInfo(
            index=index_path.name,
            images=catalog.n_images(),
            vectors=catalog.n_vectors(fingerprint=fingerprint),
            failed=catalog.n_failed(),
            model=catalog.meta("model"),
            fingerprint=fingerprint,
            roots=[root.location for root in roots],
            sources=[
                SourceInfo(root.kind, root.location, seen.exclude, seen.include_hidden, seen.all_pages)
                for root in roots
                for seen in [root.options]
            ],
            metadata=list(catalog.metadata_columns()),
            shard=catalog.shard(),
            faiss=_faiss_info(generation) if generation else None,
        )


def _faiss_info(generation: Generation) -> FaissInfo | None:
    try:
        details = details_of(generation)
    except DamagedGeneration:
        return None  # the next run of index writes it anew
    return FaissInfo(
        type=generation.kind,
        recall_at_10=generation.recall_at_10,
        bytes_per_image=details.bytes_per_image or round(generation.size / max(1, generation.n), 1),
        exact=details.exact,
        p50_ms=details.p50_ms,
        p95_ms=details.p95_ms,
        parameters=details.parameters,
        recall_target=details.target,
    )


def failures(index_path: Path) -> Iterator[Failure]:
    """Files without a vector, by path."""
    with Catalog.open(index_path) as catalog:
        sources = FollowedSources(catalog)
        for file in catalog.failures():
            yield Failure(sources.shown_path(file), file.status, file.reason, file.frame)


def read_vectors(index_path: Path) -> tuple[list[IndexedFile], np.ndarray]:
    """What can be searched, by root, path, member and frame, and unit vectors float32 [n, dim], a row for each."""
    with Catalog.open(index_path) as catalog:
        sources = FollowedSources(catalog)
        files: list[IndexedFile] = []
        found = np.empty((catalog.n_live(), int(catalog.meta("dim"))), dtype=np.float32)
        for block, vectors in catalog.live_vectors():
            block = block[: len(found) - len(files)]  # a writer may have added some since they were counted
            found[len(files) : len(files) + len(block)] = vectors[: len(block)]
            files += [indexed_file(file, sources, row) for row, file in enumerate(block, len(files))]
    return files, found[: len(files)]


def indexed_file(file: LiveFile, sources: FollowedSources, row: int) -> IndexedFile:
    """A file of the catalog as others see it."""
    root = as_path(sources.of(file).location)
    return IndexedFile(as_path(sources.shown_path(file)), file.path, root, file.member, file.frame, row)


def as_path(shown: str) -> Path | str:
    """A path as such; a URL as it is, of which Path would leave out a slash."""
    return shown if is_url(shown) else Path(shown)
