"""Find the image files below a folder. Knows names and sizes; opens no file."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.names import EXTENSIONS, exclusion_test, hidden_test
from dinosearch.images.read import file_time
from dinosearch.images.source import FoundImage, Scan, ScanOptions

_MODEL_FILES = ("model.json", "weights.safetensors")
"""By which a folder that `train` made is known; its pictures are curves."""


def find_images(root: Path, options: ScanOptions | None = None) -> Scan:
    """Walk `root` for files with an image's extension (any case).

    Skips hidden and excluded names, folders of models below `root`, and whatever is not a regular file in the end: a
    link to a regular file counts as that file, links to folders are not followed. Raises DinosearchError if `root` is
    no folder or cannot be listed.
    """
    if not os.path.exists(root):  # noqa: PTH110 - Path's raises where it may not look
        raise DinosearchError(f"no folder {root}. Check the path")
    if not os.path.isdir(root):  # noqa: PTH112
        raise DinosearchError(f"{root} is not a folder. Give the folder that holds the images")
    options = options or ScanOptions()
    hidden, excluded = hidden_test(options), exclusion_test(options)
    images: list[FoundImage] = []
    unreadable: list[tuple[str, str]] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        n_images, n_folders, of_model = len(images), len(folders), 0
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = entry.name
                    if hidden(name):
                        continue
                    path = f"{folder}/{name}" if folder else name
                    if entry.is_dir(follow_symlinks=False):
                        if excluded is None or not excluded(f"{path}/"):
                            folders.append(path)
                    elif (
                        name.lower().endswith(EXTENSIONS)
                        and (excluded is None or not excluded(path))
                        and (facts := regular_file(entry))
                    ):
                        images.append(FoundImage(path, facts.st_size, file_time(facts)))
                    else:
                        of_model += name in _MODEL_FILES
        except OSError as error:
            reason = error.strerror or str(error)
            if not folder:
                raise DinosearchError(f"{root} cannot be listed ({reason}). Check its permissions") from error
            unreadable.append((folder, reason))
        if folder and of_model == len(_MODEL_FILES):
            del images[n_images:], folders[n_folders:]
    return Scan(in_byte_order(images), sorted(unreadable))


def in_byte_order(images: Iterable[FoundImage]) -> list[FoundImage]:
    return sorted(images, key=lambda image: os.fsencode(image.path))


def regular_file(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """The file's facts, or None for a pipe, a device, a link to a folder or to nothing.

    Raises OSError where the folder may be listed but not searched: nothing in it can be read then.
    """
    try:
        found = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return None
        if entry.is_symlink() and error.errno == errno.EACCES:
            return None
        raise
    return found if stat.S_ISREG(found.st_mode) else None
