"""A folder with all the images below it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dinosearch.images.find import find_images
from dinosearch.images.source import Scan, ScanOptions
from dinosearch.images.sources.local import LocalFiles


class FolderSource(LocalFiles):
    """`location` is the folder's real path."""

    kind = "folder"

    def __init__(self, location: str) -> None:
        super().__init__(location, base=location)

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        return find_images(Path(self.location), options)
