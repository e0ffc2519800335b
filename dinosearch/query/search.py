"""Ask an index for the images nearest to some vectors or image files. Knows nothing of how either is shown.

Matches are files: equal files are each listed, with the same score; ties are ordered by path.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dinosearch.errors import IndexUnusable, ModelMismatch
from dinosearch.images.decode import BadImage, decode
from dinosearch.images.read import in_threads
from dinosearch.images.sources import read_image
from dinosearch.index.catalog import Catalog
from dinosearch.index.conditions import Condition, check_columns
from dinosearch.index.contents import IndexedFile, as_path, indexed_file
from dinosearch.index.reader import norms
from dinosearch.index.rows import LiveFile
from dinosearch.index.sources import FollowedSources
from dinosearch.index.vectors import Candidates, Vectors, open_vectors

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder

_SPARE = 24  # candidates beyond `top`: some may be deleted files' or equal at the end of the list
_GROWTH = 8  # if they did not suffice
_TIE = 1e-6  # scores nearer than float32 products can tell apart
_BATCH = 256  # query images at a time
_FEW = 50_000  # vectors that fulfil conditions: so many are compared one by one, of more the nearest are looked through

_Files: TypeAlias = dict[int, list[tuple[str, LiveFile]]]
"""Path and file of each image, by the number of its vector."""


@dataclass(frozen=True)
class Match:
    """An indexed file, or a frame of one, that looks like the query."""

    rank: int
    """From 1."""
    path: Path | str
    """Absolute; a member of an archive is named below it, photos.zip/a.jpg. A str where it is a URL."""
    score: float
    """Cosine similarity, to six decimals."""
    frame: int = 0
    """Page or frame, from 0."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What a table says of it."""


@dataclass(frozen=True)
class Answer:
    """A query image and its matches, or why there are none."""

    query: str
    matches: list[Match]
    error: str | None = None


class OpenIndex:
    """An index open for searching. What a writer commits meanwhile is seen by the next search."""

    def __init__(self, index_path: Path, *, note: Callable[[str], None]) -> None:
        self._path = index_path
        self._note = note
        self._catalog = Catalog.open(index_path)
        self._version: int | None = self._catalog.data_version()
        self._vectors = open_vectors(self._catalog, note=note)
        self.fingerprint = self._vectors.fingerprint
        """The model that made the vectors; queries must come from the same one."""

    def __enter__(self) -> OpenIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._catalog.close()

    @property
    def dim(self) -> int:
        return int(self._catalog.meta("dim"))

    @property
    def precision(self) -> str:
        """What the index was asked to be embedded in. Another one serves, too: their vectors agree."""
        return self._catalog.precision() or "auto"

    def search(self, vectors: np.ndarray, *, top: int = 10, where: Sequence[str] = ()) -> list[list[Match]]:
        """The `top` files of highest cosine similarity for each unit vector float32 [n, dim], best first.

        where: conditions that all must be fulfilled, see `dinosearch.index.conditions`. Fewer matches where fewer
        files fulfil them or the index has fewer. Raises IndexUnusable if another model answers since the index was
        opened, UsageError for a condition that makes no sense.
        """
        self._refresh()
        among, known = self._narrowed(where) if where else (self._vectors, None)
        answers: list[list[Match]] = [[] for _ in vectors]
        pending = np.arange(len(vectors)) if top > 0 else np.empty(0, dtype=np.int64)
        k = min(top + _SPARE, len(among))
        while len(pending) and k:
            candidates = among.search(vectors[pending], k)
            files = self._files_of(candidates) if known is None else known
            open_ends = []
            for row, query in enumerate(pending):
                ids, scores = candidates.ids[row], candidates.scores[row]
                found = sorted(
                    {
                        (-round(float(score), 6), os.fsencode(path), file.frame): (path, file)
                        for number, score in zip(ids, scores, strict=True)
                        for path, file in files.get(int(number), ())
                    }.items(),  # a dict, because one path may be reached through two sources
                    key=itemgetter(0),
                )[:top]
                answers[query] = [
                    _match(rank, path, -key[0], file) for rank, (key, (path, file)) in enumerate(found, start=1)
                ]
                # What was not fetched scores no more than the last candidate; it must not tie with the last match.
                complete = len(found) == top and -found[-1][0][0] > scores[-1] + _TIE
                if not complete:
                    open_ends.append(query)
            if k == len(among):
                break
            pending = np.array(open_ends, dtype=np.int64)
            k = min(k * _GROWTH, len(among))
        return answers

    def matrix(self) -> np.ndarray:
        """All vectors [n, dim], mapped from the index's files where nothing newer has to be put behind them.

        Then float16, which lies beside a tuned type, is only nearly of unit length; all else is float32 and is.
        """
        self._refresh()
        parts = [vectors for _, vectors in self._vectors.parts()]
        if not parts:
            return np.empty((0, self.dim), np.float32)
        matrix = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if matrix.dtype != parts[0].dtype:  # stored float16 beside newer float32: in place, since they may be many
            stored = matrix[: len(parts[0])]
            stored /= norms(stored)[:, None]
        matrix.flags.writeable = False
        return matrix

    def files(self) -> list[IndexedFile]:
        """What can be searched, by source, path, member and frame, each with its row in `matrix()`."""
        self._refresh()
        sources = FollowedSources(self._catalog)
        numbers = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in self._vectors.parts())])
        live = list(self._catalog.live_files())
        wanted = np.array([file.vector_id for file in live], dtype=np.int64)
        rows = np.searchsorted(numbers, wanted)
        there = np.append(numbers, -1)[rows] == wanted  # of what another process has added since is no vector here yet
        return [
            indexed_file(file, sources, row) for file, row, here in zip(live, rows.tolist(), there, strict=True) if here
        ]

    def _narrowed(self, where: Sequence[str]) -> tuple[Vectors, _Files]:
        """What to search in, and the files that may answer, by vector."""
        conditions = [Condition.parse(text) for text in where]
        check_columns(conditions, list(self._catalog.metadata_columns()))
        files = self._by_vector(self._catalog.live_files(where=conditions))
        few = len(files) <= _FEW
        return (self._vectors.only(np.array(sorted(files), dtype=np.int64)) if few else self._vectors), files

    def _refresh(self) -> None:
        if self._catalog.outdated():
            reopened = Catalog.open(self._path)
            self._catalog.close()
            self._catalog, self._version = reopened, None
        version = self._catalog.data_version()
        if version == self._version:
            return
        vectors = open_vectors(self._catalog, note=self._note)
        if vectors.fingerprint != self.fingerprint:
            raise IndexUnusable(f"another model answers from {self._path} now. Open the index again")
        self._vectors, self._version = vectors, version

    def _files_of(self, candidates: Candidates) -> _Files:
        return self._by_vector(self._catalog.live_files(vector_ids=np.unique(candidates.ids).tolist()))

    def _by_vector(self, live: Iterable[LiveFile]) -> _Files:
        sources = FollowedSources(self._catalog)
        files: _Files = defaultdict(list)
        for file in live:
            files[file.vector_id].append((sources.shown_path(file), file))
        for same in files.values():  # of one path reached through two sources, the row with metadata counts: the last
            same.sort(key=lambda each: bool(each[1].metadata))
        return files


