"""Read, decode and embed files into the catalog, in one bounded pipeline. Knows nothing of scanning or FAISS.

Reader threads read, hash and decode; the caller's thread feeds the encoder and writes. A content is decoded and
embedded once: what the catalog knows is not decoded, and a copy of a file still under way waits for its vector.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BadImage, Fit, content_hash, decode, decoders, pixel_budget
from dinosearch.images.read import in_threads
from dinosearch.index.catalog import Catalog
from dinosearch.index.compare import DecoderKeys, Wanted
from dinosearch.index.reading import Reading, readings
from dinosearch.index.rows import OK, UNREADABLE, Content, FileRow

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder
    from dinosearch.vit.folder import ModelFolder

SAVE_SECONDS = 2.0
SAVE_FILES = 1000

_AHEAD_BYTES = 128 << 20  # pixels waiting for the encoder, whatever their size
_LULL_SECONDS = 0.5  # with nothing for the encoder in so long, what it has begun is finished and progress is shown


@dataclass(frozen=True, slots=True)
class _Read:
    """A file after its reader thread: what is known of its content, or its pixels; neither if a copy is under way."""

    wanted: Wanted
    row: FileRow
    content: Content | None = None
    pixels: np.ndarray | None = None


class Embedding:
    """One run over the files that have to be read. `run` yields now and then; the counts tell how far it came."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        model: ModelFolder,
        encoder_for: Callable[[], Encoder],
        keys: DecoderKeys,
        workers: int,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        """Files by new, changed, moved, unchanged, failed."""
        self.n_embedded = 0
        self.n_altered = 0
        """Verified files whose content is another one though size and time are the same."""
        self._catalog = catalog
        self._fingerprint = model.fingerprint
        self._dim = model.dim
        self._fit = Fit(model.image_size, mode=model.fit, crop_pct=model.crop_pct, interpolation=model.interpolation)
        self._encoder_for = encoder_for
        self._encoder: Encoder | None = None
        self._keys = keys
        self._hash_algorithm = catalog.meta("content_hash")
        self._workers = workers
        self._max_pixels = pixel_budget(workers)
        # Guards the three below together with the catalog's rows they stand for.
        self._lock = threading.Lock()
        self._under_way: set[str] = set()
        self._waiting: defaultdict[str, list[_Read]] = defaultdict(list)
        self._began = self._ended = self._saved = time.monotonic()
        self._engine_seconds = 0.0
        self._n_unsaved = 0

    @property
    def n_done(self) -> int:
        return self.outcomes.total()

    @property
    def images_per_second(self) -> float:
        """Files read per second from the first read to the last commit, without the start of the engine."""
        seconds = self._ended - self._began - self._engine_seconds
        return self.n_done / seconds if self.n_done and seconds > 0 else 0.0

    def run(self, wanted: Iterable[Wanted]) -> Iterator[None]:
        """Read all; whatever ends this early, what was embedded is saved."""
        self._began = self._saved = time.monotonic()
        ahead = max(2 * self._workers, min(16 * self._workers, _AHEAD_BYTES // (3 * self._fit.image_size**2)))
        results = in_threads(self._read, readings(wanted), workers=self._workers, ahead=ahead)
        assert isinstance(results, Generator)
        try:
            for result in results:
                if result.pixels is None:
                    self._settle(result)
                else:
                    yield from self._encode(itertools.chain([(result, result.pixels)], self._pictures(results)))
                self._save_if_due()
                yield
            assert not self._waiting
        finally:
            results.close()
            self._save()

    def _read(self, reading: Reading) -> _Read:
        """Runs in a reader thread."""
        wanted, found = reading.wanted, reading.wanted.found
        row = FileRow(
            wanted.root, found.path, found.size, found.mtime_ns, None, UNREADABLE,
            member=found.member, metadata=found.metadata,
        )  # fmt: skip
        try:
            stable = reading.stable_bytes()
        except BadImage as bad:
            return _Read(wanted, row, Content(bad.status, bad.reason, None, None))
        content = content_hash(stable.data, self._hash_algorithm)
        row = replace(row, size=len(stable.data), mtime_ns=stable.mtime_ns, content_hash=content)
        with self._lock:
            known = self._known(content)
            if known or content in self._under_way:
                return _Read(wanted, row, known)
            self._under_way.add(content)
        try:
            picture = decode(stable.data, self._fit, max_pixels=self._max_pixels)
        except BadImage as bad:
            return _Read(wanted, row, Content(bad.status, bad.reason, None, None))
        return _Read(wanted, replace(row, width=picture.width, height=picture.height), pixels=picture.pixels)

    def _known(self, content: str) -> Content | None:
        return self._catalog.known_content(
            content, fingerprint=self._fingerprint, decoders=self._keys.decoders, large=self._keys.large
        )

    def _pictures(self, results: Iterator[_Read]) -> Iterator[tuple[_Read, np.ndarray]]:
        """What the encoder has to see, until it is all read or there has been nothing for a while."""
        fed = time.monotonic()
        for result in results:
            if result.pixels is not None:
                yield result, result.pixels
                fed = time.monotonic()
            else:
                self._settle(result)
                self._save_if_due()
                if time.monotonic() - fed > _LULL_SECONDS:
                    return

    def _encode(self, pictures: Iterable[tuple[_Read, np.ndarray]]) -> Iterator[None]:
        if self._encoder is None:
            began = time.monotonic()
            self._encoder = self._encoder_for()
            self._engine_seconds = time.monotonic() - began
        # The encoder holds its keys until their vectors come: they must not hold the pixels too.
        keyed = ((replace(result, pixels=None), pixels) for result, pixels in pictures)
        for keys, vectors in self._encoder.stream(keyed):
            assert vectors.shape == (len(keys), self._dim)
            if not np.isfinite(vectors).all():
                raise DinosearchError(
                    f"the model's vectors are no numbers, as for {keys[0].wanted.path}. Use another --model"
                )
            self._store(keys, vectors)
            self._save_if_due()
            yield

    def _store(self, results: list[_Read], vectors: np.ndarray) -> None:
        contents = [(r.row.content_hash or "", 0, r.row.width or 0, r.row.height or 0) for r in results]
        with self._lock:
            self._catalog.put_vectors(contents, vectors, fingerprint=self._fingerprint)
            self.n_embedded += len(results)
            rows = [self._finish(r, Content(OK, "", r.row.width, r.row.height)) for r in results]
            self._catalog.put_files(itertools.chain.from_iterable(rows))

    def _settle(self, result: _Read) -> None:
        """Write a file whose content needs no vector, or let it wait for the copy that is under way."""
        content = result.row.content_hash
        with self._lock:
            # The copy under way may have ended since the reader thread saw it.
            known = result.content or (self._known(content) if content and content not in self._under_way else None)
            if known:
                self._catalog.put_files(self._finish(result, known))
            else:
                self._waiting[content or ""].append(result)

    def _finish(self, result: _Read, content: Content) -> list[FileRow]:
        """Rows to write, of a file and of those that waited for its content; the lock is held."""
        content_hash = result.row.content_hash
        results = [result, *(self._waiting.pop(content_hash, []) if content_hash else [])]
        status, reason, width, height = content
        tried = None if status in (OK, UNREADABLE) else self._keys.of(status)
        rows = []
        for each in results:
            row = replace(each.row, status=status, reason=reason, width=width, height=height, decoders=tried)
            rows.append(row)
            outcome = each.wanted.outcome(row)
            self.outcomes[outcome] += 1
            self.n_altered += outcome == "changed" and each.wanted.verified
        self._under_way.discard(content_hash or "")
        self._n_unsaved += len(rows)
        return rows

    def _save_if_due(self) -> None:
        if self._n_unsaved >= SAVE_FILES or (self._n_unsaved and time.monotonic() - self._saved > SAVE_SECONDS):
            self._save()

    def _save(self) -> None:
        self._catalog.commit()
        self._n_unsaved = 0
        self._saved = self._ended = time.monotonic()


def decoder_keys(workers: int) -> DecoderKeys:
    return DecoderKeys(decoders(), f"{decoders()}, at most {pixel_budget(workers)} pixels")
