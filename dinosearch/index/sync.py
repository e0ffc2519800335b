"""Bring an index up to date with its sources: survey, compare, match moves, embed, write the FAISS file.

The order keeps every promise: the lock first; nothing is changed before all sources were scanned and the share of files
that are gone was judged; moves and deletions in one transaction; then embedding, saved every few seconds; last the
FAISS file, and in one transaction with it the switch to another model, with what this one cannot read. Killed
anywhere, the state before keeps answering and the next run goes on from there. A content is embedded once for a model,
so going back to an earlier model is cheap.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dinosearch.encoder.encoder import check_precision
from dinosearch.errors import DinosearchError, IndexNotFound, UsageError
from dinosearch.images.decode import BadImage, content_hash
from dinosearch.images.machine import n_cores
from dinosearch.images.names import passed_over_test
from dinosearch.images.read import in_threads
from dinosearch.images.reading import Reading, readings
from dinosearch.images.source import FoundImage, Source
from dinosearch.images.sources import known_source
from dinosearch.index import generation
from dinosearch.index.catalog import ERASURE_WAITS, Catalog, is_index
from dinosearch.index.compare import Changes, View, Wanted, compare, match_moves, refuse_mass_deletion
from dinosearch.index.embed import MOST_FRAMES, Embedding, EncoderPlan
from dinosearch.index.limits import left_for_vectors, limits_for
from dinosearch.index.lock import writer_lock
from dinosearch.index.rows import OK, DecoderKeys, FileRow, Root, StoredFile
from dinosearch.index.survey import GivenOptions, Shard, Survey, refuse_overlap, say_options, survey

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
    mb_per_second: float = 0.0
    limit: str = ""
    """The stage that the others wait for: disk, decode, model or write."""
    summary: SyncSummary | None = None


def sync_index(
    sources: Iterable[Source | Path],
    *,
    index_path: Path,
    model: ModelFolder,
    encoder_for: Callable[[EncoderPlan], Encoder],
    options: GivenOptions | None = None,
    shard: Shard | None = None,
    allow_deletions: bool = False,
    verify: bool = False,
    prune: bool = False,
    workers: int | None = None,
    max_memory: int | None = None,
    recall: float | None = None,
    precision: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Generator[SyncProgress, None, None]:
    """Make or update the index in `index_path` from sources, or folders; those it has besides stay as they are.

    With another model than the index answers with, all its sources are embedded anew beside the old vectors, which
    answer until everything is there. `encoder_for` is called once something has to be embedded, never before.
    `options` are remembered with each of `sources`. `shard` takes only that part of the images, and is the index's for
    good. `allow_deletions` accepts that more than 20 % of the files of one of them are gone; `verify` reads unchanged
    files too; `prune` forgets vectors that no file needs. `recall`, remembered by the index, is the share of the 10
    nearest that a large index must find. `precision`, remembered too, is what the encoder is asked to compute in;
    images that have vectors keep them, since those of all precisions agree. Close the generator
    (`contextlib.closing`) when leaving it early: that saves what was embedded.
    Raises DinosearchError when a source is missing, empty, half gone or inside another one, and IndexLocked.
    """
    began = time.monotonic()
    options = options or GivenOptions()
    if precision is not None:
        check_precision(precision)
    limits = limits_for(model, workers=workers or n_cores(), max_memory=max_memory)
    asked = _as_sources(sources)
    given = dict.fromkeys(asked, options)  # of other sources that a switch of models adds, the options stay
    yield SyncProgress("scan")
    # A new index gets its folder only when its sources are sound; an existing one is locked before the long scan.
    surveys: list[Survey] = []
    if not is_index(index_path):
        refuse_overlap(asked.values())
        surveys = [survey(source, None, options, shard=shard, note=note) for source in asked.values()]
    _make_folder(index_path)
    with writer_lock(index_path), _open_or_create(index_path, model, shard, note) as catalog:
        if verify:
            catalog.check()
        catalog.finish_erasure()
        if recall is not None:
            catalog.set_recall(recall)
        _set_precision(catalog, precision, note)
        shard = _own_shard(catalog, shard, note)
        roots = {root.location: root for root in catalog.roots().values()}
        switching = catalog.fingerprint != model.fingerprint
        if switching:
            asked |= {root.location: known_source(root.kind, root.location) for root in roots.values()} | asked
        refuse_overlap([*asked.values(), *roots.values()])
        if not surveys:
            surveys = [
                survey(
                    source,
                    roots.get(location),
                    given.get(location, GivenOptions()),
                    known_names=_known_names(catalog, roots.get(location)),
                    verify=verify,
                    shard=shard,
                    note=note,
                )
                for location, source in asked.items()
            ]
        say_options(surveys, given, note)
        keys = limits.decoder_keys()
        changes = Changes()
        numbers = {}
        for each in surveys:
            number = numbers[each.source.location] = _remember(catalog, each, roots.get(each.source.location))
            stored = catalog.stored_files(number, fingerprint=model.fingerprint, keys=keys)
            compare(changes, _view(number, each, verify=verify), stored, keys)
        lost = [root for location, root in roots.items() if location not in asked and _is_lost(root)]
        for root in lost:
            changes.add_lost(catalog.stored_files(root.id, fingerprint=model.fingerprint, keys=keys))
        moves = yield from _match_moves(changes, catalog.meta("content_hash"), limits.workers)
        refuse_mass_deletion(changes, but=given if allow_deletions else ())
        _refuse_forgotten_again(catalog, lost, changes, moves)
        outcomes = _apply(catalog, changes, moves, keys)
        _say_lost(catalog, lost, note)
        _check_disk(index_path, len(changes.wanted), model.dim)

        embedding = Embedding(catalog, model=model, encoder_for=encoder_for, limits=limits)
        shown = time.monotonic()
        for _ in embedding.run(changes.wanted):
            if time.monotonic() - shown > _PROGRESS_SECONDS:
                shown = time.monotonic()
                yield _progress_of(embedding, len(changes.wanted))
        yield _progress_of(embedding, len(changes.wanted))
        outcomes += embedding.outcomes
        if embedding.n_pages_dropped:
            note(
                f"{embedding.n_pages_dropped} pages or frames after the first {MOST_FRAMES} of a file were passed over"
            )
        if embedding.n_altered:
            note(
                f"{embedding.n_altered} files hold something else than before under the same size and time: they are "
                "embedded anew. Check their disk if nobody changed them"
            )

        yield SyncProgress("finish")
        _remember_stamps(catalog, surveys, numbers)
        if switching and changes.n_out_of_reach:
            one = changes.n_out_of_reach == 1
            images, they = ("image is", "it is") if one else ("images are", "they are")
            note(
                f"{changes.n_out_of_reach} {images} out of reach now, without a vector of {model.name} yet: "
                f"{catalog.meta('model')} answers until {they} within reach or gone"
            )
            catalog.commit()
        else:
            held_back = embedding.held_back
            _finish(catalog, model, held_back, prune=prune, verify=verify, max_memory=max_memory, note=note)
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


def _as_sources(sources: Iterable[Source | Path]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for each in sources:
        source = known_source("folder", str(each.resolve())) if isinstance(each, Path) else each
        first = found.setdefault(source.location, source)
        if first.kind != source.kind:
            raise UsageError(f"{source.location} is given as a {first.kind} and as {source.kind}. Give one of them")
    return found


def _make_folder(index_path: Path) -> None:
    try:
        index_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinosearchError(
            f"cannot make {index_path} ({error.strerror}). Set DINOSEARCH_INDEXES to a folder that you may write to"
        ) from error


def _open_or_create(index_path: Path, model: ModelFolder, shard: Shard | None, note: Callable[[str], None]) -> Catalog:
    try:
        return Catalog.open(index_path, writable=True, note=note)
    except IndexNotFound:
        return Catalog.create(
            index_path,
            fingerprint=model.fingerprint,
            model=model.name,
            dim=model.dim,
            shard=str(shard) if shard else None,
            note=note,
        )


def _own_shard(catalog: Catalog, shard: Shard | None, note: Callable[[str], None]) -> Shard | None:
    """The part that the index holds; it stays the same for good."""
    own = catalog.shard()
    if shard and str(shard) != own:
        held = f"shard {own}" if own else "all images"
        raise UsageError(f"the index in {catalog.path.parent} holds {held}, not shard {shard}. Give another --name")
    if own and not shard:
        note(f"{catalog.path.parent.name} holds shard {own}: other images are passed over")
    return Shard.parse(own) if own else None


def _set_precision(catalog: Catalog, precision: str | None, note: Callable[[str], None]) -> None:
    """What was asked for is remembered, also where it cannot be had: then the encoder computes in the usual one."""
    before = catalog.precision() or "auto"
    if precision is not None:
        catalog.set_precision(precision)
    elif before != "auto":
        note(f"{catalog.path.parent.name}: precision {before}, as before")


def _known_names(catalog: Catalog, root: Root | None) -> list[str]:
    """Of files that were named one by one: the names of earlier runs."""
    if root is None or root.kind != "files":
        return []
    return [stored.path for stored in catalog.stored_files(root.id, fingerprint=catalog.fingerprint)]


def _is_lost(root: Root) -> bool:
    """Whether a source is not there that holds its images itself, as lists and patterns do not."""
    return root.kind in ("folder", "files", "archive") and not os.path.exists(root.location)  # noqa: PTH110


def _refuse_forgotten_again(catalog: Catalog, lost: Iterable[Root], changes: Changes, moves: list[_Move]) -> None:
    """Of a source that was moved by other means than `relocate`, what is forgotten would come back under a new path."""
    moved = {move.stored.id for move in moves}
    new = [wanted for wanted in changes.wanted if wanted.stored is None]
    for root in lost:
        again = [wanted for wanted in new if _is_forgotten(wanted.found, root)] if root.options.forgotten else []
        if again and any(
            stored.id in moved for stored in catalog.stored_files(root.id, fingerprint=catalog.fingerprint)
        ):
            raise DinosearchError(
                f"images of {root.location} are elsewhere now, and {again[0].path} looks like one that is forgotten "
                f"there; nothing was changed. Run dinosearch relocate {root.location} NEW first, or --exclude it"
            )


def _is_forgotten(found: FoundImage, root: Root) -> bool:
    """By its path below a root, wherever that may lie now."""
    return any(
        found.member == member and (found.path == path or found.path.endswith(f"/{path}"))
        for path, member in root.options.forgotten
    )


def _say_lost(catalog: Catalog, lost: Iterable[Root], note: Callable[[str], None]) -> None:
    """Sources that are not there; one whose images all turned up elsewhere is followed no more."""
    for root in lost:
        if n_files := catalog.n_files(root.id):
            images = "1 image stays" if n_files == 1 else f"{n_files} images stay"
            note(f"{root.location} is not there: {images} in the index until dinosearch forget {root.location}")
        else:
            catalog.remove_root(root.id)
            note(f"{root.location} is not there, and all of its images are elsewhere: it is followed no more")


def _remember(catalog: Catalog, each: Survey, root: Root | None) -> int:
    """Number of a source in the catalog, with the options it is seen by from now on."""
    number = catalog.add_root(each.source.kind, each.source.location)
    if root is None or root.options != each.options:
        catalog.set_options(number, each.options)
        if root is not None and root.options.all_pages and not each.options.all_pages:
            catalog.forget_frames(number)
    return number


def _remember_stamps(catalog: Catalog, surveys: list[Survey], numbers: dict[str, int]) -> None:
    """Only now that everything was looked at: a run that was cut short looks again."""
    for each in surveys:
        number = numbers[each.source.location]
        if each.stamp is not None and each.scan is not None and not catalog.has_untrusted_times(number):
            catalog.set_stamp(number, each.stamp)


def _view(number: int, each: Survey, *, verify: bool) -> View:
    source = each.source

    passed_over = passed_over_test(each.options)

    def excluded(image: FoundImage) -> bool:
        """Of archives and the network only the name can tell."""
        path = source.file_path(image)
        return passed_over(image.member or image.path) if path is None else os.path.lexists(path)

    return View(
        number,
        source,
        each.scan,
        all_pages=each.options.all_pages,
        verify=verify,
        excluded=excluded if each.seen_otherwise else lambda _: False,
    )


@dataclass(frozen=True)
class _Move:
    wanted: Wanted
    """The file under its new path."""
    stored: StoredFile
    """The row it has under the old one."""
    mtime_ns: int


def _match_moves(changes: Changes, algorithm: str, workers: int) -> Generator[SyncProgress, None, list[_Move]]:
    """Takes out of `changes` what is gone here and new there with the same content."""
    news = changes.news_like_gone()
    hashes: dict[Wanted, str] = {}
    times: dict[Wanted, int] = {}
    shown = time.monotonic()

    def hash_of(reading: Reading[Wanted]) -> tuple[Wanted, str, int]:
        try:
            stable = reading.stable_bytes()
        except BadImage:
            return reading.wanted, "", 0  # it is read again with the other new files, and reported there
        # A file that another has replaced since the scan is none of the files that are gone: its size was not compared.
        return reading.wanted, content_hash(stable.data, algorithm), stable.mtime_ns

    for wanted, content, mtime_ns in in_threads(hash_of, readings(news), workers=workers, ahead=4 * workers):
        if content:
            hashes[wanted], times[wanted] = content, mtime_ns
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            yield SyncProgress("match", len(hashes), len(news))
    return [_Move(wanted, stored, times[wanted]) for wanted, stored in match_moves(hashes, changes).items()]


def _apply(catalog: Catalog, changes: Changes, moves: list[_Move], keys: DecoderKeys) -> Counter[str]:
    """Moves and deletions, in one transaction. Moved files that need reading join `changes.wanted`."""
    outcomes = Counter(unchanged=changes.n_unchanged, failed=changes.n_failed)
    for move in moves:
        wanted, stored = move.wanted, move.stored
        if stored.status == OK and stored.embedded and (stored.frames is not None) == wanted.all_pages:
            outcomes["moved"] += 1
        elif stored.status != OK and stored.decoders == keys.of(stored.status):
            outcomes["failed"] += 1
        else:
            changes.wanted.append(replace(wanted, stored=stored, moved=True))
    catalog.move_files((move.stored.id, _moved_row(move)) for move in moves)
    catalog.set_metadata(changes.relabelled)
    for gone in [*changes.gone.values(), changes.excluded]:
        catalog.remove_files(stored.id for stored in gone)
        outcomes["deleted"] += len(gone)
    catalog.commit()
    return outcomes


def _moved_row(move: _Move) -> FileRow:
    found, stored = move.wanted.found, move.stored
    return FileRow(
        move.wanted.root,
        found.path,
        found.size,
        move.mtime_ns,
        stored.content_hash,
        stored.status,
        member=found.member,
        metadata=found.metadata,
    )


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
    return SyncProgress(
        "embed",
        done=embedding.n_done,
        total=total,
        failed=embedding.outcomes["failed"],
        images_per_second=embedding.images_per_second,
        mb_per_second=embedding.mb_per_second,
        limit=embedding.limit,
    )


def _finish(
    catalog: Catalog,
    model: ModelFolder,
    held_back: list[FileRow],
    *,
    prune: bool,
    verify: bool,
    max_memory: int | None,
    note: Callable[[str], None],
) -> None:
    """Let `model` answer, from a FAISS file that has all its vectors, from one commit on."""
    wanted = generation.wanted_generation(catalog, model.fingerprint, hashed=verify)
    if wanted is None:
        present = catalog.generation()
        assert present is not None
        now = generation.restamped(catalog.path.parent, present)
        if now != present:
            catalog.restamp(now)
    if catalog.fingerprint != model.fingerprint:
        _switch(catalog, model, held_back)
    n_pruned = catalog.prune() if prune else 0
    if (wanted or n_pruned) and catalog.n_vectors(fingerprint=model.fingerprint):
        left = left_for_vectors(model, max_memory)
        written = generation.write_generation(
            catalog, fingerprint=model.fingerprint, dim=model.dim, max_memory=left, note=note
        )
        catalog.put_generation(written)
    if n_pruned:  # the generation before has their vectors too
        present = catalog.generation() if catalog.n_vectors(fingerprint=model.fingerprint) else None
        catalog.forget_generations(but=present.number if present else 0)
    catalog.commit()
    generation.remove_old_generations(catalog)
    if n_pruned and not catalog.finish_erasure():
        note(ERASURE_WAITS)


def _switch(catalog: Catalog, model: ModelFolder, held_back: list[FileRow]) -> None:
    """Let another model answer, with what it cannot read. Raises DinosearchError if that is all."""
    before, n_before = catalog.meta("model"), catalog.n_images() if held_back else 0
    catalog.put_files(held_back)
    catalog.set_model(fingerprint=model.fingerprint, model=model.name, dim=model.dim)
    if n_before and not catalog.n_images():
        reason = next(row.reason for row in held_back if row.status != OK)
        raise DinosearchError(
            f"no image can be embedded with {model.name} ({reason}); {before} still answers. Choose another --model, "
            "or check the images"
        )
