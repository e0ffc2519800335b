"""A folder with all the images below it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dinosearch.images.decode import BadImage
from dinosearch.images.find import find_images
from dinosearch.images.read import read_stable
from dinosearch.images.source import FoundImage, Scan, ScanOptions, StableBytes


class FolderSource:
    """`location` is the folder's real path."""

    kind = "folder"
    sequential = False

    def __init__(self, location: str) -> None:
        self.location = location

    def stamp(self) -> str | None:
        return None

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        return find_images(Path(self.location))

    def file_path(self, image: FoundImage) -> str:
        return os.path.join(self.location, image.path)  # noqa: PTH118 - surrogate escapes pass, and it is fast

    def shown_path(self, image: FoundImage) -> str:
        return self.file_path(image)

    def read(self, image: FoundImage) -> StableBytes:
        return read_stable(self.file_path(image))

    def stream(self, images: Iterable[FoundImage]) -> Iterator[tuple[FoundImage, StableBytes | BadImage]]:  # noqa: ARG002
        raise AssertionError("folders are read in any order")
