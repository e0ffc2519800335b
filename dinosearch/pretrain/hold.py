"""A run's folder: held by one process, and given back to the model it replaced if nothing came of the run."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from dinosearch.errors import Interrupted, ModelLocked
from dinosearch.lock import held
from dinosearch.pretrain.checkpoint import PATTERN
from dinosearch.vit.folder import remove_model

_REPLACED = "replaced"
"""The former model, in the folder of the run that replaces it: no other command looks for models there."""


@contextmanager
def held_run(folder: Path, *, resumed: bool, replace: bool) -> Iterator[None]:
    """`folder` belongs to this process, and `folder / "training"` exists.

    resumed: the run in the folder goes on. replace: what is there may go; it is deleted when the run has ended well or
    has something to go on from, and is back in its place when it ends before.
    Raises ModelLocked while another process trains there, and where one has made the folder meanwhile.
    """
    with ExitStack() as stack:
        if folder.exists() and not resumed:
            stack.enter_context(_lock(folder))
            if not replace:
                raise ModelLocked(f"another run has made {folder} meanwhile. Try again, or under another --name")
            stack.close()  # nobody trains there
            stack.enter_context(_replaced(folder))
        else:
            stack.enter_context(_made(folder))
        stack.enter_context(_lock(folder))
        yield


def refuse_held(folder: Path) -> None:
    """Raises ModelLocked while another process trains in `folder`, before anything is looked at for nothing."""
    if (folder / "training" / "lock").exists():
        with _lock(folder):
            pass


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    (folder / "training").mkdir(parents=True, exist_ok=True)
    former = folder / "training" / _REPLACED
    if former.exists():  # this run had replaced a model, was killed, and goes on
        remove_model(former)
    try:
        yield
    except Interrupted:
        if not _holds_something(folder):
            shutil.rmtree(folder)
        raise


@contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    training, aside = folder / "training", folder.with_name(f".{folder.name}-replaced")
    former = training / _REPLACED
    if aside.exists() and _holds_something(folder):  # of a kill between two renames, long since made good
        shutil.rmtree(aside)
    if not aside.exists():
        if former.exists() and not _holds_something(folder):  # the run that was to replace it was killed early
            former.rename(aside)
        else:
            folder.rename(aside)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        training.mkdir(parents=True)
        aside.rename(former)
        yield
    except BaseException:
        if not _holds_something(folder):
            if former.exists():
                former.rename(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        else:
            remove_model(former)
        raise
    remove_model(former)


def _holds_something(folder: Path) -> bool:
    return (folder / "model.json").exists() or any((folder / "training").glob(PATTERN))


def _lock(folder: Path) -> AbstractContextManager[None]:
    (folder / "training").mkdir(exist_ok=True)
    return held(
        folder / "training",
        locked=lambda holder: ModelLocked(
            f"{folder} is being trained by {holder}. Wait until that ends, or train under another --name"
        ),
        advice="Make it writable, or train under another --name",
    )
