"""dinosearch: teach a vision transformer from your own images, index them, and search and probe by likeness.

import dinosearch

index = dinosearch.build_index("./catalog")
matches = index.search("cat.jpg", top=10)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinosearch.api import Index, build_index, open_index
    from dinosearch.errors import DinosearchError
    from dinosearch.query.search import Match

__version__ = "0.1.0"
__all__ = ["DinosearchError", "Index", "Match", "__version__", "build_index", "open_index"]

_HOMES = {
    "DinosearchError": "dinosearch.errors",
    "Index": "dinosearch.api",
    "Match": "dinosearch.query.search",
    "build_index": "dinosearch.api",
    "open_index": "dinosearch.api",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for when it is: the command line starts without NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dinosearch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
