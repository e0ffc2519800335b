"""The sources that an index follows: what its catalog remembers of them, as places to scan and paths to show."""

from __future__ import annotations

from typing import Protocol

from dinosearch.images.source import FoundImage, Source
from dinosearch.images.sources import known_source
from dinosearch.index.catalog import Catalog
from dinosearch.index.database import damaged


class _Stored(Protocol):
    @property
    def root(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def member(self) -> str: ...


class FollowedSources:
    """The sources of a catalog as of now, by the number of their root."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog_path = catalog.path
        self.by_root: dict[int, Source] = {
            root.id: known_source(root.kind, root.location) for root in catalog.roots().values()
        }

    def of(self, file: _Stored) -> Source:
        """The source that a file is in. Raises IndexUnusable where the catalog names none."""
        if file.root not in self.by_root:
            raise damaged(self._catalog_path, "a file is in no source")
        return self.by_root[file.root]

    def shown_path(self, file: _Stored) -> str:
        """Absolute path or URL of a file for people and programs."""
        return self.of(file).shown_path(FoundImage(file.path, 0, 0, file.member))
