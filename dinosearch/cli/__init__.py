"""The `dinosearch` command: parse, call one function, show. Heavy imports wait inside the command that needs them."""

import warnings
from typing import Annotated

import typer

from dinosearch.cli import attention, compare, demo, export, forget, index, merge, models, probe, query, relocate, train
from dinosearch.cli.exits import Commands

app = typer.Typer(
    cls=Commands,
    help="Teach a vision transformer from your own images, then search and probe them by likeness.",
    epilog="In a folder of images: dinosearch train ./images, then index ./catalog, query cat.jpg, probe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train.add_to(app)
index.add_to(app)
forget.add_to(app)
relocate.add_to(app)
merge.add_to(app)
query.add_to(app)
probe.add_to(app)
compare.add_to(app)
export.add_to(app)
attention.add_to(app)
models.add_to(app)
demo.add_to(app)


def main() -> None:
    """The console script and `python -m dinosearch`."""
    # Pillow's remarks on odd EXIF and the like; what matters is a file's status
    warnings.filterwarnings("ignore", module="PIL")
    app(prog_name="dinosearch")


def _print_version(wanted: bool) -> None:
    if wanted:
        from dinosearch import __version__

        print(f"dinosearch {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass
