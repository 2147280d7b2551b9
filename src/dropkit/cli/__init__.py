"""The command line: a thin door, a file for each command. A command is a public function and its printing."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Annotated, TextIO

import typer
from typer.exceptions import TyperException

from dropkit.cli.bench import bench
from dropkit.cli.claims import claims
from dropkit.cli.console import complain
from dropkit.cli.fit import fit
from dropkit.cli.inspect import inspect
from dropkit.cli.predict import predict
from dropkit.errors import DropkitWarning

app = typer.Typer(
    name="dropkit", add_completion=False, pretty_exceptions_enable=False,
    help="Dropout for tables: predictions that know what they don't know.",
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        from dropkit import __version__

        typer.echo(f"dropkit {__version__}")
        raise typer.Exit


@app.callback()
def dropkit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Dropout for tables: predictions that know what they don't know."""


for command in (fit, predict, inspect, bench, claims):
    app.command()(command)


def main() -> None:
    """Entry of the `dropkit` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character gets its escape
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = show_warning
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if sys.stdout is not None:  # closed by who called us
            sys.stdout.flush()
    except TyperException as error:  # typer knows no such option, or the option no such value
        said = str(getattr(error, "format_message", error.__str__)())
        complain(f"{said.rstrip('.')}. See dropkit --help.")
        status = 2
    except OSError as error:
        status = 1
        if not isinstance(error, BrokenPipeError):  # who read us may have seen enough
            complain(f"the output could not be written: {error.strerror or error}.")
        with contextlib.suppress(OSError, ValueError):  # or Python would complain when it flushes at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """What dropkit warns of is a sentence for the user; the warnings of libraries are for programmers."""
    if issubclass(category, DropkitWarning):
        typer.echo(" ".join(str(message).split()), err=True)
