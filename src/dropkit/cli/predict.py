"""`dropkit predict`: a table through a model."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dropkit.cli.console import AsJson, Force, Header, Table, keep_tables, one_line_errors
from dropkit.errors import OptionError


class Engine(StrEnum):
    """Who starts workers."""

    ray = "ray"


def predict(
    model: Annotated[Path, typer.Argument(help="Directory that fit wrote.")],
    table: Table = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="CSV file to write; with an engine, a folder of Parquet files.",
            show_default="predictions.csv, or predictions",
        ),
    ] = None,
    header: Header = None,
    chunk_rows: Annotated[
        int, typer.Option(min=1, help="Rows read at a time; changes nothing in the output.")
    ] = 65_536,
    engine: Annotated[
        Engine | None,
        typer.Option(
            help="Share the rows of Parquet files among workers of a Ray cluster.", show_default="none"
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many, with an engine.")] = 2,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Predict every row of TABLE: adds mean, spread and interval, or class probabilities and entropy."""
    with one_line_errors():
        if engine is not None:
            _predict_by_workers(model, table, out or Path("predictions"), workers, force, as_json)
            return
        from dropkit.jobs import predict_table

        keep_tables(out if force else None, table)
        place = out or Path("predictions.csv")
        summary = predict_table(
            model, table, place, force=force,
            header="auto" if header is None else header, chunk_rows=chunk_rows,
        )  # fmt: skip
        if as_json:
            typer.echo(summary.to_json())
            return
        _tell(summary.rows, place, summary.columns, summary.notes)


def _predict_by_workers(
    model: Path, table: Path | None, out: Path, workers: int, force: bool, as_json: bool
) -> None:
    """The same through Ray, into a folder of Parquet files."""
    if table is None:
        raise OptionError("--engine ray was given without a table. Give a Parquet file or a folder of them.")
    if force:
        raise OptionError(
            "--force was given with --engine ray, which replaces no folder. Give another --out."
        )
    if out.suffix.lower() == ".csv":
        raise OptionError(
            f"--out {out} was given with --engine ray, which writes a folder of Parquet files. Give a name for that."
        )
    from dropkit.engines.ray_tables import predict_table

    done = predict_table(model, table, out, workers=workers)
    if as_json:
        typer.echo(done.to_json())
        return
    _tell(done.rows, out, done.columns, done.notes)


def _tell(rows: int, out: Path, columns: Sequence[str], notes: Sequence[str]) -> None:
    """What was done, and what the rows held that the model had not met."""
    for note in notes:
        typer.echo(note, err=True)
    more = " ..." if len(columns) > 8 else ""
    typer.echo(f"{rows:,} rows predicted into {out}: {', '.join(columns[:8])}{more}.")
