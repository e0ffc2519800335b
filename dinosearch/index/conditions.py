"""What a search may be narrowed to: conditions on what tables say of their images. Speaks no SQL, knows no index."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dinosearch.errors import UsageError

BUILT_IN = ("path", "width", "height")
"""Columns that every image has: its path below its source, and its size in pixels; a table's own go before them."""

_FORM = re.compile(r"\s*([^=!<>~]+?)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a value; an image without the column never fulfils it."""

    column: str
    comparison: str
    """= != < <= > >= or ~ (contains, whatever the case of ASCII letters)."""
    value: str
    """Compared as a number where both are numbers, else as text; true and false are values too."""

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Of "price<=20". Raises UsageError."""
        found = _FORM.fullmatch(text)
        if not found:
            raise UsageError(f"{text!r} is no condition. Write COLUMN=VALUE, or != < <= > >= ~ (contains) instead of =")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.column}{self.comparison}{self.value}"

    @property
    def number(self) -> float | None:
        """The value as a number, if it is one. SQLite has no NaN: it is text."""
        if self.value in ("true", "false"):
            return float(self.value == "true")
        try:
            number = float(self.value)
        except ValueError:
            return None
        return None if math.isnan(number) else number


def check_columns(conditions: list[Condition], columns: list[str]) -> None:
    """Raise UsageError for a condition on a column that no table gave."""
    for condition in conditions:
        if condition.column not in (*columns, *BUILT_IN):
            known = ", ".join([*columns, *BUILT_IN])
            raise UsageError(f"no column {condition.column!r} in this index. There are: {known}")
