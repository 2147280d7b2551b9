"""What all commands share: options, errors of one line, and how a long run tells where it is."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropkit.errors import DropkitError

if TYPE_CHECKING:
    from dropkit.training import Progress

Table = Annotated[
    Path | None, typer.Argument(help="CSV or Parquet file; without one, a real data set that comes along.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Header = Annotated[
    bool | None,
    typer.Option(
        "--header/--no-header",
        help="Whether the first row names the columns.",
        show_default="found from the rows",
    ),
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A mistake of the caller is one line on standard error and exit status 2; nothing has been written."""
    try:
        yield
    except DropkitError as error:
        complain(str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        complain("interrupted; nothing was written.")
        raise typer.Exit(130) from None


def complain(text: str) -> None:
    """One line on standard error."""
    typer.echo("dropkit: " + " ".join(text.split()), err=True)


@contextmanager
def progress_line() -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None] | None]]:
    """What is decided goes to standard error; on a terminal a line says how the training goes."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield say, None
        return
    text = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Bar(*text, console=console, transient=True) as bar:
        line = bar.add_task("reading", total=None, state="")

        def progress(event: Progress) -> None:
            what = "searching for the rate" if event.stage == "search" else "training"
            best = f", best validation loss {event.best:.3f}" if event.best == event.best else ""
            state = (
                f"epoch {event.epoch} of {event.max_epochs}, {event.live} of {event.networks} networks{best}"
            )
            bar.update(line, description=what, total=event.max_epochs, completed=event.epoch, state=state)

        yield say, progress


def command_line() -> str:
    """What was typed, as a shell would take it again."""
    return shlex.join(["dropkit", *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode()
