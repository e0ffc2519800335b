"""What people and programs see: results on stdout, everything else on stderr. Knows nothing of what it shows.

On a terminal: tables and bars, through rich, imported only then. Piped: tab-separated lines, JSON when asked for, and a
plain line of progress now and then.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


def json_line(value: object) -> None:
    """One JSON object on one line of stdout, there at once; ASCII, so that any name passes through any pipe."""
    print(json.dumps(value, allow_nan=False), flush=True)


def csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A header and a line for each row; names that are not UTF-8 come out as the file system spells them."""
    import csv
    import io

    for row in [columns, *rows]:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        sys.stdout.buffer.write(os.fsencode(text.getvalue()))
    sys.stdout.buffer.flush()


def line(text: str) -> None:
    """A result for people, there at once."""
    print(printable(text), flush=True)


def raw_path(path: Path | str, *, end: bytes) -> None:
    """A path as the file system spells it, whatever its encoding."""
    sys.stdout.buffer.write(os.fsencode(shown(path)) + end)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, wide: Sequence[str] = (), title: str | None = None
) -> None:
    """A table on a terminal, tab-separated lines with a header in a pipe. Columns of numbers align right.

    The columns `wide` are folded, never cut, where the terminal is too narrow: what is printed can be opened.
    """
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(columns), *cells]:
            print("\t".join(row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, title=title and Text(printable(title)), title_justify="left")
    for i, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[i]) for row in cells)
        drawn.add_column(
            name, justify="right" if numeric else "left", overflow="fold", no_wrap=bool(wide) and name not in wide
        )
    for row in cells:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def note(text: str) -> None:
    """A line for people beside the result: what was chosen by default, what takes long, what went wrong."""
    _to_stderr(printable(text))


def error(text: str) -> None:
    """The one red line of a command that failed."""
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    head = "\x1b[1;31merror:\x1b[0m" if red else "error:"
    _to_stderr(f"{head} {printable(text)}")


def shown(path: Path | str) -> str:
    """Relative to the current folder when below it, else absolute or a URL: what is printed can be opened."""
    if "://" in str(path):
        return str(path)
    absolute = os.path.normpath(Path.cwd() / path)
    here = f"{Path.cwd()}{os.sep}"
    return absolute.removeprefix(here) if absolute.startswith(here) else absolute


def printable(text: str) -> str:
    """Control characters and stray bytes in names of files as escapes: they cannot steer a terminal or fake a line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def percent(share: float | None) -> str:
    """0.981 → 98.1%"""
    return "–" if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


@dataclass
class _Shown:
    stage: str
    since: float
    """When the stage began, by the monotonic clock."""
    task: Any = None


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere, both on stderr; the time left by the speed so far.

    with Progress() as bar:
        bar.update("embed", done=10, total=600, details="118 images/s")
    """

    def __init__(self) -> None:
        self._rich: RichProgress | None = None
        self._now: _Shown | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._rich = _rich_progress(sys.stderr)
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich:
            self._rich.stop()

    def update(
        self, stage: str, *, done: int = 0, total: int = 0, details: str = "", seconds_left: float | None = None
    ) -> None:
        """`total` 0 means that it is not known; `seconds_left` is worked out where the caller does not know better."""
        now = time.monotonic()
        if self._now is None or self._now.stage != stage:
            self._begin(stage, now)
        assert self._now is not None
        if seconds_left is None and total and done:
            seconds_left = (total - done) * (now - self._now.since) / done
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        if self._rich:
            self._rich.update(self._now.task, completed=done, total=total or None, details=details, left=left)
        elif now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            count = f"{done}/{total}" if total else str(done) if done else ""
            note("  ".join(part for part in (stage, count, details, left) if part))

    def _begin(self, stage: str, now: float) -> None:
        if self._rich:
            if self._now:
                self._rich.remove_task(self._now.task)
            self._now = _Shown(stage, now, self._rich.add_task(stage, total=None, details="", left=""))
        else:
            self._now = _Shown(stage, now)


def _rich_progress(stream: TextIO) -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[details]}"),
        TextColumn("{task.fields[left]}", style="cyan"),
        console=Console(file=stream),
        transient=True,
        expand=True,
    )


def _to_stderr(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        # Nobody reads the notes any more; the work goes on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).replace("%", "", 1).lstrip("-").isdecimal() or cell in ("", "–")
