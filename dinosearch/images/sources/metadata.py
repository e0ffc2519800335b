"""What is said of an image, as the JSON text that an index keeps. Knows not who says it."""

from __future__ import annotations

import json
import re
from typing import Any

_UNDECODED = re.compile("[\udc80-\udcff]+")
_HALVES = re.compile("[\ud800-\udfff]")


def as_json(values: dict[str, Any]) -> str:
    """A JSON object, or empty where there is nothing.

    Bytes that were no UTF-8 are read as Windows-1252, which spreadsheets save; halves of letters, which JSON can spell
    and SQLite cannot store, become U+FFFD.
    """
    if not values:
        return ""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    if _HALVES.search(text):
        text = _UNDECODED.sub(lambda found: _windows_text(found[0]), text)
        values = json.loads(_HALVES.sub("\ufffd", text))
    return json.dumps(values, sort_keys=True)


def _windows_text(undecoded: str) -> str:
    return undecoded.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
