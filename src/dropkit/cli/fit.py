"""`dropkit fit`: a table to a model and its report."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dropkit.cli.console import (
    AsJson,
    Force,
    Header,
    Table,
    command_line,
    keep_tables,
    logs,
    one_line_errors,
    progress_line,
)
from dropkit.errors import OptionError


class Task(StrEnum):
    """What kind of target it is."""

    auto = "auto"
    regression = "regression"
    classification = "classification"


class Engine(StrEnum):
    """Who starts workers."""

    torchrun = "torchrun"
    ray = "ray"


class Effort(StrEnum):
    """How many candidates and epochs."""

    quick = "quick"
    normal = "normal"
    thorough = "thorough"


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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints of a run that was stopped or killed.")
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Optimizer steps between checkpoints.", show_default="half a minute of work"
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="JSON-lines file outside OUT: losses, gap, rate, one line a look.", show_default="none"
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder of a log for TensorBoard.", show_default="none")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes that train together; the result is that of one, up to rounding."),
    ] = 1,
    engine: Annotated[
        Engine, typer.Option(help="Who starts them: torchrun on this machine, or a Ray cluster.")
    ] = Engine.torchrun,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Learn a column of TABLE: train, choose the rate, calibrate, write a model and its report."""
    with one_line_errors():
        begun = time.perf_counter()
        from dropkit.jobs import DEMO_TARGET, FitOptions, demo_table, fit_table
        from dropkit.report import to_text
        from dropkit.training import follow

        if table is None and target not in (None, DEMO_TARGET):
            raise OptionError(
                f"--target {target} was given without a table. Give the CSV or Parquet file that holds it."
            )
        if table is not None and target is None:
            raise OptionError(
                f"{table} was given without a target. Say which column to predict: --target COLUMN."
            )
        if engine is Engine.ray and workers == 1:
            raise OptionError(
                "--engine ray was given for one worker, who needs none. Give --workers 2 or more."
            )
        keep_tables(log, table)
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
        with (
            logs(log, tensorboard, resume=resume, force=force) as written,
            progress_line() as (say, progress),
        ):
            report = fit_table(
                demo_table() if table is None else table, target or DEMO_TARGET, out, options, force=force,
                resume=resume, checkpoint_every=checkpoint_every, workers=workers, engine=engine.value,
                command=command_line("--resume"), say=say, progress=follow(progress, written),
            )  # fmt: skip
        if as_json:
            typer.echo(report.to_json())
            return
        seconds = round(time.perf_counter() - begun)
        typer.echo(to_text(report))
        typer.echo(f"Model in {out}, report in {out / 'report.html'}, after {seconds} s.")


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
