"""What the process does in which a model is converted: torch, timm and what they hold in memory end with it."""

import signal
import sys
from pathlib import Path

from dinosearch.encoder.conversion import EXPLAINED, convert
from dinosearch.errors import DinosearchError
from dinosearch.vit.folder import open_model


def main(model_path: str, into: str) -> None:
    """Write `vit.xml` and `vit.bin` of the model in a folder into another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process if it stops
    try:
        convert(open_model(Path(model_path)), Path(into))
    except DinosearchError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(EXPLAINED) from error
