"""Which names count: images by their extension, and what is passed over as hidden or excluded. Opens nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

from dinosearch.errors import UsageError
from dinosearch.images.source import ScanOptions

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
)
"""What counts as an image by name; what it really is, its content decides later."""

SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", ".git", ".hg", ".svn"}
)
"""Thumbnails of network drives, bins and stores that systems keep: passed over even where hidden names are taken."""

NEVER = ("._", ".Trash")
"""How names begin that are passed over even where hidden names are taken: a Mac's notes on a file, and its bins."""


def is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def hidden_test(options: ScanOptions) -> Callable[[str], bool]:
    """Tells whether a name (not a path) is passed over."""
    prefix = NEVER if options.include_hidden else "."
    return lambda name: name.startswith(prefix) or name in SYSTEM_FOLDERS


def exclusion_test(options: ScanOptions) -> Callable[[str], bool] | None:
    """Tells whether a relative path is excluded, a folder's with "/" at its end; None if nothing ever is.

    Patterns mean what they mean in .gitignore. As there, a file below an excluded folder cannot be taken in again: who
    asks goes through the folders from the top, or asks `is_excluded`.
    """
    if not options.exclude:
        return None
    from pathspec import GitIgnoreSpec

    try:
        return GitIgnoreSpec.from_lines(options.exclude).match_file
    except (ValueError, re.error) as error:
        raise UsageError(f"--exclude: {error}. Write patterns as in .gitignore: *.tif, drafts/, !keep.jpg") from error


def passed_over_test(options: ScanOptions) -> Callable[[str], bool]:
    """Tells of a relative path, whose folders nobody walks, whether any part of it is hidden or excluded."""
    hidden, excluded = hidden_test(options), exclusion_test(options)

    def passed_over(path: str) -> bool:
        parts = path.split("/")
        if any(hidden(part) for part in parts if part not in (".", "..")):
            return True
        return excluded is not None and is_excluded(path, excluded)

    return passed_over


def is_excluded(path: str, excluded: Callable[[str], bool]) -> bool:
    """Whether a path or any folder above it is excluded."""
    ends = [at + 1 for at, letter in enumerate(path) if letter == "/"]
    return any(excluded(path[:end]) for end in ends) or excluded(path)
