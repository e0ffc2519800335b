"""Rows of CSV text as spreadsheets and scripts write it. Knows no columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence


def csv_rows(lines: Sequence[str], *, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Cells of each row, and the number of its last line.

    lines: with their ends. Python's reader lets a quote that nobody closes swallow the lines after it, silently; here
    csv.Error is raised, with the line in its message, where a cell goes over several lines and is not well formed.
    """
    rows, first = csv.reader(lines, delimiter=delimiter), 0
    try:
        for cells in rows:
            if rows.line_num - first > 1:
                list(csv.reader(lines[first : rows.line_num], delimiter=delimiter, strict=True))
            first = rows.line_num
            yield rows.line_num, cells
    except csv.Error as error:
        raise csv.Error(f"line {first + 1}: {error}") from error
