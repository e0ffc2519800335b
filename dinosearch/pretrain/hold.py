"""A run's folder: held by one process, and given back to the model it replaced if nothing came of the run."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from dinosearch.errors import DinosearchError, Interrupted, ModelLocked
from dinosearch.lock import held
from dinosearch.pretrain.checkpoint import PATTERN
from dinosearch.vit.folder import REPLACED, model_in, remove_model


@contextmanager
def held_run(folder: Path, *, resumed: bool, replace: bool) -> Iterator[None]:
    """`folder` belongs to this process, and `folder / "training"` exists.

    resumed: the run in the folder goes on. replace: what is there may go. A model is deleted when there is a new one,
    and other commands find it until then; whatever was there is back in its place when the run ends before its first
    checkpoint.
    Raises ModelLocked while another process trains there, and where one has made the folder meanwhile.
    """
    with ExitStack() as stack:
        if folder.exists() and not resumed:
            stack.enter_context(_lock(folder))
            empty = _is_empty(folder)
            if not (replace or empty):
                raise ModelLocked(f"another run has made {folder} meanwhile. Try again, or under another --name")
            if empty:
                _clear(folder / "training")
            stack.close()  # nobody trains there
            stack.enter_context(_made(folder) if empty else _replaced(folder))
        else:
            stack.enter_context(_made(folder))
        stack.enter_context(_lock(folder))
        try:
            yield
        finally:
            if _holds_something(folder):
                _let_go(folder)


def refuse_held(folder: Path) -> None:
    """Raises ModelLocked while another process trains in `folder`, before anything is looked at for nothing."""
    if (folder / "training" / "lock").exists():
        with _lock(folder):
            pass


def given_up(folder: Path) -> bool:
    """All that is there is what a run left behind that ended, or was killed, before it had anything."""
    try:
        refuse_held(folder)
        return _is_empty(folder)
    except (DinosearchError, OSError):
        return False


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    (folder / "training").mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Interrupted:
        if not _holds_something(folder):
            shutil.rmtree(folder)
        raise


@contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    training, aside = folder / "training", folder.with_name(f".{folder.name}-replaced")
    former = folder / REPLACED
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
        raise


def _let_go(folder: Path) -> None:
    """Delete what the run has replaced: a model once there is a new one, a run without a model as soon as this one can
    go on.
    """
    former = folder / REPLACED
    if not former.exists():
        return
    if (folder / "model.json").exists() or model_in(former) is None:
        with suppress(OSError):  # somebody reads there: the rest goes with the next --overwrite
            remove_model(former)
    elif not (former / "model.json").exists():  # a run that was to replace a model, and which nobody will go on with
        for checkpoint in (former / "training").glob(PATTERN):
            checkpoint.unlink()


def _clear(training: Path) -> None:
    """Of what a run left behind only the lock stays: somebody else may wait for it."""
    for path in training.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("lock"):
            path.unlink()


def _holds_something(folder: Path) -> bool:
    return (folder / "model.json").exists() or any((folder / "training").glob(PATTERN))


def _is_empty(folder: Path) -> bool:
    if _holds_something(folder) or (folder / REPLACED).exists():
        return False
    return [path.name for path in folder.iterdir()] == ["training"]  # and what else lies there is somebody's


def _lock(folder: Path) -> AbstractContextManager[None]:
    (folder / "training").mkdir(exist_ok=True)
    return held(
        folder / "training",
        locked=lambda holder: ModelLocked(
            f"{folder} is being trained by {holder}. Wait until that ends, or train under another --name"
        ),
        advice="Make it writable, or train under another --name",
    )
