"""Images that are files of this machine: how they are read, whoever finds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from dinosearch.images.decode import BadImage
from dinosearch.images.read import read_stable
from dinosearch.images.source import FoundImage, StableBytes


class LocalFiles:
    """What folders, globs and named files have in common: paths relative to the folder `base`."""

    sequential = False

    def __init__(self, location: str, *, base: str) -> None:
        self.location = location
        self.base = base

    def stamp(self) -> str | None:
        return None

    def file_path(self, image: FoundImage) -> str | None:
        return os.path.join(self.base, image.path)  # noqa: PTH118 - surrogate escapes pass, and it is fast

    def shown_path(self, image: FoundImage) -> str:
        return self.file_path(image) or image.path

    def read(self, image: FoundImage) -> StableBytes:
        return read_stable(self.file_path(image) or image.path)

    def stream(self, images: Iterable[FoundImage]) -> Iterator[tuple[FoundImage, StableBytes | BadImage]]:
        raise AssertionError(f"{len(list(images))} files that can be read in any order are streamed")