def _match(rank: int, path: str, score: float, file: LiveFile) -> Match:
    metadata = json.loads(file.metadata) if file.metadata else {}
    return Match(rank, as_path(path), score, file.frame, metadata)


def open_index(index_path: Path, *, note: Callable[[str], None] = lambda _: None) -> OpenIndex:
    """Open an index for searching. Raises IndexNotFound, or IndexUnusable when it is damaged or of a newer format."""
    return OpenIndex(index_path, note=note)


def query_images(
    index: OpenIndex, encoder: Encoder, paths: Iterable[str | Path], *, top: int = 10, where: Sequence[str] = ()
) -> Iterator[Answer]:
    """One answer for each image file, in order; a file that cannot be read has `error` instead of matches.

    Raises ModelMismatch if the encoder's model is not the index's.
    """
    if encoder.fingerprint != index.fingerprint:
        raise ModelMismatch(
            f"the index holds vectors of model {index.fingerprint}, the query of {encoder.fingerprint}. "
            "Query without --model, or index again with that model"
        )

    remaining = iter(paths)
    while batch := list(islice(remaining, _BATCH)):
        vectors, bad = image_vectors(encoder, [os.fspath(path) for path in batch])
        readable = [number for number in range(len(batch)) if number not in bad]
        matches = dict(zip(readable, index.search(vectors[readable], top=top, where=where), strict=True))
        for number, path in enumerate(batch):
            yield Answer(os.fspath(path), matches.get(number, []), bad.get(number))


def image_vectors(encoder: Encoder, paths: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Unit vectors float32 [n, dim] of files, URLs and members of archives, and by number why some have none."""

    def read(path: str) -> np.ndarray | BadImage:
        try:
            return decode(read_image(path).data, encoder.fit).pixels
        except BadImage as bad:
            return bad

    pictures = list(in_threads(read, paths))
    readable = {number: picture for number, picture in enumerate(pictures) if not isinstance(picture, BadImage)}
    vectors = np.zeros((len(paths), encoder.dim), np.float32)
    if readable:
        vectors[list(readable)] = encoder.encode(np.stack(list(readable.values())))
    return vectors, {n: _advised(picture) for n, picture in enumerate(pictures) if isinstance(picture, BadImage)}


_ADVICE = {
    "unreadable": "Check the path, and that it can be read",
    "truncated": "Copy or download it again",
    "corrupt": "Try a file that opens in an image viewer",
    "too-large": "Scale it down first",
}


def _advised(bad: BadImage) -> str:
    """Why an image has no vector, and what to do about it, which reasons of what is unsupported say themselves."""
    advice = _ADVICE.get(bad.status)
    return f"{bad.reason}. {advice}" if advice else bad.reason
