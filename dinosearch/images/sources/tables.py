"""Tables with a column of paths or URLs: CSV, TSV and Parquet. Their other columns are metadata.

The header decides which column has the paths: the first of COLUMNS that is there, in any case of letters. The values
of a CSV's column are numbers if all of them are written as numbers, true or false if all are one of the two, else text;
a Parquet column has its own type, dates become text, and what is no single value (lists, images) is left out.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dinosearch.errors import DinosearchError
from dinosearch.images.csv_rows import csv_rows
from dinosearch.images.sources.metadata import as_json
from dinosearch.images.sources.named import Named, NamedImages

COLUMNS = ("path", "image_path", "file_path", "filepath", "image", "file", "filename", "file_name", "url", "image_url")

TABLE_EXTENSIONS = (".csv", ".tsv", ".parquet")

_BATCH_ROWS = 10_000
# Neither 007 nor a number of more digits than a float holds is a quantity: both are names made of digits.
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,14})", re.ASCII)
_REAL = re.compile(r"-?(0|[1-9]\d{0,14})?\.\d+([eE][-+]?\d{1,2})?|-?[1-9]\d{0,14}(\.\d*)?[eE][-+]?\d{1,2}", re.ASCII)


class TableSource(NamedImages):
    """A row is an image; empty cells are left out of its metadata."""

    kind = "table"

    def names(self) -> Iterator[Named]:
        try:
            yield from (_parquet_rows if self.location.lower().endswith(".parquet") else _csv_rows)(self.location)
        except OSError as error:
            raise DinosearchError(
                f"cannot read {self.location} ({error.strerror or error}). Check the path; what is indexed of it stays "
                "as it is"
            ) from error


def _csv_rows(location: str) -> Iterator[Named]:
    """Goes through the text twice: a column's type is known only at its end."""
    # utf-8-sig: spreadsheets write a byte order mark. surrogateescape: names of files need not be UTF-8.
    text = Path(location).read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = _csv_cells(location, text)
    _, names = next(lines, (1, []))
    kinds: dict[int, set[str]] = {}
    for _, cells in lines:
        for at, cell in enumerate(cells):
            found = kinds.setdefault(at, set())
            if cell and "text" not in found:  # which decides
                found.add(_kind(cell))
    readers = {at: _reader(found) for at, found in kinds.items()}
    column = _path_column(location, names)
    for line, cells in itertools.islice(_csv_cells(location, text), 1, None):
        path = cells[column] if column < len(cells) else ""
        if not path:
            raise DinosearchError(f"{location} line {line} has no {names[column]}. Fill it in, or delete the line")
        values = {
            name: readers[at](cells[at])
            for at, name in enumerate(names)
            if at != column and name and at < len(cells) and cells[at]
        }
        yield Named(line, path, as_json(values))


def _csv_cells(location: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and stripped cells, without empty lines; the header comes first."""
    delimiter = "\t" if location.lower().endswith(".tsv") else ","
    try:
        for line, cells in csv_rows(list(io.StringIO(text, newline="")), delimiter=delimiter):
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                yield line, stripped
    except csv.Error as error:
        raise DinosearchError(
            f"{location} is no CSV ({error}). Close its quotes, double those inside quoted cells, and save it as UTF-8 "
            "text"
        ) from error


def _path_column(location: str, names: list[str]) -> int:
    lowered = [name.lower() for name in names]
    for name in COLUMNS:
        if lowered.count(name) == 1:
            return lowered.index(name)
    shown = ",".join(names)[:80] or "nothing"
    raise DinosearchError(
        f"{location} must have one column named path (or {', '.join(COLUMNS[1:])}); its header is {shown!r}. Mend it"
    )


def _kind(cell: str) -> str:
    if _WHOLE.fullmatch(cell):
        return "whole"
    if _REAL.fullmatch(cell):
        return "real"
    return "truth" if cell.lower() in ("true", "false") else "text"


def _reader(kinds: set[str]) -> Callable[[str], Any]:
    if kinds == {"whole"}:
        return int
    if kinds <= {"whole", "real"}:
        return float
    return (lambda cell: cell.lower() == "true") if kinds == {"truth"} else str


def _parquet_rows(location: str) -> Iterator[Named]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DinosearchError(f"{location} is Parquet. To read it: pip install 'dinosearch[tables]'") from error

    try:
        with parquet.ParquetFile(location) as file:
            names = file.schema_arrow.names
            column = names[_path_column(location, names)]
            schema = arrow.schema(
                [_exact(field) for field in file.schema_arrow if field.name == column or _is_single(field.type)]
            )
            row = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=schema.names):
                for values in arrow.Table.from_batches([batch]).cast(schema, safe=False).to_pylist():
                    row += 1
                    path = values.pop(column)
                    if not isinstance(path, str) or not path:
                        raise DinosearchError(f"{location} row {row}: {column} is no path. Write a path or URL in each")
                    plain = {name: _plain(value) for name, value in values.items()}
                    yield Named(row, path, as_json({name: value for name, value in plain.items() if value is not None}))
    except arrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DinosearchError(f"{location} is no Parquet file ({reason}). Check that it was copied whole") from error


def _is_single(kind: Any) -> bool:
    import pyarrow.types as types

    return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _exact(field: Any) -> Any:
    """Python's times have no nanoseconds."""
    import pyarrow as arrow

    return field.with_type(arrow.timestamp("us", field.type.tz)) if arrow.types.is_timestamp(field.type) else field


def _plain(value: object) -> object:
    """What JSON can hold of a single value; None where there is nothing."""
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, bool | int | str) and value != "" else None
