"""Images by a pattern that no shell has expanded: 'photos/**/*.png'."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator

from dinosearch.errors import DinosearchError
from dinosearch.images.find import in_byte_order, regular_file
from dinosearch.images.names import exclusion_test, hidden_test, is_excluded, is_image_name
from dinosearch.images.read import file_time
from dinosearch.images.source import FoundImage, Scan, ScanOptions
from dinosearch.images.sources.local import LocalFiles


class GlobSource(LocalFiles):
    """`location` is the absolute pattern; paths are relative to the longest part of it that is plain.

    * ? and [] match within a name, ** any number of folders. Hidden names match only where the pattern writes the dot,
    or where they are asked for. Links to folders are not followed, so ** has no cycles.
    """

    kind = "glob"

    def __init__(self, location: str) -> None:
        base, self._parts = _split(location)
        super().__init__(location, base=base)

    def paths(self) -> list[str]:
        """All regular files that match, images or not."""
        return [path for path, _ in _Walk(self.base, ScanOptions()).files(self._parts)]

    def scan(self, options: ScanOptions, *, note: Callable[[str], None]) -> Scan:  # noqa: ARG002
        excluded = exclusion_test(options)
        walk = _Walk(self.base, options)
        images = [
            FoundImage(path, facts.st_size, file_time(facts))
            for path, facts in walk.files(self._parts)
            if is_image_name(path) and not (excluded and is_excluded(path, excluded))
        ]
        return Scan(in_byte_order(images), sorted(walk.unreadable))


def is_pattern(spec: str) -> bool:
    return re.search(r"[*?\[]", spec) is not None


def absolute_pattern(pattern: str) -> str:
    """By which the pattern is known wherever it is typed; links in its plain beginning are resolved."""
    base, parts = _split(pattern if pattern.startswith("/") else f"./{pattern}")
    return "/".join([glob.escape(os.path.realpath(base).rstrip("/")), *parts])


def _split(pattern: str) -> tuple[str, list[str]]:
    """The folder that a pattern begins with, and its remaining parts: /data/**/*.png is /data and [**, *.png]."""
    parts = pattern.split("/")
    first = next((at for at, part in enumerate(parts) if is_pattern(part)), len(parts) - 1)
    rest = [part for part in parts[first:] if part]
    if rest and rest[-1] == "**":
        rest.append("*")
    return "/".join(parts[:first]) or "/", rest


class _Walk:
    """One walk below a folder; remembers which folders could not be listed."""

    def __init__(self, base: str, options: ScanOptions) -> None:
        if not os.path.isdir(base):  # noqa: PTH112 - Path's raises where it may not look
            raise DinosearchError(f"no folder {base}. Check the path; what is indexed of it stays as it is")
        self.unreadable: list[tuple[str, str]] = []
        self._base = base
        self._hidden = hidden_test(options)
        self._never = hidden_test(ScanOptions(include_hidden=True))

    def files(self, parts: list[str]) -> Iterator[tuple[str, os.stat_result]]:
        """Relative path and facts of each regular file that matches, once."""
        waiting = [("", tuple(parts))]
        seen = set(waiting)  # with several ** many ways lead to the same place
        given: set[str] = set()
        while waiting:
            folder, parts_left = waiting.pop()
            try:
                with os.scandir(os.path.join(self._base, folder)) as entries:  # noqa: PTH118 - surrogate escapes pass
                    for entry in entries:
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        for rest in self._matches(entry.name, parts_left):
                            if not rest:
                                if path not in given and (facts := regular_file(entry)):
                                    given.add(path)
                                    yield path, facts
                            elif (path, rest) not in seen and entry.is_dir(follow_symlinks=False):
                                seen.add((path, rest))
                                waiting.append((path, rest))
            except OSError as error:
                reason = error.strerror or str(error)
                if not folder:
                    raise DinosearchError(f"{self._base} cannot be listed ({reason}). Check its permissions") from error
                self.unreadable.append((folder, reason))

    def _matches(self, name: str, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        """What remains of the pattern once a name took its place: nothing if the pattern is used up."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            if not self._hidden(name):
                yield parts
            yield from self._matches(name, rest)
        elif fnmatch.fnmatchcase(name, part) and not (self._never if part.startswith(".") else self._hidden)(name):
            yield rest
