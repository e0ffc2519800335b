"""Image files named one by one: what a shell makes of photos/*.jpg."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable

from dinosearch.errors import DinosearchError
from dinosearch.images.find import in_byte_order
from dinosearch.images.names import exclusion_test
from dinosearch.images.read import file_time
from dinosearch.images.source import FoundImage, Scan, ScanOptions
from dinosearch.images.sources.local import LocalFiles


class FilesSource(LocalFiles):
    """Some files of the folder `location`; others in it do not count.

    The source itself does not know what was named in earlier runs. An index tells it with `add`, before the scan; then
    the scan has the old and the new ones, without those that exist no more, and is as complete as that of a folder.
    """

    kind = "files"

    def __init__(self, location: str, names: Iterable[str] = ()) -> None:
        super().__init__(location, base=location)
        self._names = set(names)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._names)

    def add(self, names: Iterable[str]) -> None:
        self._names.update(names)

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        """Named files count even if their names are hidden; excluded ones do not."""
        if not os.path.isdir(self.location):  # noqa: PTH112 - Path's raises where it may not look
            raise DinosearchError(f"no folder {self.location}. Check the path; what is indexed of it stays as it is")
        excluded = exclusion_test(options)
        images = []
        for name in self._names:
            if excluded is None or not excluded(name):
                try:
                    facts = os.stat(os.path.join(self.location, name))  # noqa: PTH116, PTH118 - surrogate escapes pass
                except OSError:
                    continue
                if stat.S_ISREG(facts.st_mode):
                    images.append(FoundImage(name, facts.st_size, file_time(facts)))
        return Scan(in_byte_order(images))
