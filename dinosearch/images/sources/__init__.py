"""Sources of images: from what a user typed, or from what an index remembers. Knows the kinds, not their inside."""

import os
from collections.abc import Iterable
from pathlib import Path

from dinosearch.errors import DinosearchError
from dinosearch.images.source import Source
from dinosearch.images.sources.folder import FolderSource


def open_sources(specs: Iterable[str]) -> list[Source]:
    """The sources that some words on a command line name, each once. Raises DinosearchError."""
    found: dict[tuple[str, str], Source] = {}
    for spec in specs:
        for source in open_source(spec):
            found.setdefault((source.kind, source.location), source)
    return list(found.values())


def open_source(spec: str) -> list[Source]:
    """What one word names. Raises DinosearchError where nothing is or nothing can be made of it."""
    path = Path(spec)
    if not path.exists():
        raise DinosearchError(f"no folder {spec}. Check the path; what is indexed of it stays as it is")
    return [FolderSource(os.path.realpath(spec))]


def known_source(kind: str, location: str) -> Source:
    """The source that an index remembers; it need not be there any more, then scanning it raises DinosearchError."""
    assert kind == FolderSource.kind
    return FolderSource(location)
