"""Read, decode and embed files into the catalog, in one bounded pipeline. Knows nothing of scanning or FAISS.

Processes read, hash and decode, each for a thread of this one; the caller's thread feeds the encoder and writes. A
content is decoded and embedded once: what the catalog knows is not decoded, and a copy of a file still under way waits
for its vectors. Of a file with several frames the first is decoded like any image; the others follow one by one while
the caller's thread waits, so that never more than one of them is in memory.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BadImage, Fit
from dinosearch.images.read import in_threads
from dinosearch.images.reading import Reading, bytes_held, readings
from dinosearch.images.workers import DecodePool
from dinosearch.index.catalog import Catalog
from dinosearch.index.compare import Wanted
from dinosearch.index.limits import Limits
from dinosearch.index.pace import Pace
from dinosearch.index.rows import OK, UNREADABLE, Content, FileRow

if TYPE_CHECKING:
    from dinosearch.encoder import Encoder
    from dinosearch.vit.folder import ModelFolder

SAVE_SECONDS = 2.0
MOST_FRAMES = 1000
"""Further frames or pages of a file are not looked at."""
SAVE_FILES = 1000

_MOST_LARGE_FRAMES = 3  # in a row
_LULL_SECONDS = 0.5  # with nothing for the encoder in so long, what it has begun is finished and progress is shown


@dataclass(slots=True)
class _File:
    """A file on its way to the catalog."""

    wanted: Wanted
    row: FileRow
    states: list[Content | None] = field(default_factory=list)
    """Of its frames; None where the vector is under way. Empty if a copy of the same content is."""
    reading: Reading[Wanted] | None = None
    """How to read it again, where it has further frames."""

    @property
    def key(self) -> tuple[str, bool]:
        """What is under way: a content, and how much of it."""
        return self.row.content_hash or "", self.wanted.all_pages


class _Frame(NamedTuple):
    """What stands for an image in the encoder's stream."""

    file: _File
    number: int
    width: int
    height: int


@dataclass(frozen=True)
class EncoderPlan:
    """What an encoder is to be opened for."""

    images: int
    """Files that are to be read."""
    precision: str
    """As `dinosearch.encoder.open_encoder` takes it: what the index was asked for last."""
    sample: Callable[[int], np.ndarray]
    """Up to so many of the images, decoded: uint8 [n, S, S, 3]. Reads them when it is called."""


