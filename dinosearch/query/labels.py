"""Labels of indexed files, from a CSV or from the folders they lie in. Knows nothing of vectors.

The CSV has a header and the columns path, label and, if wanted, split; others are ignored. Paths may be relative to it,
relative to a root of the index, or absolute; the first of these that is indexed counts, and a URL as it is.

By folders, the first one below an image's root is its label. Where these are `train` and `test`, `val` or both with
folders in them, as in ImageNet's layout, they are the split (both are tested on), and the next one is the label.

Of a file of several pages the first counts.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.images.csv_rows import csv_rows
from dinosearch.images.sources import is_url

if TYPE_CHECKING:
    from dinosearch.index.contents import IndexedFile

TRAIN = "train"
TEST = "test"
BY_FOLDER = "folders"
"""Given in place of a CSV's path; a CSV of that name is `./folders`."""
_SPLIT_FOLDERS = ({"train", "test"}, {"train", "val"}, {"train", "val", "test"})


@dataclass(frozen=True, slots=True)
class LabelRow:
    """A line of the CSV."""

    line: int
    path: str
    label: str
    split: str | None


@dataclass(frozen=True)
class Labels:
    """Labelled files of an index, in the order of their paths."""

    rows: list[int]
    """Positions in the list of indexed files."""
    labels: list[str]
    splits: list[str] | None
    """"train" or "test" for each; None when the CSV leaves it open."""
    unmatched: list[LabelRow]
    """Lines whose file is not in the index, or has no vector there."""
    n_repeated: int
    """Lines that say once more what another line says; they count once."""
    n_outside: int = 0
    """Files that lie in none of the folders that are labels."""


def load_labels(labels: Path | str, files: Sequence[IndexedFile]) -> Labels:
    """Read a CSV and find its files among the indexed ones, or label these by "folders".

    Raises DinosearchError for a file that is no such CSV, for two labels of one file, and when no file has a label
    (UsageError where none lies in a folder).
    """
    return _by_folder(files) if labels == BY_FOLDER else _by_csv(Path(labels), files)


def _by_folder(files: Sequence[IndexedFile]) -> Labels:
    positions: dict[str, int] = {}
    for position, file in enumerate(files):
        positions.setdefault(os.fspath(file.path), position)
    order = sorted(positions.values(), key=lambda position: os.fsencode(files[position].path))
    folders = {position: _folders(files[position].member or files[position].relative) for position in order}
    inside = [position for position in order if folders[position]]
    if not inside:
        raise UsageError("--labels folders needs images in subfolders. Sort them into some, or name a CSV")
    depth, splits = 0, None
    if {folders[position][0] for position in inside} in _SPLIT_FOLDERS and any(len(folders[p]) > 1 for p in inside):
        inside = [position for position in inside if len(folders[position]) > 1]
        depth, splits = 1, [TRAIN if folders[position][0] == TRAIN else TEST for position in inside]
        if len(set(splits)) < 2:  # the others lie side by side in their folder, and nothing says what they show
            splits = None
    return Labels(
        rows=inside,
        labels=[folders[position][depth] for position in inside],
        splits=splits,
        unmatched=[],
        n_repeated=0,
        n_outside=len(order) - len(inside),
    )


def _folders(relative: str) -> list[str]:
    """Those below the root that a file lies in, the outermost first; none where a list names it from elsewhere."""
    folders = relative.split("/")[:-1]
    return [] if is_url(relative) or (folders and folders[0] in ("", "..")) else folders


def _by_csv(csv_path: Path, files: Sequence[IndexedFile]) -> Labels:
    found: dict[int, LabelRow] = {}
    unmatched: list[LabelRow] = []
    n_repeated = 0
    finder = _Finder(csv_path, files)
    for row in _read_rows(csv_path):
        position = finder.find(row)
        if position is None:
            unmatched.append(row)
        elif position in found:
            _refuse_contradiction(csv_path, found[position], row)
            n_repeated += 1
        else:
            found[position] = row
    if not found:
        example = f"; line {unmatched[0].line} names {unmatched[0].path!r}" if unmatched else ""
        raise DinosearchError(
            f"no line of {csv_path} names an indexed image{example}. Write paths relative to the CSV or to an indexed "
            "folder, or absolute, or choose the index they belong to with --index"
        )
    order = sorted(found, key=lambda position: os.fsencode(files[position].path))
    splits = [found[position].split for position in order]
    return Labels(
        rows=order,
        labels=[found[position].label for position in order],
        splits=_all_or_none(csv_path, splits),
        unmatched=unmatched,
        n_repeated=n_repeated,
    )


