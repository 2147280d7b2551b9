"""`dropkit bench`: time and memory against torch and the peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dropkit.cli.console import AsJson, one_line_errors, progress_line


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
    with one_line_errors():
        from dropkit.bench import choose, run_bench, to_json, to_text, write_bench

        with progress_line() as (say, _):
            found = run_bench(
                choose(rows or ()), threads=threads or (), repeats=repeats, slow=slow, seed=seed, say=say
            )
        if out is not None:
            write_bench(found, out)
        typer.echo(to_json(found) if as_json else to_text(found))
