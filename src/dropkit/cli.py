"""The command line: a thin door. Each command is a public function of `jobs` plus printing."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.exceptions import TyperException

from dropkit.errors import DropkitError, DropkitWarning, OptionError

if TYPE_CHECKING:
    from dropkit.training import Progress

app = typer.Typer(
    name="dropkit", add_completion=False, pretty_exceptions_enable=False,
    help="Dropout for tables: predictions that know what they don't know.",
)  # fmt: skip


class Task(StrEnum):
    """What kind of target it is."""

    auto = "auto"
    regression = "regression"
    classification = "classification"


class Effort(StrEnum):
    """How many candidates and epochs."""

    quick = "quick"
    normal = "normal"
    thorough = "thorough"


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


@app.command()
def fit(
    table: Table = None,
    target: Annotated[str | None, typer.Option(help="Column to predict.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Model directory to write; the report lies in it.")] = Path(
        "model"
    ),
    task: Annotated[Task, typer.Option(help="What kind of target it is.")] = Task.auto,
    rate: Annotated[str, typer.Option(help="Chance to drop a hidden unit, or auto: rates compete.")] = "auto",
    members: Annotated[int, typer.Option(min=4, help="Thinned networks in the committee.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, weights and masks.")] = 0,
    effort: Annotated[Effort, typer.Option(help="How many candidates and epochs.")] = Effort.normal,
    max_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the rows at most.", show_default="from their number"),
    ] = None,
    test_share: Annotated[float, typer.Option(help="Share of rows held out for the report.")] = 0.2,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=number, category, boolean or date, where you know better; repeatable."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Column to leave out; repeatable.")] = None,
    header: Header = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Learn a column of TABLE: train, choose the rate, calibrate, write a model and its report."""
    with _one_line_errors():
        begun = time.perf_counter()
        from dropkit.jobs import DEMO_TARGET, FitOptions, demo_table, fit_table
        from dropkit.report import to_text

        if table is None and target not in (None, DEMO_TARGET):
            raise OptionError(
                f"--target {target} was given without a table. Give the CSV or Parquet file that holds it."
            )
        if table is not None and target is None:
            raise OptionError(
                f"{table} was given without a target. Say which column to predict: --target COLUMN."
            )
        options = FitOptions(
            task=task.value,
            rate=_rate(rate),
            members=members,
            seed=seed,
            max_epochs=max_epochs,
            test_share=test_share,
            effort=effort.value,
            kinds=dict(map(_kind, kind or [])),
            ignore=tuple(ignore or ()),
            header="auto" if header is None else header,
        )
        with _progress() as (say, progress):
            report = fit_table(
                demo_table() if table is None else table, target or DEMO_TARGET, out, options, force=force,
                command=_command(), say=say, progress=progress,
            )  # fmt: skip
        if as_json:
            typer.echo(report.to_json())
            return
        seconds = round(time.perf_counter() - begun)
        typer.echo(to_text(report))
        typer.echo(f"Model in {out}, report in {out / 'report.html'}, after {seconds} s.")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Directory that fit wrote.")],
    table: Table = None,
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("predictions.csv"),
    header: Header = None,
    chunk_rows: Annotated[
        int, typer.Option(min=1, help="Rows read at a time; changes nothing in the output.")
    ] = 65_536,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Predict every row of TABLE: adds mean, spread and interval, or class probabilities and entropy."""
    with _one_line_errors():
        from dropkit.jobs import predict_table

        summary = predict_table(
            model, table, out, force=force,
            header="auto" if header is None else header, chunk_rows=chunk_rows,
        )  # fmt: skip
        if as_json:
            typer.echo(summary.to_json())
            return
        for note in summary.notes:
            typer.echo(note, err=True)
        typer.echo(
            f"{summary.rows:,} rows predicted into {out}: {', '.join(summary.columns[:8])}"
            f"{' ...' if len(summary.columns) > 8 else ''}."
        )


@app.command()
def bench(
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="ROW", help="Rows of the table, or patterns such as call-*; all by default."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Threads of torch, in place of those that each row asks for; repeatable."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=6, help="Turns of each side, interleaved.")] = 21,
    slow: Annotated[bool, typer.Option("--slow", help="With the rows that take long to start.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of inputs, masks and the order of turns.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for bench.txt, bench.json and bench.svg.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory against torch and the peers that are installed; outputs are checked before they are timed."""
    with _one_line_errors():
        from dropkit.bench import choose, run_bench, to_json, to_text, write_bench

        with _progress() as (say, _):
            found = run_bench(
                choose(rows or ()), threads=threads or (), repeats=repeats, slow=slow, seed=seed, say=say
            )
        if out is not None:
            write_bench(found, out)
        typer.echo(to_json(found) if as_json else to_text(found))


def _rate(given: str) -> Any:
    if given == "auto":
        return given
    try:
        return float(given)
    except ValueError:
        raise OptionError(f"--rate {given} was given; it is auto or a number from 0 to below 1.") from None


def _kind(given: str) -> tuple[str, str]:
    name, equals, kind = given.rpartition("=")
    if not equals:
        raise OptionError(f"--kind {given} was given; write COLUMN=number, category, boolean or date.")
    return name, kind


def _command() -> str:
    return shlex.join(["dropkit", *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake of the caller is one line on standard error and exit status 2; nothing has been written."""
    try:
        yield
    except DropkitError as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written.")
        raise typer.Exit(130) from None


def _complain(text: str) -> None:
    typer.echo("dropkit: " + " ".join(text.split()), err=True)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None] | None]]:
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


def main() -> None:
    """Entry of the `dropkit` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a character gets its escape
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if sys.stdout is not None:  # closed by who called us
            sys.stdout.flush()
    except TyperException as error:  # typer knows no such option, or the option no such value
        said = str(getattr(error, "format_message", error.__str__)())
        _complain(f"{said.rstrip('.')}. See dropkit --help.")
        status = 2
    except OSError as error:
        status = 1
        if not isinstance(error, BrokenPipeError):  # who read us may have seen enough
            _complain(f"the output could not be written: {error.strerror or error}.")
        with contextlib.suppress(OSError, ValueError):  # or Python would complain when it flushes at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """What dropkit warns of is a sentence for the user; the warnings of libraries are for programmers."""
    if issubclass(category, DropkitWarning):
        typer.echo(" ".join(str(message).split()), err=True)


if __name__ == "__main__":
    main()
