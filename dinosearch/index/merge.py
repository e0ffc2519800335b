"""Make one index of several: the shards of one run on many machines, or indexes of different sources.

Files and vectors are copied in the order in which one run finds them, so that the index is the same as that run's,
vector ids included. Nothing is read but the indexes, nothing embedded.
"""

from __future__ import annotations

import heapq
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dinosearch.errors import DinosearchError, IndexLocked, IndexUnusable, UsageError
from dinosearch.index.catalog import Catalog
from dinosearch.index.generation import write_generation
from dinosearch.index.lock import writer_lock
from dinosearch.index.rows import CopiedFile, Root
from dinosearch.index.survey import Shard, refuse_overlap

_BATCH = 4096
_COMMIT_FILES = 65536


@dataclass(frozen=True)
class MergeSummary:
    """The index that several became."""

    index: str
    model: str
    merged: int
    """Indexes that it was made of."""
    files: int
    images: int
    """Files that can be searched."""
    vectors: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class MergeProgress:
    """How far a merge is; the last one carries the summary."""

    done: int
    total: int
    """Files."""
    summary: MergeSummary | None = None


def merge_indexes(index_paths: Sequence[Path], *, into: Path) -> Generator[MergeProgress, None, None]:
    """Make the index `into` from others, which stay. What two of them know of a file, the first one decides.

    It is written aside and appears as a whole. Raises UsageError if its name is taken or the indexes are no whole, and
    IndexUnusable if they have different models.
    """
    began = time.monotonic()
    if into.exists():
        raise UsageError(f"{into} is there already. Give another --name")
    with ExitStack() as stack:
        catalogs = [stack.enter_context(Catalog.open(path)) for path in index_paths]
        for catalog in catalogs:
            stack.enter_context(catalog.snapshot())
        _check(catalogs)
        aside = into.with_name(f".{into.name}.merging")
        stack.enter_context(_made_aside(aside))
        total = sum(catalog.n_files(root) for catalog in catalogs for root in catalog.roots())
        first = catalogs[0]
        with Catalog.create(
            aside, fingerprint=first.fingerprint, model=first.meta("model"), dim=int(first.meta("dim"))
        ) as merged:
            merged.set_content_hash(first.meta("content_hash"))
            if (recall := first.recall()) is not None:
                merged.set_recall(recall)
            if (precision := first.precision()) is not None:
                merged.set_precision(precision)
            done = 0
            for root, parts in _roots(catalogs).items():
                number = merged.add_root(parts[0][1].kind, root)
                forgotten = dict.fromkeys(each for _, part in parts for each in part.options.forgotten)
                merged.set_options(number, replace(parts[0][1].options, forgotten=tuple(forgotten)))
                stamps = {part.stamp for _, part in parts}
                files = (file for file in _in_order(parts) if (file.row.path, file.row.member) not in forgotten)
                for batch in _batches(files):
                    _copy(merged, number, batch)
                    done += len(batch)
                    if done % _COMMIT_FILES < len(batch):
                        merged.commit()
                    yield MergeProgress(done, total)
                merged.set_stamp(number, stamps.pop() if len(stamps) == 1 else None)
                merged.commit()
            n_vectors = merged.n_vectors(fingerprint=merged.fingerprint)
            if n_vectors:
                merged.put_generation(
                    write_generation(merged, fingerprint=merged.fingerprint, dim=int(merged.meta("dim")))
                )
                merged.commit()
            summary = MergeSummary(
                index=into.name,
                model=merged.meta("model"),
                merged=len(catalogs),
                files=sum(merged.n_files(root) for root in merged.roots()),
                images=merged.n_images(),
                vectors=n_vectors,
                failed=merged.n_failed(),
                seconds=round(time.monotonic() - began, 3),
            )
    _publish(aside, into)
    yield MergeProgress(done, total, summary)


