"""Ask an index for the images nearest to some vectors or image files. Knows nothing of how either is shown.

Matches are files: equal files are each listed, with the same score; ties are ordered by path.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.errors import IndexUnusable, ModelMismatch
from dinosearch.images.decode import BadImage, decode
from dinosearch.images.read import in_threads, read_bytes
from dinosearch.index.catalog import Catalog
from dinosearch.index.sources import FollowedSources
from dinosearch.index.vectors import Candidates, open_vectors

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder

_SPARE = 24  # candidates beyond `top`: some may be deleted files' or equal at the end of the list
_GROWTH = 8  # if they did not suffice
_TIE = 1e-6  # scores nearer than float32 products can tell apart
_BATCH = 256  # query images at a time


@dataclass(frozen=True)
class Match:
    """An indexed file that looks like the query."""

    rank: int
    """From 1."""
    path: Path
    """Absolute."""
    score: float
    """Cosine similarity, to six decimals."""


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
        self._version = self._catalog.data_version()
        self._vectors = open_vectors(self._catalog, note=note)
        self.fingerprint = self._vectors.fingerprint
        """The model that made the vectors; queries must come from the same one."""

    def __enter__(self) -> OpenIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._catalog.close()

    def search(self, vectors: np.ndarray, *, top: int = 10) -> list[list[Match]]:
        """The `top` files of highest cosine similarity for each unit vector float32 [n, dim], best first.

        Fewer where the index has fewer. Raises IndexUnusable if another model answers since the index was opened.
        """
        self._refresh()
        answers: list[list[Match]] = [[] for _ in vectors]
        pending = np.arange(len(vectors)) if top > 0 else np.empty(0, dtype=np.int64)
        k = min(top + _SPARE, len(self._vectors))
        while len(pending) and k:
            candidates = self._vectors.search(vectors[pending], k)
            paths = self._paths_of(candidates)
            open_ends = []
            for row, query in enumerate(pending):
                ids, scores = candidates.ids[row], candidates.scores[row]
                found = sorted(
                    {
                        (-round(float(score), 6), os.fsencode(path), path)
                        for number, score in zip(ids, scores, strict=True)
                        for path in paths.get(int(number), ())
                    }  # a set, because one path may be reached through two roots
                )[:top]
                answers[query] = [Match(rank, path, -score) for rank, (score, _, path) in enumerate(found, start=1)]
                # What was not fetched scores no more than the last candidate; it must not tie with the last match.
                complete = len(found) == top and -found[-1][0] > scores[-1] + _TIE
                if not complete:
                    open_ends.append(query)
            if k == len(self._vectors):
                break
            pending = np.array(open_ends, dtype=np.int64)
            k = min(k * _GROWTH, len(self._vectors))
        return answers

    def _refresh(self) -> None:
        version = self._catalog.data_version()
        if version == self._version:
            return
        vectors = open_vectors(self._catalog, note=self._note)
        if vectors.fingerprint != self.fingerprint:
            raise IndexUnusable(f"another model answers from {self._path} now. Open the index again")
        self._vectors, self._version = vectors, version

    def _paths_of(self, candidates: Candidates) -> dict[int, list[Path]]:
        sources = FollowedSources(self._catalog)
        paths: defaultdict[int, list[Path]] = defaultdict(list)
        for file in self._catalog.live_files(vector_ids=np.unique(candidates.ids).tolist()):
            paths[file.vector_id].append(Path(sources.shown_path(file)))
        return paths


def open_index(index_path: Path, *, note: Callable[[str], None] = lambda _: None) -> OpenIndex:
    """Open an index for searching. Raises IndexNotFound, or IndexUnusable when it is damaged or of a newer format."""
    return OpenIndex(index_path, note=note)


def query_images(index: OpenIndex, encoder: Encoder, paths: Iterable[Path], *, top: int = 10) -> Iterator[Answer]:
    """One answer for each image file, in order; a file that cannot be read has `error` instead of matches.

    Raises ModelMismatch if the encoder's model is not the index's.
    """
    if encoder.fingerprint != index.fingerprint:
        raise ModelMismatch(
            f"the index holds vectors of model {index.fingerprint}, the query of {encoder.fingerprint}. "
            "Query without --model, or index again with that model"
        )

    def read(path: Path) -> np.ndarray | BadImage:
        try:
            return decode(read_bytes(path), encoder.fit).pixels
        except BadImage as bad:
            return bad

    remaining = iter(paths)
    while batch := list(islice(remaining, _BATCH)):
        pictures = list(in_threads(read, batch))
        readable = [picture for picture in pictures if not isinstance(picture, BadImage)]
        size = encoder.fit.image_size
        vectors = encoder.encode(np.stack(readable) if readable else np.empty((0, size, size, 3), dtype=np.uint8))
        matches = iter(index.search(vectors, top=top))
        for path, picture in zip(batch, pictures, strict=True):
            if isinstance(picture, BadImage):
                yield Answer(str(path), [], picture.reason)
            else:
                yield Answer(str(path), next(matches))
