"""One writer per index. Knows nothing of what is written."""

from contextlib import AbstractContextManager
from pathlib import Path

from dinosearch.errors import IndexLocked
from dinosearch.lock import held


def writer_lock(index_path: Path) -> AbstractContextManager[None]:
    """Hold the index for writing; its folder exists already. Raises IndexLocked, naming the holder, at once."""
    return held(
        index_path,
        locked=lambda holder: IndexLocked(
            f"the index in {index_path} is being written by {holder}. Wait until that ends, or stop it"
        ),
        advice="Make it writable, or index under another --name",
    )