class Embedding:
    """One run over the files that have to be read. `run` yields now and then; the counts tell how far it came."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        model: ModelFolder,
        encoder_for: Callable[[EncoderPlan], Encoder],
        limits: Limits,
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        """Files by new, changed, moved, unchanged, failed."""
        self.n_embedded = 0
        """Images that went through the model; each frame is one."""
        self.n_altered = 0
        """Verified files whose content is another one though size and time are the same."""
        self.n_pages_dropped = 0
        """Frames beyond the MOST_FRAMES first of their file."""
        self.held_back: list[FileRow] = []
        """Of files of which another model than the answering one can read less: to be written when that one answers."""
        self._catalog = catalog
        self._fingerprint = model.fingerprint
        self._switching = catalog.fingerprint != model.fingerprint
        self._dim = model.dim
        self._fit = Fit(model.image_size, model.fit, model.crop_pct, model.interpolation, model.channels)
        self._encoder_for = encoder_for
        self._encoder: Encoder | None = None
        self._wanted: Sequence[Wanted] = ()
        self._keys = limits.decoder_keys()
        self._limits = limits
        self._pool = DecodePool(
            self._fit,
            workers=limits.workers,
            max_pixels=limits.max_pixels,
            algorithm=catalog.meta("content_hash"),
        )
        # Guards the two below together with the catalog's rows they stand for.
        self._lock = threading.Lock()
        self._under_way: set[tuple[str, bool]] = set()
        self._unread: dict[tuple[str, bool], list[Content | None]] = {}
        """Of contents that could not be read this time, for copies that waited; the catalog does not keep them."""
        self._waiting: defaultdict[tuple[str, bool], list[_File]] = defaultdict(list)
        self._pace = Pace()
        self._began = self._ended = self._saved = time.monotonic()
        self._engine_seconds = 0.0
        self._n_bytes = 0
        self._n_unsaved = 0

    @property
    def n_done(self) -> int:
        """Files that are in the catalog."""
        return self.outcomes.total()

    @property
    def images_per_second(self) -> float:
        """Files read per second from the first read to the last commit, without the start of the engine."""
        return self.n_done / self._seconds if self._seconds > 0 else 0.0

    @property
    def mb_per_second(self) -> float:
        """Megabytes of files read per second, likewise."""
        return self._n_bytes / 1e6 / self._seconds if self._seconds > 0 else 0.0

    @property
    def limit(self) -> str:
        """The stage that the others wait for now: disk, decode, model or write."""
        return self._pace.limit(reading=self._pool.times.reading, decoding=self._pool.times.decoding)

    @property
    def _seconds(self) -> float:
        return self._ended - self._began - self._engine_seconds

    def run(self, wanted: Sequence[Wanted]) -> Iterator[None]:
        """Read all; whatever ends this early, what was embedded is saved."""
        self._began = self._saved = time.monotonic()
        self._wanted = wanted
        workers = self._limits.workers
        square = self._fit.channels * self._fit.image_size**2
        ahead = max(2 * workers, min(16 * workers, self._limits.ahead_bytes // square))
        results = in_threads(
            self._read,
            readings(wanted),
            workers=workers,
            ahead=ahead,
            weight=bytes_held,
            most_weight=self._limits.ahead_bytes,
        )
        assert isinstance(results, Generator)
        try:
            with self._pool:
                files = self._pace.waiting(results)
                for file, pixels in files:
                    if pixels is None:
                        self._settle(file)
                    else:
                        yield from self._encode(file, pixels, files)
                    self._save_if_due()
                    yield
                assert not self._waiting
        finally:
            results.close()
            self._save()

    def _read(self, reading: Reading[Wanted]) -> tuple[_File, np.ndarray | None]:
        """A file and its first square, if that is wanted. Runs in a reader thread."""
        wanted, found = reading.wanted, reading.wanted.found
        row = FileRow(
            wanted.root, found.path, found.size, found.mtime_ns, None, UNREADABLE,
            member=found.member, metadata=found.metadata,
        )  # fmt: skip
        file = _File(wanted, row)
        try:
            with reading.opened(self._pool) as opened:
                file.row = row = replace(
                    row, size=opened.size, mtime_ns=opened.mtime_ns, content_hash=opened.content_hash
                )
                with self._lock:
                    if file.key in self._under_way:
                        return file, None
                    if known := self._known(file):
                        file.states = list(known)
                        return file, None
                    self._under_way.add(file.key)
                picture, n_frames = opened.decode_and_count() if wanted.all_pages else (opened.decode(), 1)
        except BadImage as bad:
            file.states = [Content(bad.status, bad.reason, None, None)]
            return file, None
        file.row = replace(row, width=picture.width, height=picture.height)
        if n_frames > MOST_FRAMES:
            with self._lock:
                self.n_pages_dropped += n_frames - MOST_FRAMES
        file.states = [None] * min(n_frames, MOST_FRAMES)
        file.reading = reading if n_frames > 1 else None
        return file, picture.pixels

    def _known(self, file: _File) -> list[Content] | None:
        """The states of all frames that are wanted, if none needs work."""
        content = file.row.content_hash or ""
        first = self._catalog.known_content(
            content, fingerprint=self._fingerprint, decoders=self._keys.decoders, large=self._keys.large
        )
        if first is None or first.status != OK or not file.wanted.all_pages:
            return None if first is None else [first]
        return self._catalog.known_frames(content, fingerprint=self._fingerprint, keys=self._keys)

    def _encode(
        self, file: _File, pixels: np.ndarray, files: Iterator[tuple[_File, np.ndarray | None]]
    ) -> Iterator[None]:
        """Feed the encoder with this file and those that come, until there has been nothing for a while."""
        if self._encoder is None:
            began = time.monotonic()
            plan = EncoderPlan(len(self._wanted), self._catalog.precision() or "auto", self._sample)
            self._encoder = self._encoder_for(plan)
            self._engine_seconds = time.monotonic() - began
        for frames, vectors in self._encoder.stream(self._squares(file, pixels, files)):
            assert vectors.shape == (len(frames), self._dim)
            if not np.isfinite(vectors).all():
                raise DinosearchError(
                    f"the model's vectors are no numbers, as for {frames[0].file.wanted.path}. Use another --model"
                )
            with self._pace.spending("write"):
                self._store(frames, vectors)
            self._save_if_due()
            yield

    def _sample(self, n: int) -> np.ndarray:
        """Squares of files drawn from all; of sources that only stream, the first ones where the others do not suffice.

        Runs while the reader threads have read ahead as far as they may.
        """
        alone = [wanted for wanted in self._wanted if not wanted.source.sequential]
        chosen = random.Random(0).sample(alone, min(n, len(alone)))
        chosen += [wanted for wanted in self._wanted if wanted.source.sequential][: n - len(chosen)]

        def square_of(reading: Reading[Wanted]) -> np.ndarray | None:
            try:
                with reading.opened(self._pool) as opened:
                    return opened.decode().pixels
            except BadImage:
                return None

        workers = self._limits.workers
        squares = [
            square
            for square in in_threads(square_of, readings(chosen), workers=workers, ahead=2 * workers)
            if square is not None
        ]
        side = self._fit.image_size
        return np.stack(squares) if squares else np.empty((0, side, side, self._fit.channels), np.uint8)

    def _squares(
        self, file: _File, pixels: np.ndarray | None, files: Iterator[tuple[_File, np.ndarray | None]]
    ) -> Iterator[tuple[_Frame, np.ndarray]]:
        fed = time.monotonic()
        for each, square in itertools.chain([(file, pixels)], files):
            if square is not None:
                yield _Frame(each, 0, each.row.width or 0, each.row.height or 0), square
                yield from self._further_squares(each)
                fed = time.monotonic()
            else:
                self._settle(each)
                self._save_if_due()
                if time.monotonic() - fed > _LULL_SECONDS:
                    return

    def _further_squares(self, file: _File) -> Iterator[tuple[_Frame, np.ndarray]]:
        """The frames after the first, until one is bad: what comes after that can't be had either, as a rule.

        One that is too large says nothing of the next, but some in a row may each take the longest time allowed.
        """
        if file.reading is None:
            return
        reading, file.reading = file.reading, None
        number, n_large = 1, 0
        try:
            with reading.opened(self._pool) as opened:
                if opened.content_hash != file.row.content_hash:
                    raise BadImage(UNREADABLE, "it changed while it was read")
                for number in range(1, len(file.states)):
                    try:
                        with self._pace.spending("read"):
                            picture = opened.decode_frame(number)
                    except BadImage as bad:
                        n_large += 1
                        if bad.status != "too-large" or n_large == _MOST_LARGE_FRAMES:
                            raise
                        self._give_up(file, slice(number, number + 1), bad)
                        continue
                    n_large = 0
                    yield _Frame(file, number, picture.width, picture.height), picture.pixels
        except BadImage as bad:
            self._give_up(file, slice(number, None), bad)

    def _give_up(self, file: _File, frames: slice, bad: BadImage) -> None:
        """Put one bad state in the place of some frames; with the last that was open the file is complete."""
        with self._lock:
            file.states[frames] = [Content(bad.status, bad.reason, None, None)]
            if None not in file.states:
                self._catalog.put_files(self._finish(file))

    def _store(self, frames: list[_Frame], vectors: np.ndarray) -> None:
        """Write vectors, and the files that are complete with them, in one transaction."""
        with self._lock:
            contents = [(f.file.row.content_hash or "", f.number, f.width, f.height) for f in frames]
            self._catalog.put_vectors(contents, vectors, fingerprint=self._fingerprint)
            self.n_embedded += len(frames)
            for file, number, width, height in frames:
                file.states[number] = Content(OK, "", width, height)
                if None not in file.states:
                    self._catalog.put_files(self._finish(file))

    def _settle(self, file: _File) -> None:
        """Write a file whose content needs no vector, or let it wait for the copy that is under way."""
        with self._pace.spending("write"), self._lock:
            if not file.states and file.key not in self._under_way:
                # The copy under way has ended since the reader thread saw it.
                file.states = list(self._known(file) or self._unread.get(file.key, []))
            if file.states:
                self._catalog.put_files(self._finish(file))
            else:
                self._waiting[file.key].append(file)

    def _finish(self, file: _File) -> list[FileRow]:
        """Rows to write, of a file and of those that waited for its content; the lock is held."""
        content = file.row.content_hash
        files = [file, *(self._waiting.pop(file.key, []) if content else [])]
        if content:
            self._under_way.discard(file.key)
            if any(state and state.status == UNREADABLE for state in file.states):
                self._unread[file.key] = list(file.states)
        rows = []
        for each in files:
            of_file = list(self._rows(each, [state for state in file.states if state]))
            outcome = each.wanted.outcome(of_file[0])
            self.outcomes[outcome] += 1
            self.n_altered += outcome == "changed" and each.wanted.verified
            self._n_bytes += each.row.size
            if self._switching and each.wanted.loses_by(of_file):
                self.held_back += of_file
            else:
                rows += of_file
        self._n_unsaved += len(rows)
        return rows

    def _rows(self, file: _File, states: list[Content]) -> Iterator[FileRow]:
        """One for each frame; the first also says how many there are, if that was asked and can be told."""
        counted = file.wanted.all_pages and states[0].status != UNREADABLE
        for number, (status, reason, width, height) in enumerate(states):
            yield replace(
                file.row,
                frame=number,
                frames=len(states) if counted and number == 0 else None,
                status=status,
                reason=reason,
                width=width,
                height=height,
                decoders=None if status in (OK, UNREADABLE) else self._keys.of(status),
            )

    def _save_if_due(self) -> None:
        if self._n_unsaved >= SAVE_FILES or (self._n_unsaved and time.monotonic() - self._saved > SAVE_SECONDS):
            self._save()

    def _save(self) -> None:
        with self._pace.spending("write"):
            self._catalog.commit()
        self._n_unsaved = 0
        self._saved = self._ended = time.monotonic()
