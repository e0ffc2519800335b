"""Erase files from an index: rows, vectors and every trace of them in its files. The images themselves stay.

What is still in its source is passed over from then on, so that no sync takes it in again, whatever it excludes; that
keeps the path in the source's options. What is gone from its source leaves no trace, not even its name; of archives,
the network and a disk that is away nobody can tell what is gone, so there the name is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.source import Source
from dinosearch.images.sources.local import LocalFiles
from dinosearch.images.sources.named import NamedImages
from dinosearch.index.catalog import ERASURE_WAITS, Catalog
from dinosearch.index.generation import remove_old_generations, write_generation
from dinosearch.index.lock import writer_lock
from dinosearch.index.rows import StoredFile
from dinosearch.index.sources import FollowedSources


@dataclass(frozen=True)
class Forgotten:
    """What was erased."""

    index: str
    files: int
    vectors: int
    """Of all models; those of contents that other files have too stay."""
    excluded: list[str]
    """Paths of those that may still be there, which the next sync passes over."""
    images: int
    """Files that can be searched now."""


def forget(
    index_path: Path,
    paths: Sequence[str],
    *,
    max_memory: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Forgotten:
    """Erase files, folders, members of archives, or all that a list or table names, by path, from an index.

    max_memory: bytes that writing the vectors anew may take, as in `write_generation`.
    Raises DinosearchError, with nothing changed, if the index has nothing of some path.
    """
    spellings = [_spellings(path) for path in paths]
    targets = [target for same in spellings for target in same]
    with Catalog.open(index_path):
        pass  # says what is wrong with the index before the lock makes a file
    with writer_lock(index_path), Catalog.open(index_path, writable=True, note=note) as catalog:
        sources = FollowedSources(catalog).by_root
        chosen = {root: _chosen(catalog, root, source, targets) for root, source in sources.items()}
        for path, same in zip(paths, spellings, strict=True):
            if not any(_is_meant(sources[root], stored, same) for root, files in chosen.items() for stored in files):
                raise DinosearchError(
                    f"nothing of {path} is in {index_path.name}; nothing was changed. Check the path; the vector of a "
                    "file that was deleted before the last run of index is dropped by index --prune"
                )
        ids = [stored.id for files in chosen.values() for stored in files]
        n_vectors = catalog.erase_files(ids)
        excluded = []
        for root, files in chosen.items():
            excluded += _keep_out(catalog, root, sources[root], files, targets)
        _write_vectors_anew(catalog, max_memory=max_memory, note=note)
        catalog.commit()
        remove_old_generations(catalog)
        if n_left := catalog.n_orphans():
            note(
                f"{n_left} vectors stay that no file has now: of files deleted or changed earlier, perhaps of these. "
                "index --prune drops them"
            )
        if not catalog.finish_erasure():
            note(ERASURE_WAITS)
        return Forgotten(index_path.name, len(ids), n_vectors, excluded, catalog.n_images())


def _spellings(path: str) -> list[str]:
    """Absolute, as an index may show it: as given, and with links in the folder followed, where it is there."""
    if "://" in path:
        return [path.rstrip("/")]
    literal = os.path.abspath(path)  # noqa: PTH100 - keeps surrogate escapes
    return list(dict.fromkeys([literal, _followed(path)]))


def _followed(path: str) -> str:
    """Without links but for the last name, which is what is indexed. Of the path as it is: .. leads out of a link."""
    folder, name = os.path.split(path.rstrip("/"))
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def _chosen(catalog: Catalog, root: int, source: Source, targets: list[str]) -> dict[StoredFile, str]:
    """Files of a root that lie in a target, with their shown paths."""
    found = {}
    for stored in catalog.stored_files(root, fingerprint=catalog.fingerprint):
        if _is_meant(source, stored, targets):
            found[stored] = source.shown_path(stored.image)
    return found


def _is_meant(source: Source, stored: StoredFile, targets: Sequence[str]) -> bool:
    """A file is meant by its own path, a folder above it, or the list that names it."""
    if not isinstance(source, NamedImages):
        return _lies_in(source.shown_path(stored.image), targets)
    path = source.file_path(stored.image)  # where a list names it, by whatever links
    shown = {source.shown_path(stored.image), *([] if path is None else [_followed(path)])}
    return source.location in targets or any(_lies_in(each, targets) for each in shown)


def _lies_in(shown: str, targets: Sequence[str]) -> bool:
    return any(shown == target or shown.startswith(f"{target.rstrip('/')}/") for target in targets)


def _keep_out(
    catalog: Catalog, root: int, source: Source, files: dict[StoredFile, str], targets: list[str]
) -> list[str]:
    """Paths that were added to the options of a source; one that was forgotten as a whole is followed no more."""
    if not files:
        return []
    # A list may name files elsewhere, which stay.
    if _lies_in(source.location, targets) and not catalog.n_files(root):
        catalog.remove_root(root)
        return []
    before = catalog.roots()[root].options
    there = [stored for stored in files if _is_there(source, stored)]
    if there:
        forgotten = dict.fromkeys([*before.forgotten, *((stored.path, stored.member) for stored in there)])
        catalog.set_options(root, replace(before, forgotten=tuple(forgotten)))
    return [files[stored] for stored in there]


def _is_there(source: Source, stored: StoredFile) -> bool:
    """Whether a sync might find it, now or later. Of archives and the network only a scan could tell, and of a disk
    that is away only its return: it is taken to be there.
    """
    path = source.file_path(stored.image)
    if path is None:
        return True
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        around = os.path.dirname(path)  # noqa: PTH120
        if isinstance(source, LocalFiles) and not isinstance(source, NamedImages):
            around = _nearest(around, within=source.base)
        return not _has_entries(around)
    except OSError:
        return True
    return True


def _nearest(folder: str, *, within: str) -> str:
    """The deepest of a folder and those above it, up to the base of its source, that is there."""
    while folder != within and len(folder) > len(within) and not os.path.isdir(folder):  # noqa: PTH112 - Path's raises
        folder = os.path.dirname(folder)  # noqa: PTH120
    return folder


def _has_entries(folder: str) -> bool:
    """It can be read, and is not the empty folder that a disk leaves where it was mounted."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _write_vectors_anew(catalog: Catalog, *, max_memory: int | None, note: Callable[[str], None]) -> None:
    fingerprint, before = catalog.fingerprint, catalog.generation()
    if before is None:
        return
    if catalog.n_vectors(fingerprint=fingerprint):
        generation = write_generation(
            catalog, fingerprint=fingerprint, dim=int(catalog.meta("dim")), max_memory=max_memory, note=note
        )
        catalog.put_generation(generation)
        catalog.forget_generations(but=generation.number)
    else:
        catalog.forget_generations(but=0)
