"""`dropkit predict`: a table through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dropkit.cli.console import AsJson, Force, Header, Table, one_line_errors


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
    with one_line_errors():
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
