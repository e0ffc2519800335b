"""Find the image files below a folder. Knows names and sizes; opens no file."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.source import FoundImage, Scan

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
)
"""What counts as an image by name; what it really is, its content decides later."""

SKIPPED_FOLDERS = frozenset({"@eaDir"})
"""Thumbnails that network drives (Synology) leave beside the originals."""


def find_images(root: Path) -> Scan:
    """Walk `root` for files with an image's extension (any case).

    Skips hidden names, and whatever is not a regular file in the end: a link to a regular file counts as that file,
    links to folders are not followed. Raises DinosearchError if `root` is no folder or cannot be listed.
    """
    if not root.exists():
        raise DinosearchError(f"no folder {root}. Check the path")
    if not root.is_dir():
        raise DinosearchError(f"{root} is not a folder. Give the folder that holds the images")
    images: list[FoundImage] = []
    unreadable: list[tuple[str, str]] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            for entry, path in _visible(root, folder):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.name.lower().endswith(EXTENSIONS) and (found := _regular(entry)):
                    images.append(FoundImage(path, found.st_size, found.st_mtime_ns))
        except OSError as error:
            reason = error.strerror or str(error)
            if not folder:
                raise DinosearchError(f"{root} cannot be listed ({reason}). Check its permissions") from error
            unreadable.append((folder, reason))
    images.sort(key=lambda image: os.fsencode(image.path))
    return Scan(images, sorted(unreadable))


def _visible(root: Path, folder: str) -> Iterator[tuple["os.DirEntry[str]", str]]:
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name not in SKIPPED_FOLDERS:
                yield entry, f"{folder}/{entry.name}" if folder else entry.name


def _regular(entry: "os.DirEntry[str]") -> os.stat_result | None:
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