def _check(catalogs: list[Catalog]) -> None:
    """Raise unless the indexes go together."""
    first = catalogs[0]
    names = [catalog.path.parent.name for catalog in catalogs]
    if len({catalog.path.parent.resolve() for catalog in catalogs}) < len(catalogs):
        raise UsageError(f"an index is named twice: {', '.join(names)}. Name each once")
    for catalog, name in zip(catalogs, names, strict=True):
        if catalog.fingerprint != first.fingerprint:
            raise IndexUnusable(
                f"{names[0]} has vectors of {first.meta('model')} ({first.fingerprint}), {name} of "
                f"{catalog.meta('model')} ({catalog.fingerprint}). Index both with one model"
            )
        if catalog.meta("content_hash") != first.meta("content_hash"):
            raise IndexUnusable(
                f"{names[0]} knows files by {first.meta('content_hash')}, {name} by {catalog.meta('content_hash')}. "
                "Make the older one anew"
            )
    _check_shards(dict(zip(names, [catalog.shard() for catalog in catalogs], strict=True)))
    roots = [root for catalog in catalogs for root in catalog.roots().values()]
    by_location = {root.location: root for root in roots}
    for root in roots:
        other = by_location[root.location]
        if (root.kind, replace(root.options, forgotten=())) != (other.kind, replace(other.options, forgotten=())):
            raise UsageError(f"the indexes see {root.location} by different options. Index it alike in both")
    refuse_overlap(roots)


def _check_shards(shards: dict[str, str | None]) -> None:
    if not any(shards.values()):
        return
    if whole := [name for name, shard in shards.items() if shard is None]:
        raise UsageError(f"{whole[0]} is no shard, as the others are. Merge the shards first")
    parts = [Shard.parse(shard) for shard in shards.values() if shard]
    n = parts[0].n
    if any(part.n != n for part in parts):
        raise UsageError(f"these are shards of different cuts: {', '.join(map(str, parts))}. Merge those of one cut")
    counted = Counter(part.number for part in parts)
    if twice := [f"{number}/{n}" for number, count in counted.items() if count > 1]:
        raise UsageError(f"shard {', '.join(twice)} is named twice. Name each once")
    if missing := [f"{number}/{n}" for number in range(1, n + 1) if number not in counted]:
        raise UsageError(f"shard {', '.join(missing)} is missing. Name all {n}, or make it with index --shard")


@contextmanager
def _made_aside(aside: Path) -> Iterator[None]:
    """A fresh folder, locked, without what a killed merge left in it; removed if this one does not come to its end."""
    try:
        aside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinosearchError(f"cannot make {aside} ({error.strerror}). Choose a folder to write to") from error
    try:
        with writer_lock(aside):
            for path in aside.iterdir():
                if not path.name.startswith("lock"):
                    path.unlink()
            yield
    except IndexLocked:
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _publish(aside: Path, into: Path) -> None:
    try:
        aside.rename(into)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise DinosearchError(f"cannot make {into} ({error.strerror}). Give another --name") from error


def _roots(catalogs: list[Catalog]) -> dict[str, list[tuple[Catalog, Root]]]:
    """By location: which indexes follow a source, in the order in which the first of them came to it."""
    found: dict[str, list[tuple[Catalog, Root]]] = {}
    for catalog in catalogs:
        for root in catalog.roots().values():
            found.setdefault(root.location, []).append((catalog, root))
    return found


def _in_order(parts: list[tuple[Catalog, Root]]) -> Iterator[CopiedFile]:
    """All files of one source, each once, in the order of a scan."""
    streams = [catalog.files_to_copy(root.id) for catalog, root in parts]
    for _, same in itertools.groupby(heapq.merge(*streams, key=_place), key=_place):
        yield next(same)


def _place(file: CopiedFile) -> tuple[bool, bytes, bool, bytes, int]:
    """The catalog's order: names that are not UTF-8 come last."""
    row = file.row
    return *_order(row.path), *_order(row.member), row.frame


def _order(name: str) -> tuple[bool, bytes]:
    return any("\udc80" <= letter <= "\udcff" for letter in name), os.fsencode(name)


def _batches(files: Iterator[CopiedFile]) -> Iterator[list[CopiedFile]]:
    while batch := list(itertools.islice(files, _BATCH)):
        yield batch


def _copy(merged: Catalog, root: int, files: list[CopiedFile]) -> None:
    embedded = [file for file in files if file.vector is not None]
    if embedded:
        halves = np.stack([np.frombuffer(file.vector or b"", dtype=np.float16) for file in embedded])
        contents = [
            (row.content_hash or "", row.frame, row.width or 0, row.height or 0)
            for row in (file.row for file in embedded)
        ]
        merged.put_vectors(contents, halves, fingerprint=merged.fingerprint)
    merged.put_files(replace(file.row, root=root) for file in files)
