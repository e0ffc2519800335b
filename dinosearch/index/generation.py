"""A generation: the vectors of an index as files that are searched memory-mapped. Written, verified, opened, removed.

Knows nothing of folders of images. Whatever happens to a generation, the catalog can make it again. Its files:

- `vectors-N.faiss`, always; plain FAISS opens and searches it, under the ids of the catalog. Exact: the unit vectors
  in float32 (`IndexIDMap2(IndexFlatIP)`). Tuned: a graph over the float16 vectors or over few of their directions, the
  vectors with it, or short codes in inverted lists.
- `vectors-N.f16`, of a tuned one: the vectors as the catalog stores them, float16 [n, dim] and nothing else.
- `vectors-N.norms`, beside it: the length of each, float32 [n].
- `vectors-N.ids`, beside it: the id of each, int64 [n], rising.

Each is written aside, flushed, renamed, and only then named in the catalog, with size and checksum. FAISS reads a file
only after its checksum matched, and may not ask for more than the file has. FAISS maps the vectors of a flat index, and
a graph with its codes, but not the block lists of fast-scan codes: these cost a reader n × (m / 2 + 8) bytes of its
own, the exact vectors none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.index.catalog import Catalog, Generation
from dinosearch.index.exact import BLOCK, unit_blocks
from dinosearch.index.faiss_type import EXACT_BELOW, RECALL, Measured, held_out_queries, measure, true_tenth, tuned_type
from dinosearch.index.reader import norms as norms_of
from dinosearch.index.stored import ExactStored, Stored, TunedStored, tuned_class

ALWAYS_HASHED = 32 << 20
"""Bytes. Smaller files are hashed at each opening (0.04 s); larger ones when inode or times are not the writer's."""

SMALL = 50_000
"""Vectors: writing so few of 384 numbers anew, and measuring how fast they answer, takes about a second. So an index up
to here has all its vectors in its generation, and who asks for them copies none."""
NEW_SHARE = 0.02
"""Of the generation: reading more newer rows than this makes a cold query wait."""

_EXACT_QUERIES = 100  # for the latency of exact search, whose recall is no question
_LEAST_LOOPS = 1024
_BESIDE = (".f16", ".norms", ".ids")  # files beside the FAISS file of a tuned type


class DamagedGeneration(Exception):
    """A file is missing or is not what was written."""


@dataclass(frozen=True)
class Seal:
    """A file as it was written."""

    file: str
    size: int
    checksum: str
    stamp: str
    """Inode and times when the checksum was taken: while they are the same, so are the bytes."""


@dataclass(frozen=True)
class Details:
    """What the catalog keeps of a generation beside its row, as JSON."""

    exact: bool = True
    parameters: dict[str, int] | None = None
    """`efSearch` or `nprobe`, and `rerank`, of a tuned type."""
    target: float | None = None
    """Recall asked for."""
    p50_ms: float | None = None
    p95_ms: float | None = None
    """Of single queries, measured when the generation was written."""
    bytes_per_image: float | None = None
    """On disk, all files."""
    beside: tuple[Seal, ...] = ()
    """The files beside the FAISS file."""


