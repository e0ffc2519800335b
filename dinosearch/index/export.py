"""Write an index's vectors and what they belong to into files that other programs read: npy, csv, parquet.

A row for each image that can be searched, in the order of `contents.read_vectors`; vectors are float32 of unit length.
Reads the catalog alone, a block at a time, as of one moment, so memory does not grow with the index.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dinosearch.errors import DinosearchError, UsageError
from dinosearch.index.catalog import Catalog
from dinosearch.index.rows import LiveFile
from dinosearch.index.sources import FollowedSources

FORMS = ("npy", "csv", "parquet")
FACTS = {"path": {"text"}, "source": {"text"}, "relative": {"text"}, "member": {"text"}, "frame": {"integer"}}
"""Columns that every row has, before those of tables, and their JSON types."""

Rows = Iterator[tuple[list[list[Any]], np.ndarray]]


def export_index(index_path: Path, *, form: str, out: Path | None = None) -> list[Path]:
    """Write the files and say which: OUT.npy and OUT.csv, or OUT.csv, or OUT.parquet.

    out: without its ending; the index's name in the current folder without, where nothing is replaced. What is at `out`
    is replaced once the new one is whole, but never a source of the index. Raises UsageError for these and for another
    form, DinosearchError when nothing can be written or pyarrow is not there, IndexNotFound and IndexUnusable.
    """
    if form not in FORMS:
        raise UsageError(f"no form {form!r}. Choose {', '.join(FORMS)}")
    base = str(out or Path(index_path.name))
    base = base.removesuffix(f".{form}")
    with Catalog.open(index_path) as catalog, catalog.snapshot():
        columns = catalog.metadata_columns()
        for name in _with_vast_numbers(catalog) if form == "parquet" else ():
            columns[name] = {"text"}
        size = (catalog.n_live(), int(catalog.meta("dim")))
        _refuse_loss(catalog, base, form, replace=out is not None)
        write = {"npy": _write_npy, "csv": _write_csv, "parquet": _write_parquet}[form]
        return write(base, columns, _rows(catalog, columns), size)


def _refuse_loss(catalog: Catalog, base: str, form: str, *, replace: bool) -> None:
    """Raise UsageError where the export would stand in the place of a source, or unasked of anything else."""
    sources = {os.path.realpath(root.location) for root in catalog.roots().values()}
    for path in [f"{base}.{ending}" for ending in (("npy", "csv") if form == "npy" else (form,))]:
        if os.path.realpath(path) in sources:
            raise UsageError(f"{path} is a source of the index; nothing was written. Name another place with --out")
        if not replace and os.path.lexists(path):
            raise UsageError(f"{path} exists. Name another place, or this one to replace it, with --out")


def _with_vast_numbers(catalog: Catalog) -> set[str]:
    """Columns of tables with a whole number that 64 bits do not hold."""
    found: set[str] = set()
    for file in catalog.live_files():
        said = json.loads(file.metadata) if file.metadata else {}
        found |= {name for name, value in said.items() if isinstance(value, int) and not -(2**63) <= value < 2**63}
    return found


def _rows(catalog: Catalog, columns: Iterable[str]) -> Rows:
    sources = FollowedSources(catalog)

    def facts(file: LiveFile) -> list[Any]:
        known = (sources.shown_path(file), sources.of(file).location, file.path, file.member, file.frame)
        said = json.loads(file.metadata) if file.metadata else {}
        return [*known, *(said.get(name) for name in columns)]

    for files, vectors in catalog.live_vectors():
        yield [facts(file) for file in files], vectors


def _write_npy(base: str, columns: Mapping[str, set[str]], rows: Rows, size: tuple[int, int]) -> list[Path]:
    """Row i of the array is line i + 2 of the table."""
    with _aside(f"{base}.npy", f"{base}.csv") as (array_path, table_path):
        with array_path.open("wb") as array, table_path.open("w", newline="", **_TEXT) as table:
            header = {"descr": "<f4", "fortran_order": False, "shape": size}
            np.lib.format.write_array_header_1_0(array, header)
            lines = csv.writer(table)
            lines.writerow(_titles(columns))
            for facts, vectors in rows:
                array.write(vectors.astype("<f4").tobytes())
                lines.writerows(map(_cells, facts))
        return [Path(f"{base}.npy"), Path(f"{base}.csv")]


def _write_csv(base: str, columns: Mapping[str, set[str]], rows: Rows, size: tuple[int, int]) -> list[Path]:
    with _aside(f"{base}.csv") as (path,):
        with path.open("w", newline="", **_TEXT) as file:
            lines = csv.writer(file)
            lines.writerow([*_titles(columns), *(f"v{i}" for i in range(size[1]))])
            for facts, vectors in rows:
                lines.writerows([*_cells(each), *map(str, vector)] for each, vector in zip(facts, vectors, strict=True))
        return [Path(f"{base}.csv")]


def _write_parquet(base: str, columns: Mapping[str, set[str]], rows: Rows, size: tuple[int, int]) -> list[Path]:
    """Columns of tables are text where a table has values of several kinds. A name that is not UTF-8 is escaped."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DinosearchError("parquet needs pyarrow: pip install 'dinosearch[tables]', or export --to npy") from error
    kinds = [_parquet_type(each) for each in (*FACTS.values(), *columns.values())]
    fields = [(title, getattr(pa, kind)()) for title, kind in zip(_titles(columns), kinds, strict=True)]
    schema = pa.schema([*fields, ("vector", pa.list_(pa.float32(), size[1]))])
    with _aside(f"{base}.parquet") as (path,):
        with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
            for facts, vectors in rows:
                by_column = zip(*facts, strict=True)
                arrays = [
                    pa.array([_parquet_value(value, kind) for value in column], getattr(pa, kind)())
                    for column, kind in zip(by_column, kinds, strict=True)
                ]
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), size[1]))
                writer.write_batch(pa.record_batch(arrays, schema=schema))
        return [Path(f"{base}.parquet")]


_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}


def _titles(columns: Iterable[str]) -> list[str]:
    """Of all columns but the vectors'. A table's column whose name is taken says where it comes from."""
    titles = list(FACTS)
    for name in columns:
        while name in titles or re.fullmatch(r"vector|v[0-9]+", name):
            name = f"{name} (table)"
        titles.append(name)
    return titles


def _cells(facts: Iterable[Any]) -> list[Any]:
    """For a CSV: what a table says in lists and objects as JSON."""
    return [json.dumps(value) if isinstance(value, list | dict) else value for value in facts]


def _parquet_type(kinds: set[str]) -> str:
    """Arrow's name of a type that holds values of some JSON types."""
    kinds = kinds - {"null"}
    if kinds and kinds <= {"true", "false"}:
        return "bool_"
    if kinds == {"integer"}:
        return "int64"
    return "float64" if kinds and kinds <= {"integer", "real"} else "string"


def _parquet_value(value: Any, kind: str) -> Any:
    if value is not None and kind == "float64":
        return float(value)  # Arrow refuses whole numbers that no float equals
    if value is None or kind != "string":
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@contextmanager
def _aside(*paths: str) -> Iterator[list[Path]]:
    """Files to write to, which become `paths` when all is written; none of them is left half."""
    parts = [Path(f"{path}.part") for path in paths]
    try:
        parts[0].parent.mkdir(parents=True, exist_ok=True)
        yield parts
        for part, path in zip(parts, paths, strict=True):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
    except OSError as error:
        raise DinosearchError(
            f"cannot write {paths[0]} ({error.strerror or error}). Free some space, or name another place with --out"
        ) from error
    finally:
        for part in parts:
            with suppress(OSError):  # it was never there
                part.unlink()
