"""Decode image files in processes that may hang, crash or run out of memory without harm to this one.

Each thread that uses the pool holds one process at a time. A file is handled in two steps, so that a known content
costs no decoding: the process reads and hashes it, then decodes it if asked to. A process that takes longer than the
limit is killed. Whatever ends a process, its file is tried once more in a fresh one, and only the second end is the
file's doing: too slow to decode or refused its memory, it is "too-large"; crashing the decoder, it is "corrupt"; killed
by the system or too slow to read, it is "unreadable", which is not remembered. Time in which this process was stopped
does not count.

Processes are started when first needed and talk through pipes: a square passes through in about 0.1 ms, a twentieth
of what decoding it takes, and nothing is left behind by whoever is killed. They end when their pipe does, so also
when this process is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dinosearch.errors import DinosearchError
from dinosearch.images.decode import BYTES_PER_PIXEL, BadImage, Fit, Picture
from dinosearch.images.machine import n_cores
from dinosearch.images.workerprocess import NO_MEMORY, receive, send

SECONDS = 60.0
"""Given to a file: the largest that the budget allows take about 10 s on a slow processor."""

_START_SECONDS = 60.0  # a cold disk and a busy machine
_SPARE_BYTES = 192 << 20  # what Python, its libraries and small files take besides the pixels
_BYTES_PER_THREAD = 16 << 20  # AVIF's decoder starts one on each core
_STDERR_BYTES = 2000
_ENDED = BadImage("unreadable", "the pool of decoding processes was closed")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class WorkerTimes:
    """Seconds that the processes of a pool have spent so far, all together."""

    reading: float = 0.0
    decoding: float = 0.0


class DecodePool:
    """`workers` processes that read and decode. Close it, or use it as a context manager."""

    def __init__(
        self,
        fit: Fit,
        *,
        workers: int,
        max_pixels: int,
        algorithm: str = "blake3",
        seconds: float = SECONDS,
    ) -> None:
        self._job = {
            "max_pixels": max_pixels,
            "algorithm": algorithm,
            "seconds": seconds,
            "memory": max_pixels * BYTES_PER_PIXEL + _SPARE_BYTES + n_cores() * _BYTES_PER_THREAD,
        }
        self._seconds = seconds
        self.make(fit)
        self._free = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = threading.Event()
        self._watchdog: threading.Thread | None = None
        self.times = WorkerTimes()
        """Only ever replaced as a whole, so it can be read at any time."""

    def make(self, fit: Fit) -> None:
        """From now on, make such squares. Not while a file is open."""
        self._fit = fit
        self._fit_facts = asdict(fit)

    @contextmanager
    def read(self, path: str) -> Iterator[OpenFile]:
        """Have a local file read and hashed. Raises BadImage when it cannot be read."""
        with self._opened({"do": "read"}, os.fsencode(path)) as file:
            yield file

    @contextmanager
    def take(self, data: bytes) -> Iterator[OpenFile]:
        """Have bytes hashed that were read here. Raises BadImage."""
        with self._opened({"do": "take"}, data) as file:
            yield file

    def close(self) -> None:
        """End the processes; those at work are killed."""
        self._closed.set()
        with self._lock:
            idle, self._idle = self._idle, []
            at_work = self._all.difference(idle)
        for worker in idle:
            worker.end()
        for worker in at_work:
            worker.cancel()
        if self._watchdog:
            self._watchdog.join()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _opened(self, request: dict[str, Any], payload: bytes) -> Iterator[OpenFile]:
        with self._free:
            file = OpenFile(self, self._start_or_reuse(), request, payload)
            try:
                file._open()
                yield file
            finally:
                self._release(file._worker)

    def _start_or_reuse(self) -> _Worker:
        with self._lock:
            if self._closed.is_set():
                raise _ENDED
            while self._idle:
                worker = self._idle.pop()
                if worker.running():
                    return worker
                self._all.discard(worker)  # the system killed it while it waited: no file's doing
                worker.end()
        return self._start()

    def _start(self) -> _Worker:
        with self._lock:
            if self._watchdog is None:
                self._watchdog = threading.Thread(target=self._watch, name="decoding watchdog", daemon=True)
                self._watchdog.start()
        worker = _Worker(self._job)
        with self._lock:
            self._all.add(worker)
            if self._closed.is_set():
                worker.cancel()
        return worker

    def _release(self, worker: _Worker) -> None:
        with self._lock:
            reusable = worker.alive and not self._closed.is_set()
            if reusable:
                self._idle.append(worker)
            else:
                self._all.discard(worker)
        if not reusable:
            worker.end()

    def _watch(self) -> None:
        """Kill whoever is late. One thread for all, as pipes have no time-outs that work on every system."""
        step = min(0.5, self._seconds / 4)
        began = time.monotonic()
        while not self._closed.wait(step):
            ended = time.monotonic()
            missed = ended - began - step
            with self._lock:
                workers = list(self._all)
            for worker in workers:
                # Stopped by Ctrl-Z or short of the processor: then so were they.
                worker.kill_if_late(missed if missed > step else 0.0)
            began = ended

    def _count(self, *, reading: float = 0.0, decoding: float = 0.0) -> None:
        with self._lock:
            self.times = WorkerTimes(self.times.reading + reading, self.times.decoding + decoding)


class OpenFile:
    """A file that a process of the pool has read; valid inside the `with` that gave it."""

    def __init__(self, pool: DecodePool, worker: _Worker, request: dict[str, Any], payload: bytes) -> None:
        self._pool = pool
        self._worker = worker
        self._source = request, payload
        self._held = False  # by the process
        self.content_hash = ""
        self.size = 0
        """Bytes that were read."""
        self.mtime_ns = 0
        """As `StableBytes` says; 0 for bytes that were read elsewhere."""

    def decode(self) -> Picture:
        """The square of the first frame. Raises BadImage."""
        return self._decode(0, False)[0]

    def decode_and_count(self) -> tuple[Picture, int]:
        """The square of the first frame, and how many frames there are. Raises BadImage."""
        return self._decode(0, True)

    def decode_frame(self, frame: int) -> Picture:
        """The square of a further frame; cheapest in their order. Raises BadImage."""
        return self._decode(frame, False)[0]

    def _open(self) -> None:
        self._twice(self._read)

    def _read(self) -> None:
        request, payload = self._source
        reply, _ = self._worker.ask(request, payload, seconds=self._pool._seconds)
        self._pool._count(reading=reply["seconds"])
        if self.content_hash not in ("", reply["hash"]):
            raise BadImage("unreadable", "it changes while it is read")
        self.content_hash, self.size, self.mtime_ns = reply["hash"], reply["size"], reply["mtime_ns"]
        self._held = True

    def _decode(self, frame: int, count: bool) -> tuple[Picture, int]:
        request = {"do": "decode", "fit": self._pool._fit_facts, "frame": frame, "count": count}

        def ask() -> tuple[dict[str, Any], bytearray]:
            if not self._held:
                self._read()
            return self._worker.ask(request, b"", seconds=self._pool._seconds)

        reply, pixels = self._twice(ask)
        self._pool._count(decoding=reply["seconds"])
        fit = self._pool._fit
        square = np.frombuffer(pixels, np.uint8).reshape(fit.image_size, fit.image_size, fit.channels)
        return Picture(square, reply["width"], reply["height"]), reply["n_frames"]

    def _twice(self, step: Callable[[], Answer]) -> Answer:
        """Do it, if need be once more in a fresh process: the first may have died of something else than this file."""
        try:
            return step()
        except _Died as died:
            if died.verdict is _ENDED:
                raise _ENDED from None
        self._pool._release(self._worker)
        self._worker, self._held = self._pool._start(), False
        try:
            return step()
        except _Died as died:
            raise died.verdict from None


class _Died(Exception):
    """The process died or was killed; `verdict` is the file's state if that is the file's doing."""

    def __init__(self, verdict: BadImage) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


class _Worker:
    """A process at the other end of two pipes, used by one thread at a time."""

    def __init__(self, job: dict[str, Any]) -> None:
        # -P: a folder of images that happens to hold a numpy.py must not be imported from.
        code = f"import sys; sys.path.insert(0, {str(_package_path())!r})\nfrom dinosearch.images import workerprocess"
        command = [sys.executable, "-P", "-c", f"{code}\nworkerprocess.main()", json.dumps(job)]
        # One thread each, and so little address space for the pools that libraries would make.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment)
        except OSError as error:
            raise _cannot_start(error.strerror or str(error)) from error
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._late = self._cancelled = False
        self.alive = True
        try:
            self.ask({"do": "start"}, b"", seconds=_START_SECONDS)
        except (_Died, BadImage) as error:
            assert self._process.stderr
            said = self._process.stderr.read(_STDERR_BYTES).decode(errors="replace").strip().splitlines()
            self.end()
            raise _cannot_start(said[-1] if said else str(error)) from error

    def ask(self, request: dict[str, Any], payload: bytes, *, seconds: float) -> tuple[dict[str, Any], bytearray]:
        """Send a request and wait for the reply. Raises BadImage, or _Died when there will be none."""
        requests, replies = self._process.stdin, self._process.stdout
        assert isinstance(requests, FileIO)
        assert isinstance(replies, FileIO)
        with self._lock:
            self._deadline = time.monotonic() + seconds
        self.alive = False  # until the reply is there: interrupted in between, it is in no state to go on
        try:
            send(requests, request, payload)
            reply, answer = receive(replies)
        except (OSError, EOFError):
            raise _Died(self._verdict(request["do"], seconds)) from None
        finally:
            with self._lock:
                self._deadline = None
        self.alive = not self._late  # it may have been killed just when it had answered
        if "status" in reply:
            raise BadImage(reply["status"], reply["reason"])
        return reply, answer

    def running(self) -> bool:
        return self._process.poll() is None

    def kill_if_late(self, missed: float) -> None:
        """`missed`: seconds that do not count."""
        with self._lock:
            if self._deadline is None:
                return
            self._deadline += missed
            if time.monotonic() > self._deadline:
                self._late = True
                self._process.kill()

    def cancel(self) -> None:
        """Kill the process; the thread that waits for it finds out and ends it."""
        self._cancelled = True
        self._process.kill()

    def end(self) -> None:
        """Kill the process and close the pipes to it. Only for who holds it."""
        self.alive = False
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        # One that hangs in a dead network disk dies only when that answers: it is not waited for.
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return

    def _verdict(self, step: str, seconds: float) -> BadImage:
        """What to say of the file that a dead process was at."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = 0
        if self._cancelled:
            return _ENDED
        if self._late:
            status, what = ("too-large", "decoded") if step == "decode" else ("unreadable", "read")
            return BadImage(status, f"not {what} within {seconds:g} s")
        if code == -getattr(signal, "SIGKILL", 9):
            return BadImage("unreadable", "its decoding process was killed (SIGKILL), as systems do that lack memory")
        if code == NO_MEMORY:
            return BadImage("too-large", "not enough memory for it")
        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return BadImage("corrupt", f"it crashes the decoder ({died})")


def _cannot_start(reason: str) -> DinosearchError:
    return DinosearchError(
        f"no decoding process can be started ({reason}). "
        "Check this Python's installation and the limits on processes and memory"
    )


def _package_path() -> Path:
    """The folder that `import dinosearch` finds the package in."""
    return Path(__file__).parent.parent.parent
