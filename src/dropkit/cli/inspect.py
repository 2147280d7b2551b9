"""`dropkit inspect`: what dropout does to a model, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dropkit.cli.console import AsJson, Force, Header, Table, command_line, keep_tables, one_line_errors
from dropkit.errors import OptionError


def inspect(
    model: Annotated[Path, typer.Argument(help="Directory that fit wrote.")],
    table: Table = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("inspection.html"),
    members: Annotated[int, typer.Option(min=4, help="Passes with masks.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of masks and of the choice of rows.")] = 0,
    rows: Annotated[int, typer.Option(min=8, help="Rows that are looked at, at most.")] = 1000,
    new: Annotated[
        Path | None,
        typer.Option(help="Table of rows the model was not trained on: the gap to them.", show_default=False),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative standard error of noise over signal that is accepted.", show_default=False
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="With flatness, capacity and stability; takes minutes.")
    ] = False,
    header: Header = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure what dropout does to MODEL on the rows of TABLE, which holds the target, and say what to change."""
    with one_line_errors():
        from dropkit.directory import check_output, write_file
        from dropkit.jobs import DEMO_TARGET, demo_table
        from dropkit.report.inspection import to_html
        from dropkit.tables.inspection import inspect_table
        from dropkit.tables.model import TableModel
        from dropkit.tables.reading import open_table

        check_output(out, force=force)
        keep_tables(out, table, new)
        loaded = TableModel.read(model)
        if table is None and loaded.target.name != DEMO_TARGET:
            raise OptionError(
                f"{model} was given without a table. Give a CSV or Parquet file with its columns and the target."
            )
        first_row: bool | Literal["auto"] = "auto" if header is None else header
        found = inspect_table(
            loaded,
            demo_table() if table is None else open_table(table, header=first_row),
            members=members,
            seed=seed,
            rows=rows,
            new=None if new is None else open_table(new, header=first_row),
            deep=deep,
            tolerance=tolerance,
        )
        with write_file(out, force=force) as file:
            file.write(to_html(found, source=str(model), command=command_line()))
        if as_json:
            typer.echo(found.to_json())
            return
        typer.echo(found.to_text())
        typer.echo(f"\nThe page is in {out}.")
