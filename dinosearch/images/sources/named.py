"""Images that a file names, by path or URL: what lists and tables have in common. Knows no file format."""

from __future__ import annotations

import os
import stat
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.find import in_byte_order
from dinosearch.images.names import exclusion_test, is_excluded
from dinosearch.images.read import file_time
from dinosearch.images.source import UNTRUSTED_TIME, FoundImage, Scan, ScanOptions, StableBytes
from dinosearch.images.sources.local import LocalFiles
from dinosearch.images.sources.remote import find_urls, is_url, read_url


@dataclass(frozen=True, slots=True)
class Named:
    """One line or row."""

    line: int
    path: str
    metadata: str = ""


class NamedImages(LocalFiles):
    """`location` is the file that names them. What it names counts whatever its extension, and hidden or not.

    A path is relative to the folder of `location`; if nothing is there, to the current folder, and then an absolute
    path from there on. What is named and not there is an image that cannot be read, not one that is gone.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location, base=os.path.dirname(location))  # noqa: PTH120 - surrogate escapes pass

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:
        """Raises DinosearchError for a file that cannot be read, for two lines that contradict each other, and when
        nothing is there that it names."""
        excluded = exclusion_test(options)
        named: dict[str, Named] = {}
        for each in self.names():
            path = each.path if is_url(each.path) else os.path.normpath(each.path)
            first = named.setdefault(path, each)
            if first.metadata != each.metadata:
                raise DinosearchError(
                    f"{self.location} lines {first.line} and {each.line} say different things of {path!r}. "
                    "Delete one of them"
                )
        wanted = {path: each for path, each in named.items() if not (excluded and is_excluded(path, excluded))}
        places = list(dict.fromkeys([self.base, str(Path.cwd())]))
        images = [self._look(path, places, each.metadata) for path, each in wanted.items() if not is_url(path)]
        if images and all(image.mtime_ns == UNTRUSTED_TIME for image in images):
            raise DinosearchError(
                f"none of the {len(images)} files that {self.location} names is there. Check its paths, and that their "
                "disk is attached; what is indexed of it stays as it is"
            )
        urls = {path: each.metadata for path, each in wanted.items() if is_url(path)}
        if urls:
            note(f"{len(urls)} images of {self.location} lie in the network")
            remote, silence = find_urls(urls)
            if silence and not images:
                raise DinosearchError(
                    f"none of the {len(urls)} addresses that {self.location} names answers ({silence}). Check them and "
                    "the network; what is indexed of it stays as it is"
                )
            images += remote
        return Scan(in_byte_order(images))

    @abstractmethod
    def names(self) -> Iterator[Named]:
        """What the file says, in its order."""

    def file_path(self, image: FoundImage) -> str | None:
        return None if is_url(image.path) else super().file_path(image)

    def shown_path(self, image: FoundImage) -> str:
        """Without the .. of a path relative to the list; what is before it is no link, so it is the same file."""
        path = self.file_path(image)
        return image.path if path is None else os.path.normpath(path)

    def read(self, image: FoundImage) -> StableBytes:
        return read_url(image) if is_url(image.path) else super().read(image)

    def _look(self, path: str, places: list[str], metadata: str) -> FoundImage:
        for place in places:
            try:
                facts = os.stat(os.path.join(place, path))  # noqa: PTH116, PTH118 - surrogate escapes pass
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(facts.st_mode):
                found = path if place == self.base else os.path.join(place, path)  # noqa: PTH118
                return FoundImage(found, facts.st_size, file_time(facts), metadata=metadata)
        return FoundImage(path, 0, UNTRUSTED_TIME, metadata=metadata)
