"""What all commands share: options, errors of one line, and how a long run tells where it is."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropkit.errors import DropkitError, OptionError

if TYPE_CHECKING:
    from dropkit.training import Progress

Table = Annotated[
    Path | None,
    typer.Argument(
        help="CSV or Parquet file, or a folder of Parquet files; without one, a real data set that comes along."
    ),
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


def state_in_words(event: Progress) -> str:
    """Loss, gap and rate of the best network, in one line."""
    said = [f"epoch {event.epoch}/{event.max_epochs}"]
    if event.networks > 1:
        said.append(f"{event.live} of {event.networks} networks")
    if event.best == event.best:
        said.append(f"loss {event.best:.3f}, gap {event.gap:+.3f}")
    elif event.train == event.train:  # nothing validates
        said.append(f"training loss {event.train:.3f}")
    inputs = f" (inputs {event.input_rate:g})" if event.input_rate else ""
    return ", ".join([*said, f"rate {event.rate:g}{inputs}"])


@contextmanager
def progress_line() -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None] | None]]:
    """What is decided goes to standard error; on a terminal a line says how the training goes."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield say, None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TextColumn("left at most"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        line = bar.add_task("reading", total=None, state="")
        shown: tuple[object, ...] = ()

        def progress(event: Progress) -> None:
            nonlocal shown
            part = (event.stage, event.hidden)
            if part != shown:  # other networks start from epoch 0: what is left is counted anew
                bar.reset(line, total=event.max_epochs)
                shown = part
            what = "searching for the rate" if event.stage == "search" else "training"
            bar.update(line, description=what, completed=event.epoch, state=state_in_words(event))

        yield say, progress


@contextmanager
def logs(
    log: Path | None, tensorboard: Path | None, *, resume: bool, force: bool
) -> Iterator[Callable[[Progress], None] | None]:
    """What writes down how the training goes, where that is asked for."""
    from dropkit.training import JsonLines, TensorBoard, follow

    with ExitStack() as open_logs:
        writers: list[Callable[[Progress], None]] = []
        if log is not None:
            writers.append(open_logs.enter_context(JsonLines(log, resume=resume, force=force)))
        if tensorboard is not None:
            writers.append(open_logs.enter_context(TensorBoard(tensorboard)))
        yield follow(*writers)


def keep_tables(output: Path | None, *tables: Path | None) -> None:
    """Refuse an output that is a table which is read: --force replaces results, never data."""
    for table in tables:
        if output and table and output.exists() and table.exists() and output.samefile(table):
            raise OptionError(f"{output} is the table that is read; it is not replaced. Give another path.")


def command_line(*without: str) -> str:
    """What was typed, as a shell would take it again; without some options that make no difference to the result."""
    words = ["dropkit", *(word for word in sys.argv[1:] if word not in without)]
    return shlex.join(words).encode("utf-8", "backslashreplace").decode()
