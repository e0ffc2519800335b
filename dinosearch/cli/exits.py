"""How a command ends: every DinosearchError becomes one red line and its exit code, here and nowhere else.

Unexpected exceptions are our mistakes and keep their traceback.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

from dinosearch.cli import show
from dinosearch.errors import DinosearchError, Interrupted

SOME_FAILED = 3
"""Finished, but some images could not be read."""
INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """The system asked to stop. Whoever saves on Ctrl-C saves on this too."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """For work that looks between steps whether to stop: the first Ctrl-C or SIGTERM only makes the answer yes.

    The second one interrupts at once.
    """
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_terminations())}

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if number != signal.SIGINT:
            _received.append(number)
        if asked:
            raise KeyboardInterrupt
        asked = True

    for number in before:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Commands(TyperGroup):
    """The group of all commands; everything they raise passes here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _terminations_as_exceptions():
                result = super().invoke(ctx)
            sys.stdout.flush()
        except (Interrupted, KeyboardInterrupt) as stop:
            show.error(str(stop) if isinstance(stop, Interrupted) else "interrupted")
            raise typer.Exit(128 + _received[-1] if _received else INTERRUPTED) from stop
        except DinosearchError as error:
            show.error(str(error))
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError as closed:
            # The reader (head, say) has seen enough. What Python flushes at exit must not complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from closed
        return result


_received: list[int] = []
"""Signals other than Ctrl-C that asked this process to stop."""


@contextmanager
def _terminations_as_exceptions() -> Iterator[None]:
    def stop(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        raise Terminated

    taken = [number for number in _terminations() if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _terminations() -> list[signal.Signals]:
    """SIGHUP: the terminal was closed; under nohup it is ignored, and stays so."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
