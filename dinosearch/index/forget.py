"""Erase files from an index: rows, vectors and every trace of them in its files. The images themselves stay.

What is still in its source is passed over from then on, so that no sync takes it in again, whatever it excludes; that
keeps the path in the source's options. What is gone from its source leaves no trace, not even its name; of archives and
the network only a scan could tell what is gone, so there the name is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.source import FoundImage, Source
from dinosearch.index.catalog import Catalog
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


def forget(index_path: Path, paths: Sequence[str], *, note: Callable[[str], None] = lambda _: None) -> Forgotten:
    """Erase files, folders or members of archives, by path as shown, from an index.

    Raises DinosearchError, with nothing changed, if the index has nothing of some path.
    """
    targets = [_target(path) for path in paths]
    with Catalog.open(index_path):
        pass  # says what is wrong with the index before the lock makes a file
    with writer_lock(index_path), Catalog.open(index_path, writable=True, note=note) as catalog:
        sources = FollowedSources(catalog).by_root
        chosen = {root: _chosen(catalog, root, source, targets) for root, source in sources.items()}
        for path, target in zip(paths, targets, strict=True):
            if not any(_lies_in(shown, [target]) for files in chosen.values() for shown in files.values()):
                raise DinosearchError(f"nothing of {path} is in {index_path.name}; nothing was changed. Check the path")
        ids = [stored.id for files in chosen.values() for stored in files]
        n_vectors = catalog.erase_files(ids)
        excluded = []
        for root, files in chosen.items():
            excluded += _keep_out(catalog, root, sources[root], files, targets)
        _write_vectors_anew(catalog)
        catalog.commit()
        remove_old_generations(catalog)
        if not catalog.finish_erasure():
            note("another program reads the index: the next run of index or forget removes the last traces on the disk")
        return Forgotten(index_path.name, len(ids), n_vectors, excluded, catalog.n_images())


def _target(path: str) -> str:
    """Absolute, as the index shows it: links in the folder are followed, where it is there."""
    if "://" in path:
        return path.rstrip("/")
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - keeps surrogate escapes
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def _chosen(catalog: Catalog, root: int, source: Source, targets: list[str]) -> dict[StoredFile, str]:
    """Files of a root that lie in a target, with their shown paths."""
    found = {}
    for stored in catalog.stored_files(root, fingerprint=catalog.fingerprint):
        shown = source.shown_path(_image(stored))
        if _lies_in(shown, targets):
            found[stored] = shown
    return found


def _image(stored: StoredFile) -> FoundImage:
    return FoundImage(stored.path, stored.size, stored.mtime_ns, stored.member)


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
    """Whether a sync might find it: of archives and the network only a scan could tell, so it is taken to be there."""
    path = source.file_path(_image(stored))
    return path is None or os.path.lexists(path)


def _write_vectors_anew(catalog: Catalog) -> None:
    fingerprint, before = catalog.fingerprint, catalog.generation()
    if before is None:
        return
    if catalog.n_vectors(fingerprint=fingerprint):
        generation = write_generation(catalog, fingerprint=fingerprint, dim=int(catalog.meta("dim")))
        catalog.put_generation(generation)
        catalog.forget_generations(but=generation.number)
    else:
        catalog.forget_generations(but=0)
