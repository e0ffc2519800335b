"""Follow sources: have those synced in which something changed. Knows what changes look like, not what a sync does.

Folders on local disks tell of themselves, through the operating system; on network disks they are looked through now
and then. Archives are followed by their file's stamp, what has none by the clock: a sync of what is as it was costs
next to nothing. A source that disappears is waited for; one that the index was made to forget is followed no more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dinosearch.errors import DinosearchError, IndexUnusable
from dinosearch.images.names import is_image_name
from dinosearch.images.source import Source
from dinosearch.index.catalog import Catalog, is_index
from dinosearch.index.database import network_file_system

QUIET_SECONDS = 1.0
"""A change is passed on when nothing else has changed for so long: copying a folder is one change."""
LONGEST_SECONDS = 30.0
"""But not later than this."""
LOOK_SECONDS = 0.5
"""Between two looks whether sources are there, and at the stamps of archives."""
CLOCK_SECONDS = 60.0
"""Between two syncs of a source that neither the system nor a stamp tells of."""
NETWORK_SECONDS = 900.0
"""The same, if its images are fetched from the network."""
RETRY_SECONDS = 30.0
"""Before a sync that went wrong is tried again."""


def keep_synced(
    sources: Iterable[Source],
    sync: Callable[[list[Source]], None],
    *,
    index_path: Path,
    note: Callable[[str], None],
) -> NoReturn:
    """Call `sync` with all sources, and again with those in which something changed, until it raises.

    What goes wrong with the first sync is raised. Later a DinosearchError is noted and the sync tried again, unless the
    index itself cannot be used any more or no source is left: those that the index was made to forget are not passed
    on. What changes while `sync` is at work is told of next; changes inside the index itself are none.
    """
    followed = [_Followed(source) for source in sources]
    due, first = list(followed), True
    while True:
        with _Changes([each for each in followed if each.by_system and each.present], index_path) as changes:
            listened_to_all = True
            while listened_to_all:
                if due:
                    try:
                        if not first:
                            for each in _forgotten(due, index_path):
                                note(f"{each.source.location} is no source of {index_path.name} any more: not followed")
                                due.remove(each)
                                followed.remove(each)
                        if due:
                            sync([each.source for each in due])
                    except IndexUnusable:
                        raise
                    except DinosearchError as error:
                        if first:
                            raise
                        note(f"{error} (tried again in {RETRY_SECONDS:.0f} seconds)")
                        for each in due:
                            each.retry_at = time.monotonic() + RETRY_SECONDS
                if not followed:
                    raise DinosearchError(
                        f"no source that was followed is one of {index_path.name} any more. Name those to follow: "
                        "dinosearch index SOURCE --watch"
                    )
                due, first = [], False
                changed = changes.wait()
                for each in followed:
                    was = each.present
                    listened_to_all &= not each.look(note)
                    if each.present and (not was or each.is_due() or each.source.location in changed):
                        due.append(each)
                        each.seen, each.retry_at = time.monotonic(), None


def _forgotten(due: list[_Followed], index_path: Path) -> list[_Followed]:
    """Those that are no sources of the index any more: a sync would take in again what was just erased."""
    if not is_index(index_path):
        return []  # it was deleted as a whole, and a sync makes it anew
    with Catalog.open(index_path) as catalog:
        known = {root.location for root in catalog.roots().values()}
    return [each for each in due if each.source.location not in known]


class _Followed:
    """A source and how its changes are noticed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        folder = source.kind == "folder"
        self.by_system = folder and network_file_system(Path(source.location)) is None
        self.seconds = NETWORK_SECONDS if "://" in source.location else CLOCK_SECONDS
        self.seen = time.monotonic()
        self.retry_at: float | None = None
        self._identity = self._identify()
        self._stamp = self._look_at_stamp()

    @property
    def present(self) -> bool:
        return self._identity is not None

    def look(self, note: Callable[[str], None]) -> bool:
        """Whether it went, came back or is another folder under the same name: then it has to be listened to anew."""
        before, self._identity = self._identity, self._identify()
        if before == self._identity:
            return False
        if self._identity is None:
            note(f"{self.source.location} is gone; what is indexed of it stays, and it is waited for")
        elif before is None:
            note(f"{self.source.location} is back")
        return self.by_system

    def is_due(self) -> bool:
        """By its stamp, or by the clock, or because a sync went wrong."""
        now = time.monotonic()
        if self.retry_at is not None and now >= self.retry_at:
            return True
        if self.by_system:
            return False
        before, self._stamp = self._stamp, self._look_at_stamp()
        return before != self._stamp or (self._stamp is None and now - self.seen >= self.seconds)

    def _identify(self) -> tuple[int, int] | None:
        if self.source.kind not in ("folder", "files", "archive", "list", "table"):
            return (0, 0)
        try:
            facts = os.stat(self.source.location)  # noqa: PTH116 - surrogate escapes pass
        except OSError:
            return None
        # The file of an archive or a list is another one each time it is written anew.
        return (facts.st_dev, facts.st_ino) if self.by_system else (0, 0)

    def _look_at_stamp(self) -> str | None:
        try:
            return self.source.stamp()
        except DinosearchError:
            return None


@dataclass
class _Changes:
    """What the system tells of some folders."""

    followed: list[_Followed]
    index_path: Path

    def __enter__(self) -> _Changes:
        from watchfiles import Change, watch

        self._index = os.path.realpath(self.index_path)
        self._watch = (
            watch(
                *[each.source.location for each in self.followed],
                watch_filter=lambda change, path: self._counts(path, gone=change == Change.deleted),
                step=int(1000 * QUIET_SECONDS),
                debounce=int(1000 * LONGEST_SECONDS),
                rust_timeout=int(1000 * LOOK_SECONDS),
                yield_on_timeout=True,
                ignore_permission_denied=True,
            )
            if self.followed
            else None
        )
        self._told = self._listen()  # from here on nothing is missed
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch:
            self._watch.close()

    def wait(self) -> set[str]:
        """Locations of the folders in which something changed, after a while without changes or none at all."""
        if self._watch is None:
            time.sleep(LOOK_SECONDS)
        paths, self._told = self._told or self._listen(), set()
        locations = [each.source.location for each in self.followed]
        return {each for each in locations if any(path.startswith(each) for path in paths)}

    def _listen(self) -> set[str]:
        try:
            return {path for _, path in next(self._watch)} if self._watch else set()
        except OSError as error:
            raise DinosearchError(
                f"cannot follow {self.followed[0].source.location} ({error}). Run index now and then instead of --watch"
            ) from error

    def _counts(self, path: str, *, gone: bool) -> bool:
        """Images, and folders that came; of what is gone, nothing says any more that it was a folder."""
        if path.startswith(f"{self._index}{os.sep}") or f"{self._index}{os.sep}".startswith(f"{path}{os.sep}"):
            return False
        return gone or is_image_name(path) or "." not in os.path.basename(path) or os.path.isdir(path)  # noqa: PTH119, PTH112
