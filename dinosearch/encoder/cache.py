"""Derived forms of a model in OpenVINO's files, kept beside it: whole or not at all. Knows not how they are made."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import ModelFolder, Note

_DESCRIPTION_BYTES = 1 << 20
"""Of a form, beside its weights: 20 kB for a block."""


def kept_form(model: ModelFolder, kind: str) -> Path | None:
    """The folder of a form (`vit.xml`, `vit.bin`) that was made before, under the model's fingerprint."""
    name = _name(model, kind)
    if _is_whole(model.cache_path / name):
        return model.cache_path / name
    if os.access(model.path, os.W_OK) and _has_room(model.path, model):
        return None
    with contextlib.suppress(OSError):  # where not even a temporary folder can be had
        spare = _own_temporary_path() / name
        return spare if _is_whole(spare) else None
    return None


def keep_form(model: ModelFolder, kind: str, write: Callable[[Path], None], *, note: Note) -> Path:
    """Have a form written into a folder, which then appears under the model's fingerprint.

    Where the model's folder cannot be written or its disk is full, it is kept in a folder of this user's among the
    system's temporary ones. Raises DinosearchError if it cannot be kept there either.
    """
    name = _name(model, kind)
    try:
        model.cache_path.mkdir(parents=True, exist_ok=True)
        return _write_whole(model, model.cache_path / name, write)
    except OSError as error:
        reason = error.strerror or str(error)
    try:
        spare = _own_temporary_path()
        note(f"{model.cache_path} cannot be written ({reason}); the converted form is kept in {spare}")
        return _write_whole(model, spare / name, write)
    except OSError as error:
        raise DinosearchError(
            f"the converted form of {model.name} can be kept neither in {model.cache_path} ({reason}) nor in a "
            f"temporary folder ({error.strerror or error}). Free some space"
        ) from error


def discard(path: Path) -> None:
    """Remove a form that cannot be read, so that it is made anew."""
    shutil.rmtree(path, ignore_errors=True)


def _name(model: ModelFolder, kind: str) -> str:
    return f"{kind}-{model.fingerprint}"


def _is_whole(path: Path) -> bool:
    return (path / "vit.xml").is_file() and (path / "vit.bin").is_file()


def _has_room(folder: Path, model: ModelFolder) -> bool:
    """Whether a form fits. Asked before, since what OpenVINO raises later does not tell that the disk is full."""
    weights = model.weights_path.stat().st_size if model.weights_path.is_file() else 0  # float32, the most there is
    return shutil.disk_usage(folder).free >= weights + _DESCRIPTION_BYTES


def _own_temporary_path() -> Path:
    """A folder that outlives the process and that no other user can have filled."""
    if not hasattr(os, "getuid"):  # Windows: temporary folders are the user's own
        path = Path(tempfile.gettempdir()) / "dinosearch"
        path.mkdir(exist_ok=True)
        return path
    path = Path(tempfile.gettempdir()) / f"dinosearch-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    facts = path.lstat()
    if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid():
        return path
    return Path(tempfile.mkdtemp(prefix="dinosearch-"))


def _write_whole(model: ModelFolder, path: Path, write: Callable[[Path], None]) -> Path:
    if not _has_room(path.parent, model):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=".openvino-"))
    try:
        write(aside)
        for each in aside.iterdir():
            with each.open("rb+") as file:
                os.fsync(file.fileno())
        aside.chmod(0o755)
        discard(path)
        try:
            aside.rename(path)
        except OSError:
            if not _is_whole(path):  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path
