"""metrics.jsonl: a line for every look at a run, while it goes on. Knows no run.

A disk that is full for a while costs lines and no run: the lines that are there stay readable.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinosearch.vit.folder import Note, first_line

METRICS = "metrics.jsonl"
"""In a run's folder `training`."""


class Metrics:
    """Appends lines to a file, after its first n_bytes: what comes behind them is dropped."""

    def __init__(self, path: Path, *, n_bytes: int, note: Note) -> None:
        self._path = path
        self._note = note
        self._told = False
        with path.open("ab") as file:
            self.n_bytes = min(n_bytes, file.tell())
            """Where the last line that was written whole ends."""
            file.truncate(self.n_bytes)

    def write(self, line: Mapping[str, Any]) -> None:
        """A line that finds no room is left out, which is told once."""
        rest = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        try:
            with self._path.open("ab", buffering=0) as file:  # a buffer would try again when it is closed
                before = file.tell()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    with contextlib.suppress(OSError):  # the next line would be glued to the torn one
                        os.truncate(self._path, before)
                    raise
                self.n_bytes = file.tell()
        except OSError as error:
            if not self._told:
                self._note(f"{self._path} lacks lines from here on ({first_line(error)}); training goes on")
            self._told = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines but those that a full disk or a power cut has torn; none where there is no file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