def details_of(generation: Generation) -> Details:
    """Generations of before there were details are exact. Raises DamagedGeneration where they cannot be read."""
    if generation.details is None:
        return Details()
    try:
        facts = json.loads(generation.details)
        return Details(**facts | {"beside": tuple(Seal(**seal) for seal in facts["beside"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedGeneration(f"what the catalog says of {generation.file} is damaged") from error


def wanted_generation(catalog: Catalog, fingerprint: str, *, hashed: bool = False) -> str | None:
    """Why a new generation should be written for a model, None when the present one does. hashed: as `check_files`."""
    if fingerprint != catalog.fingerprint:
        return "another model"
    generation = catalog.generation()
    if generation is None:
        return "none yet"
    try:
        check_files(catalog.path.parent, generation, hashed=hashed)
        details = details_of(generation)
    except DamagedGeneration as error:
        return str(error)
    if details.target is not None and details.target != (catalog.recall() or RECALL):
        return "another recall"
    n, n_newer = (
        catalog.n_vectors(fingerprint=fingerprint),
        catalog.n_vectors(fingerprint=fingerprint, after=generation.max_id),
    )
    n_pruned = generation.n + n_newer - n
    changed = max(n_newer, n_pruned)
    if changed > (0 if n <= SMALL else NEW_SHARE * n):
        return f"{n_newer} newer vectors, {n_pruned} pruned"
    return None


def write_generation(
    catalog: Catalog,
    *,
    fingerprint: str,
    dim: int,
    recall: float | None = None,
    max_memory: int | None = None,
    exact_below: int = EXACT_BELOW,
    note: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Write the files of all vectors (at least one) of a model; the caller names them in the catalog.

    recall: share of the 10 nearest that a tuned type must find, the catalog's own without; 1 asks for exact search.
    max_memory: bytes that a reader may need for itself. Raises DinosearchError when they cannot be written.
    """
    import faiss

    number, folder = catalog.next_generation(), catalog.path.parent
    recall = recall or catalog.recall() or RECALL
    n = catalog.n_vectors(fingerprint=fingerprint)
    with _files_aside(folder, number) as aside:
        if n < exact_below or recall >= 1:
            stored, measured = _exact_measured(dim, catalog.vector_blocks(fingerprint=fingerprint))
        else:
            ids, halves, norms = _write_beside(catalog, fingerprint, dim, aside)
            tuned = tuned_type(ids, halves, norms, recall=recall, max_memory=max_memory, note=note)
            stored, measured = tuned or _exact_measured(dim, _numbered(ids, halves))
        suffixes = [".faiss", *_BESIDE] if isinstance(stored, TunedStored) else [".faiss"]
        with _written(folder / f"vectors-{number}.faiss"):
            faiss.write_index(stored.index, str(aside[".faiss"]))
            seals = [_publish(aside[suffix], folder / f"vectors-{number}{suffix}") for suffix in suffixes]
            _sync_folder(folder)
    size = sum(seal.size for seal in seals)
    parameters = None
    if isinstance(stored, TunedStored):
        parameters = {stored.effort_name: stored.effort, "rerank": stored.rerank}
    details = Details(
        exact=isinstance(stored, ExactStored),
        parameters=parameters,
        target=recall,
        p50_ms=measured.p50_ms,
        p95_ms=measured.p95_ms,
        bytes_per_image=round(size / len(stored.ids), 1),
        beside=tuple(seals[1:]),
    )
    return Generation(
        number=number,
        fingerprint=fingerprint,
        kind=stored.kind,
        n=len(stored.ids),
        max_id=int(stored.ids[-1]),
        recall_at_10=measured.recall_at_10,
        details=json.dumps(asdict(details)),
        **asdict(seals[0]),
    )


def check_files(folder: Path, generation: Generation, *, hashed: bool = False) -> None:
    """Raises DamagedGeneration unless every file is, byte for byte, the one that was written.

    Large files with the inode and times that they had are believed, unless all are to be hashed: a disk that returns
    other bytes than it was given changes neither.
    """
    details = details_of(generation)
    if not details.exact and [Path(seal.file).suffix for seal in details.beside] != list(_BESIDE):
        raise DamagedGeneration(f"{folder / generation.file} was written by an older dinosearch")
    for seal in _seals(generation):
        _check_file(folder, seal, hashed=hashed)


def restamped(folder: Path, generation: Generation) -> Generation:
    """The same with the inodes and times that its files have now: those of a copy, once it was hashed, are believed."""
    details = details_of(generation)
    beside = [asdict(replace(seal, stamp=_stamp(folder / seal.file))) for seal in details.beside]
    return replace(
        generation,
        stamp=_stamp(folder / generation.file),
        details=json.dumps(asdict(details) | {"beside": beside}) if beside else generation.details,
    )


def open_generation(folder: Path, generation: Generation, dim: int) -> Stored:
    """The vectors of a generation, memory-mapped. Raises DamagedGeneration."""
    check_files(folder, generation)
    import faiss

    path = folder / generation.file
    try:
        with _faiss_limited(generation):
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise DamagedGeneration(f"{path} cannot be read by FAISS ({str(error).splitlines()[0]})") from error
    details = details_of(generation)
    if index.ntotal != generation.n or index.d != dim:
        raise DamagedGeneration(f"{path} holds other vectors than were written")
    if details.exact and isinstance(index, faiss.IndexIDMap2):
        return ExactStored(faiss.vector_to_array(index.id_map), index)
    if details.parameters is None or not isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        raise DamagedGeneration(f"{path} holds something else than was written")
    halves = np.memmap(path.with_suffix(".f16"), np.float16, mode="r", shape=(generation.n, dim))
    ids = np.memmap(path.with_suffix(".ids"), np.int64, mode="r", shape=(generation.n,))
    norms = np.memmap(path.with_suffix(".norms"), np.float32, mode="r", shape=(generation.n,))
    tuned = tuned_class(generation.kind)
    effort, rerank = details.parameters[tuned.effort_name], details.parameters["rerank"]
    return tuned(generation.kind, np.asarray(ids), np.asarray(halves), np.asarray(norms), index, effort, rerank)


def remove_old_generations(catalog: Catalog) -> None:
    """Remove the files of generations that no reader can come upon any more, and what a killed writer left."""
    kept = {Path(file).stem for file in catalog.generation_files()}
    for path in catalog.path.parent.glob("vectors-*.*"):
        if path.stem not in kept or path.suffix not in (".faiss", *_BESIDE):
            path.unlink(missing_ok=True)


@contextmanager
def _files_aside(folder: Path, number: int) -> Iterator[dict[str, Path]]:
    """Paths to write to, by what they will end in; what is not published is removed."""
    aside = {suffix: folder / f"vectors-{number}{suffix}.part" for suffix in (".faiss", *_BESIDE)}
    try:
        yield aside
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # FAISS reports a full disk as RuntimeError
        raise DinosearchError(
            f"cannot write {path} ({error}). All images are saved and answer; free some space and run index again"
        ) from error


def _exact(dim: int, blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> ExactStored:
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    for ids, vectors in blocks:
        index.add_with_ids(vectors, ids)
    return ExactStored(faiss.vector_to_array(index.id_map), index)


def _write_beside(
    catalog: Catalog, fingerprint: str, dim: int, aside: dict[str, Path]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids int64 [n], vectors float16 [n, dim] and their lengths float32 [n] of a model, in files now mapped."""
    with (
        _written(aside[".f16"]),
        aside[".f16"].open("wb") as vectors_file,
        aside[".norms"].open("wb") as norms_file,
        aside[".ids"].open("wb") as ids_file,
    ):
        n = 0
        for ids, halves in catalog.half_blocks(fingerprint=fingerprint):
            vectors_file.write(halves.tobytes())
            norms_file.write(norms_of(halves.astype(np.float32)).tobytes())
            ids_file.write(ids.tobytes())
            n += len(ids)
    return (
        np.asarray(np.memmap(aside[".ids"], np.int64, mode="r", shape=(n,))),
        np.asarray(np.memmap(aside[".f16"], np.float16, mode="r", shape=(n, dim))),
        np.asarray(np.memmap(aside[".norms"], np.float32, mode="r", shape=(n,))),
    )


def _numbered(ids: np.ndarray, halves: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    start = 0
    for block in unit_blocks(halves):
        yield ids[start : start + len(block)], block
        start += len(block)


def _exact_measured(dim: int, blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[Stored, Measured]:
    stored = _exact(dim, blocks)
    queries = stored.rows(held_out_queries(len(stored.ids), n_queries=_EXACT_QUERIES))
    return stored, measure(stored, queries, truth=true_tenth(queries, _blocks(stored.matrix), len(stored.ids)))


def _blocks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(matrix), BLOCK):
        yield matrix[start : start + BLOCK]


def _publish(aside: Path, path: Path) -> Seal:
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    return Seal(path.name, path.stat().st_size, _checksum(path), _stamp(path))


def _seals(generation: Generation) -> list[Seal]:
    first = Seal(generation.file, generation.size, generation.checksum, generation.stamp)
    return [first, *details_of(generation).beside]


def _check_file(folder: Path, seal: Seal, *, hashed: bool) -> None:
    path = folder / seal.file
    try:
        size, stamp = path.stat().st_size, _stamp(path)
        if size != seal.size:
            raise DamagedGeneration(f"{path} has {size} bytes instead of {seal.size}")
        trusted = stamp == seal.stamp and size > ALWAYS_HASHED and not hashed
        if not trusted and _checksum(path) != seal.checksum:
            raise DamagedGeneration(f"{path} is damaged")
    except FileNotFoundError:
        raise DamagedGeneration(f"{path} is missing") from None
    except OSError as error:
        raise DamagedGeneration(f"{path} cannot be read ({error.strerror})") from error


@contextmanager
def _faiss_limited(generation: Generation) -> Iterator[None]:
    """No part of a file can be longer than the file, nor repeat more often than it has vectors.

    FAISS's own limits are a terabyte and none; they hold for the whole process, so others get them back. Of product
    codes it wants to be allowed a table of 16 numbers for each list and code, though it makes none for fast-scan: up to
    16 times the lists' centres. Lattices are codes that we never write.
    """
    import faiss

    size = generation.size if details_of(generation).exact else 16 * generation.size
    limits = {"vector_byte": size, "loop": max(generation.n, _LEAST_LOOPS), "lattice_r2": 1}
    limits = {name: limit for name, limit in limits.items() if hasattr(faiss, f"set_deserialization_{name}_limit")}
    before = {name: getattr(faiss, f"get_deserialization_{name}_limit")() for name in limits}
    try:
        for name, limit in limits.items():
            getattr(faiss, f"set_deserialization_{name}_limit")(limit)
        yield
    finally:
        for name, limit in before.items():
            getattr(faiss, f"set_deserialization_{name}_limit")(limit)


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
