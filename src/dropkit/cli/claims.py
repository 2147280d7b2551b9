"""`dropkit claims`: the article's claims, predicted against measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dropkit.cli.console import AsJson, complain, one_line_errors

if TYPE_CHECKING:
    from dropkit.claims.claim import Claim
    from dropkit.claims.runner import Step


def claims(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Claims to try; all by default.")
    ] = None,
    as_list: Annotated[bool, typer.Option("--list", help="Name the claims and stop.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The long form: more data, rates and epochs; hours, not minutes.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=5, help="Independent repetitions.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    out: Annotated[
        Path,
        typer.Option(help="Folder for results/, claims.json and report.html; a second run goes on there."),
    ] = Path("claims"),
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Claims at a time.", show_default="one for each core")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished, too.")] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch the public data sets into the user's cache and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Try the article's claims: what is predicted, what is measured, and a verdict by a rule fixed beforehand."""
    with one_line_errors():
        from dropkit.claims import Setting, choose, run_claims, to_text
        from dropkit.claims import fetch as fetch_sets

        if fetch:
            folder = fetch_sets(say=lambda line: typer.echo(line, err=True))
            typer.echo(f"Data sets in {folder}.")
            return
        chosen = choose(names or ())
        if as_list:
            typer.echo(list_json(chosen) if as_json else list_text(chosen))
            return
        try:
            with progress(len(chosen)) as watch:
                found = run_claims(
                    chosen, Setting(seeds, seed, full), out=out, jobs=jobs, force=force, watch=watch
                )
        except KeyboardInterrupt:
            complain(
                f"interrupted; finished claims are kept in {out}, and the same command goes on from there."
            )
            raise typer.Exit(130) from None
        if as_json:
            typer.echo(found.to_json(), nl=False)
        else:
            width = shutil.get_terminal_size((140, 24)).columns  # nobody cuts the lines of a pipe
            typer.echo(to_text(found, width=min(max(width, 80), 140)), nl=False)
            typer.echo(f"Report in {out / 'report.html'}.")
            for one in found.unfinished:
                if one.status == "failed":
                    typer.echo(f"All that {one.name} said is in {out / 'results' / one.name}.log.", err=True)
        if not found.outcomes or any(one.status == "failed" for one in found.unfinished):
            raise typer.Exit(1)


def list_text(chosen: tuple[Claim, ...]) -> str:
    """A line for each claim."""
    widest = max(len(claim.name) for claim in chosen)
    return "\n".join(f"{claim.name:<{widest}}  {claim.title}" for claim in chosen)


def list_json(chosen: tuple[Claim, ...]) -> str:
    """What is declared of each claim, as JSON."""
    said = ("name", "title", "article", "prediction", "condition", "extras")
    return json.dumps([{key: getattr(claim, key) for key in said} for claim in chosen], indent=1)


@contextmanager
def progress(claims: int) -> Iterator[Callable[[Step], None]]:
    """Each verdict is a line on standard error; on a terminal a line below says which claims run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)

    def tell(step: Step) -> None:
        if step.state != "begun":
            kept = ", kept from an earlier run" if step.state == "kept" else f", {step.seconds:.0f} s"
            said = f"{step.state}: {step.said}" if step.state in ("failed", "not run") else step.said + kept
            console.print(f"{step.name}: {said}", markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield tell
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    running: list[str] = []
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("reading", total=claims)

        def watch(step: Step) -> None:
            tell(step)
            if step.state == "begun":
                running.append(step.name)
            elif step.name in running:
                running.remove(step.name)
            bar.update(line, description=", ".join(running), advance=step.state != "begun")

        yield watch
