"""Bring an index up to date with its folders: scan, compare, match moves, embed, write the FAISS file.

The order keeps every promise: the lock first; nothing is changed before all roots were scanned and the share of files
that are gone was judged; moves and deletions in one transaction; then embedding, saved every few seconds; last the
FAISS file, and in one transaction with it the switch to another model. Killed anywhere, the state before keeps
answering and the next run goes on from there. A content is embedded once for a model, so going back to an
earlier model is cheap.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dinosearch.errors import DinosearchError, IndexNotFound, UsageError
from dinosearch.images.decode import BadImage, content_hash
from dinosearch.images.find import Scan, find_images
from dinosearch.images.machine import n_cores
from dinosearch.images.read import in_threads
from dinosearch.index import generation
from dinosearch.index.catalog import OK, Catalog, StoredFile, is_index
from dinosearch.index.compare import Changes, DecoderKeys, Wanted, compare, match_moves, refuse_mass_deletion
from dinosearch.index.embed import Embedding, decoder_keys, read_stable
from dinosearch.index.lock import writer_lock

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder
    from dinosearch.vit.folder import ModelFolder

_PROGRESS_SECONDS = 0.1
_BYTES_PER_IMAGE = 1000  # rows and their search trees in the catalog, without the vector


@dataclass(frozen=True)
class SyncSummary:
    """What a sync did; every file found is in exactly one of new, changed, moved, unchanged and failed."""

    index: str
    model: str
    """The model that answers now."""
    new: int
    """A copy of a known image is new too, with nothing embedded."""
    changed: int
    moved: int
    unchanged: int
    deleted: int
    failed: int
    embedded: int
    """Images that went through the model."""
    images: int
    """Files that can be searched now."""
    images_per_second: float
    """Files read, from the first read to the last commit, without the start of the engine."""
    seconds: float


@dataclass(frozen=True)
class SyncProgress:
    """Where a sync is; the last one carries the summary."""

    stage: str
    """scan, match (of moved files), embed, finish."""
    done: int = 0
    total: int = 0
    """Files of this stage; 0 while it is not known."""
    failed: int = 0
    images_per_second: float = 0.0
    summary: SyncSummary | None = None


def sync_index(
    roots: list[Path],
    *,
    index_path: Path,
    model: ModelFolder,
    encoder_for: Callable[[], Encoder],
    allow_deletions: bool = False,
    prune: bool = False,
    workers: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Generator[SyncProgress, None, None]:
    """Make or update the index in `index_path` from folders; roots it has besides stay as they are.

    With another model than the index answers with, all its roots are embedded anew beside the old vectors, which
    answer until everything is there. `encoder_for` is called once something has to be embedded, never before.
    `allow_deletions` accepts that more than 20 % of a root's files are gone; `prune` forgets vectors that no file
    needs. Close the generator (`contextlib.closing`) when leaving it early: that saves what was embedded.
    Raises DinosearchError when a root is missing, empty, half gone or inside another one, and IndexLocked.
    """
    began = time.monotonic()
    workers = workers or n_cores()
    roots = list(dict.fromkeys(root.resolve() for root in roots))
    yield SyncProgress("scan")
    # A new index gets its folder only when its roots are sound; an existing one is locked before the long scan.
    scans = {} if is_index(index_path) else _scan(roots, note)
    _make_folder(index_path)
    with writer_lock(index_path), _open_or_create(index_path, model, note) as catalog:
        switching = catalog.fingerprint != model.fingerprint
        if switching:
            roots = list(dict.fromkeys([*roots, *catalog.roots().values()]))
        _refuse_overlap([*roots, *catalog.roots().values()])
        scans = scans or _scan(roots, note)
        keys = decoder_keys(workers)
        changes = Changes()
        for root in roots:
            number = catalog.add_root(root)
            stored = catalog.stored_files(number, fingerprint=model.fingerprint)
            compare(changes, root=number, root_path=root, scan=scans[root], stored=stored, keys=keys)
        moves = yield from _match_moves(changes, workers)
        if not allow_deletions:
            refuse_mass_deletion(changes)
        outcomes = _apply(catalog, changes, moves, keys)
        _check_disk(index_path, len(changes.wanted), model.dim)

        embedding = Embedding(catalog, model=model, encoder_for=encoder_for, keys=keys, workers=workers)
        shown = time.monotonic()
        for _ in embedding.run(changes.wanted):
            if time.monotonic() - shown > _PROGRESS_SECONDS:
                shown = time.monotonic()
                yield _progress_of(embedding, len(changes.wanted))
        yield _progress_of(embedding, len(changes.wanted))
        outcomes += embedding.outcomes

        yield SyncProgress("finish")
        if switching and changes.n_out_of_reach:
            note(
                f"{changes.n_out_of_reach} images lie in folders that cannot be listed and have no vector "
                f"of {model.name} yet: {catalog.meta('model')} answers until they are within reach or gone"
            )
        else:
            _finish(catalog, model, prune=prune)
        summary = SyncSummary(
            index=index_path.name,
            model=catalog.meta("model"),
            new=outcomes["new"],
            changed=outcomes["changed"],
            moved=outcomes["moved"],
            unchanged=outcomes["unchanged"],
            deleted=outcomes["deleted"],
            failed=outcomes["failed"],
            embedded=embedding.n_embedded,
            images=catalog.n_images(),
            images_per_second=round(embedding.images_per_second, 2),
            seconds=round(time.monotonic() - began, 3),
        )
    yield SyncProgress("finish", summary=summary)


def _scan(roots: list[Path], note: Callable[[str], None]) -> dict[Path, Scan]:
    scans = {}
    for root in roots:
        scan = scans[root] = find_images(root)
        if not scan.images:
            raise DinosearchError(
                f"no image found in {root}; nothing was changed. Check the path, and that its disk is attached"
            )
        for folder, reason in scan.unreadable_folders:
            note(f"{root / folder} cannot be listed ({reason}): what lies there stays as it was")
    return scans


def _make_folder(index_path: Path) -> None:
    try:
        index_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinosearchError(
            f"cannot make {index_path} ({error.strerror}). Set DINOSEARCH_INDEXES to a folder that you may write to"
        ) from error


def _open_or_create(index_path: Path, model: ModelFolder, note: Callable[[str], None]) -> Catalog:
    try:
        return Catalog.open(index_path, writable=True, note=note)
    except IndexNotFound:
        return Catalog.create(index_path, fingerprint=model.fingerprint, model=model.name, dim=model.dim, note=note)


def _refuse_overlap(roots: list[Path]) -> None:
    for outer in roots:
        for inner in roots:
            if outer in inner.parents:
                raise UsageError(
                    f"{inner} lies inside {outer}, which is indexed here too. Index one of them, or use two indexes"
                )


@dataclass(frozen=True)
class _Move:
    wanted: Wanted
    """The file under its new path."""
    stored: StoredFile
    """The row it has under the old one."""
    mtime_ns: int


def _match_moves(changes: Changes, workers: int) -> Generator[SyncProgress, None, list[_Move]]:
    """Takes out of `changes` what is gone here and new there with the same content."""
    news = changes.news_like_gone()
    hashes: dict[Wanted, str] = {}
    times: dict[Wanted, int] = {}
    shown = time.monotonic()
    for wanted, content, mtime_ns in in_threads(_hash_of, news, workers=workers, ahead=4 * workers):
        if content:
            hashes[wanted], times[wanted] = content, mtime_ns
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            yield SyncProgress("match", len(hashes), len(news))
    return [_Move(wanted, stored, times[wanted]) for wanted, stored in match_moves(hashes, changes).items()]


def _hash_of(wanted: Wanted) -> tuple[Wanted, str, int]:
    try:
        stable = read_stable(wanted.path)
    except BadImage:
        return wanted, "", 0  # it is read again with the other new files, and reported there
    # A file that another has replaced since the scan is none of the files that are gone: its size was not compared.
    return wanted, content_hash(stable.data), stable.mtime_ns


def _apply(catalog: Catalog, changes: Changes, moves: list[_Move], keys: DecoderKeys) -> Counter[str]:
    """Moves and deletions, in one transaction. Moved files that need reading join `changes.wanted`."""
    outcomes = Counter(unchanged=changes.n_unchanged, failed=changes.n_failed)
    for move in moves:
        wanted, stored = move.wanted, move.stored
        if stored.status == OK and stored.embedded:
            outcomes["moved"] += 1
        elif stored.status != OK and stored.decoders == keys.of(stored.status):
            outcomes["failed"] += 1
        else:
            changes.wanted.append(replace(wanted, stored=stored, moved=True))
    catalog.move_files(
        (m.stored.id, m.wanted.root, m.wanted.found.path, m.wanted.found.size, m.mtime_ns) for m in moves
    )
    for gone in changes.gone.values():
        catalog.remove_files(stored.id for stored in gone)
        outcomes["deleted"] += len(gone)
    catalog.commit()
    return outcomes


def _check_disk(index_path: Path, n_images: int, dim: int) -> None:
    """Two bytes a number in the catalog, four in the FAISS file."""
    needed = n_images * (6 * dim + _BYTES_PER_IMAGE)
    free = shutil.disk_usage(index_path).free
    if needed > free:
        raise DinosearchError(
            f"{n_images} images need {needed / 1e9:.1f} GB in {index_path}, {free / 1e9:.1f} GB are free. "
            "Free some space, or set DINOSEARCH_INDEXES to a folder on another disk"
        )


def _progress_of(embedding: Embedding, total: int) -> SyncProgress:
    return SyncProgress("embed", embedding.n_done, total, embedding.outcomes["failed"], embedding.images_per_second)


def _finish(catalog: Catalog, model: ModelFolder, *, prune: bool) -> None:
    """Let `model` answer, from a FAISS file that has all its vectors, from one commit on."""
    wanted = generation.wanted_generation(catalog, model.fingerprint)
    if catalog.fingerprint != model.fingerprint:
        catalog.set_model(fingerprint=model.fingerprint, model=model.name, dim=model.dim)
    n_pruned = catalog.prune() if prune else 0
    if (wanted or n_pruned) and catalog.n_vectors(fingerprint=model.fingerprint):
        catalog.put_generation(generation.write_generation(catalog, fingerprint=model.fingerprint, dim=model.dim))
    catalog.commit()
    generation.remove_old_generations(catalog)
    if n_pruned:
        catalog.compact()
