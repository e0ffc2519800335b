"""Derived forms of a model in OpenVINO's files, kept beside it: whole or not at all. Knows not how they are made."""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from dinosearch.vit.folder import ModelFolder, Note


def kept_form(model: ModelFolder, kind: str) -> Path | None:
    """The folder of a form (`vit.xml`, `vit.bin`) that was made before, under the model's fingerprint."""
    wanted, spare = _paths(model, kind)
    if _is_whole(wanted):
        return wanted
    return spare if _is_whole(spare) and not os.access(model.path, os.W_OK) else None


def keep_form(model: ModelFolder, kind: str, write: Callable[[Path], None], *, note: Note) -> Path:
    """Have a form written into a folder, which then appears under the model's fingerprint.

    Where the model's folder cannot be written, it is kept in a folder of this user's among the system's temporary ones.
    """
    wanted, spare = _paths(model, kind)
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        return _write_whole(wanted, write)
    except OSError as error:
        reason = error.strerror or str(error)
        note(f"{wanted.parent} cannot be written ({reason}); the converted form is kept in {spare.parent}")
        return _write_whole(spare, write)


def discard(path: Path) -> None:
    """Remove a form that cannot be read, so that it is made anew."""
    shutil.rmtree(path, ignore_errors=True)


def _paths(model: ModelFolder, kind: str) -> tuple[Path, Path]:
    name = f"{kind}-{model.fingerprint}"
    return model.cache_path / name, _own_temporary_path() / name


def _is_whole(path: Path) -> bool:
    return (path / "vit.xml").is_file() and (path / "vit.bin").is_file()


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


def _write_whole(path: Path, write: Callable[[Path], None]) -> Path:
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
