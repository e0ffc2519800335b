"""Text files with one path or URL a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.sources.named import Named, NamedImages


class ListSource(NamedImages):
    """Empty lines and lines that begin with # say nothing; a name that begins so is written ./#name."""

    kind = "list"

    def names(self) -> Iterator[Named]:
        try:
            with Path(self.location).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                for number, line in enumerate(file, 1):
                    path = line.rstrip("\r\n")
                    if path.strip() and not path.lstrip().startswith("#"):
                        yield Named(number, path)
        except OSError as error:
            raise DinosearchError(
                f"cannot read {self.location} ({error.strerror}). Check the path; what is indexed of it stays as it is"
            ) from error


def is_text(path: str) -> bool:
    """Whether a file's beginning has no zero byte, as no text has."""
    try:
        with Path(path).open("rb") as file:
            return b"\0" not in file.read(8192)
    except OSError:
        return False
