"""What a decoding process does: read, hash and decode one file after the other for the process at its pipe's end.

It ends when the pipe does. A request and a reply are each a JSON object and some bytes, with their lengths before them.
Requests: read (bytes: a path) and take (bytes: a file's content), answered by hash, size and mtime_ns; decode (fit,
frame, count), answered by width, height, n_frames and the pixels as bytes. Any may be answered by a status and reason.
"""

import json
import os
import signal
import struct
import sys
import time
import warnings
from io import FileIO
from typing import Any

from PIL import Image

from dinosearch.images.decode import BadImage, Fit, Frames, content_hash, decode
from dinosearch.images.read import read_stable
from dinosearch.images.source import StableBytes

NO_MEMORY = 71
"""Exit code of a process that could not even take a file in."""

_LENGTHS = struct.Struct("<IQ")


def send(pipe: FileIO, message: dict[str, Any], payload: bytes | memoryview) -> None:
    """Write one message. Raises OSError when nobody reads."""
    text = json.dumps(message).encode()
    _write_all(pipe, _LENGTHS.pack(len(text), len(payload)) + text)
    if len(payload):
        _write_all(pipe, payload)


def receive(pipe: FileIO) -> tuple[dict[str, Any], bytearray]:
    """Read one message. Raises EOFError when the other end is gone."""
    n_text, n_payload = _LENGTHS.unpack(_read_all(pipe, _LENGTHS.size))
    message = json.loads(_read_all(pipe, n_text))
    return message, _read_all(pipe, n_payload)


def main() -> None:
    job = json.loads(sys.argv[1])
    # Libraries that print must not speak between our messages.
    requests, replies = FileIO(os.dup(0), "rb"), FileIO(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    warnings.simplefilter("ignore")  # Pillow's remarks on broken tags
    Image.MAX_IMAGE_PIXELS = None  # which TIFF and WebP ask for; the pixel budget and the memory's limit hold instead
    _leave_signals_to_the_parent()
    _limit_memory(job["memory"])
    try:
        _serve(requests, replies, job)
    except MemoryError:
        os._exit(NO_MEMORY)
    except (EOFError, OSError):  # the other end is gone
        os._exit(0)


def _serve(requests: FileIO, replies: FileIO, job: dict[str, Any]) -> None:
    file = _File(job)
    while True:
        request, payload = receive(requests)
        _set_alarm(2 * job["seconds"] + 1)
        began = time.perf_counter()
        try:
            reply, answer = file.answer(request, payload)
        except BadImage as bad:
            reply, answer = {"status": bad.status, "reason": bad.reason}, memoryview(b"")
        except MemoryError:
            reply, answer = {"status": "too-large", "reason": "not enough memory for it"}, memoryview(b"")
        reply["seconds"] = time.perf_counter() - began
        _set_alarm(0)
        send(replies, reply, answer)


class _File:
    """The file at hand."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._max_pixels = job["max_pixels"]
        self._algorithm = job["algorithm"]
        self._data = b""
        self._frames: Frames | None = None

    def answer(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], memoryview]:
        nothing = memoryview(b"")
        if request["do"] == "start":
            return {}, nothing
        if request["do"] == "decode":
            return self._decode(Fit(**request["fit"]), request["frame"], request["count"])
        self._data, self._frames = b"", None  # before the next is read: memory never holds two
        read = request["do"] == "read"
        stable = read_stable(os.fsdecode(bytes(payload))) if read else StableBytes(bytes(payload), 0)
        self._data = stable.data
        size, content = len(stable.data), content_hash(stable.data, self._algorithm)
        return {"hash": content, "size": size, "mtime_ns": stable.mtime_ns}, nothing

    def _decode(self, fit: Fit, frame: int, count: bool) -> tuple[dict[str, Any], memoryview]:
        if fit.channels != 3:  # its pages are channels, not pictures of their own
            picture = decode(self._data, fit, max_pixels=self._max_pixels)
            facts = {"width": picture.width, "height": picture.height, "n_frames": 1}
            return facts, picture.pixels.data.cast("B")
        if self._frames is None:
            self._frames = Frames(self._data, fit, max_pixels=self._max_pixels)
        n_frames = self._frames.count() if count else 1
        picture = self._frames.picture(frame)
        facts = {"width": picture.width, "height": picture.height, "n_frames": n_frames}
        return facts, picture.pixels.data.cast("B")


def _leave_signals_to_the_parent() -> None:
    """Ctrl-C and the like reach all processes of a terminal or service; the parent ends this one when it is done."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _set_alarm(seconds: float) -> None:
    """Die if at work for so long, whatever became of the parent, which would have killed this process earlier.

    Counted is the processor's time: a process that was stopped for an hour and goes on has done nothing wrong.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(limit: int) -> None:
    """Let the system refuse more than `limit` bytes of data. Only Linux counts them in a way that helps."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _write_all(pipe: FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[pipe.write(rest) :]


def _read_all(pipe: FileIO, n: int) -> bytearray:
    data = bytearray(n)
    rest = memoryview(data)
    while rest:
        n_read = pipe.readinto(rest)
        if not n_read:
            raise EOFError
        rest = rest[n_read:]
    return data