def _read_rows(csv_path: Path) -> Iterator[LabelRow]:
    try:
        # utf-8-sig: spreadsheets write a byte order mark. surrogateescape: names of files need not be UTF-8.
        with csv_path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv_rows(list(file))
            _, header = next(rows, (1, []))
            columns = _columns(csv_path, header)
            for line, cells in rows:
                if any(cell.strip() for cell in cells):
                    yield _row(csv_path, line, cells, columns)
    except OSError as error:
        raise DinosearchError(f"cannot read {csv_path} ({error.strerror}). Check --labels") from error
    except csv.Error as error:
        raise DinosearchError(
            f"{csv_path} is no CSV ({error}). Close its quotes, and save it as comma-separated UTF-8 text"
        ) from error


def _columns(csv_path: Path, header: list[str]) -> dict[str, int]:
    names = [name.strip().lower() for name in header]
    for name in ("path", "label", "split"):
        if names.count(name) > 1 or (name not in names and name != "split"):
            shown = ",".join(header)[:80] or "nothing"
            raise DinosearchError(
                f"{csv_path} must begin with the header path,label or path,label,split (commas between, UTF-8); "
                f"it begins with {shown!r}. Mend its first line"
            )
    return {name: names.index(name) for name in ("path", "label", "split") if name in names}


def _row(csv_path: Path, line: int, cells: list[str], columns: dict[str, int]) -> LabelRow:
    values = {name: cells[i].strip() if i < len(cells) else "" for name, i in columns.items()}
    for name in ("path", "label"):
        if not values[name]:
            raise DinosearchError(f"{csv_path} line {line} has no {name}. Fill it in, or delete the line")
    split = values.get("split", "").lower() or None
    if split not in (None, TRAIN, TEST):
        raise DinosearchError(f"{csv_path} line {line}: split is {split!r}. Write train or test, or delete the column")
    return LabelRow(line, values["path"], values["label"], split)


class _Finder:
    """Where a path of the CSV is in the list of indexed files."""

    def __init__(self, csv_path: Path, files: Sequence[IndexedFile]) -> None:
        self._csv_path = csv_path
        self._positions: dict[str, int] = {}
        for position, file in enumerate(files):
            self._positions.setdefault(os.fspath(file.path), position)  # pages share their path, in order
        self._folder = csv_path.resolve().parent
        self._roots = list(dict.fromkeys(file.root for file in files))
        self._real_folders: dict[str, str] = {}

    def find(self, row: LabelRow) -> int | None:
        """Raises DinosearchError for a relative path that exists below several roots."""
        if is_url(row.path):
            return self._positions.get(row.path)
        beside = self._position(os.path.join(self._folder, row.path))  # noqa: PTH118 (a million rows)
        if beside is not None:
            return beside
        below = [self._below(root, row.path) for root in self._roots]
        matches = {position for position in below if position is not None}
        if len(matches) > 1:
            raise DinosearchError(
                f"{self._csv_path} line {row.line}: {row.path!r} lies below several indexed folders. "
                "Write its absolute path"
            )
        return matches.pop() if matches else None

    def _below(self, root: Path | str, path: str) -> int | None:
        if is_url(os.fspath(root)):
            return self._positions.get(f"{root}/{path}")  # a normal path has no two slashes side by side
        return self._position(os.path.join(root, path))  # noqa: PTH118 (a million rows)

    def _position(self, path: str) -> int | None:
        path = os.path.normpath(path)
        if path in self._positions:
            return self._positions[path]
        # The folder may be spelled through a symbolic link, while the index has its real name.
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return self._positions.get(f"{self._real_folders[folder]}{os.sep}{name}")


def _refuse_contradiction(csv_path: Path, first: LabelRow, second: LabelRow) -> None:
    for name in ("label", "split"):
        before, after = getattr(first, name), getattr(second, name)
        if before != after:
            raise DinosearchError(
                f"{csv_path} lines {first.line} and {second.line} give {second.path!r} two {name}s, {before!r} and "
                f"{after!r}. Delete one of them"
            )


def _all_or_none(csv_path: Path, splits: list[str | None]) -> list[str] | None:
    given = [split for split in splits if split is not None]
    if not given:
        return None
    if len(given) < len(splits):
        raise DinosearchError(
            f"{csv_path} leaves the split of {len(splits) - len(given)} lines open. "
            "Write train or test in each, or delete the column"
        )
    return given
