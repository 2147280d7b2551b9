"""From rows to a record: check, count memory, time; the outputs are checked before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from dropkit.bench.machine import this_machine
from dropkit.bench.memory import Memory, measure_memory
from dropkit.bench.record import Bench, Missing, Result, to_json, to_text
from dropkit.bench.rivals import Contest, Standing
from dropkit.bench.rows import ROWS, P, Row
from dropkit.bench.timing import BUDGET_NS, LEAST_REPEATS, Clock, Comparison, compare
from dropkit.bench.work import Pair, Work
from dropkit.errors import OptionError, OutputError

ATTEMPTS = 3  # a noisy control may be a neighbour's burst; more than this and the machine itself is noisy


def run_bench(
    rows: Sequence[Row] = ROWS,
    *,
    threads: Sequence[int] = (),
    repeats: int = 21,
    slow: bool = False,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Run the rows on this machine.

    Args:
        rows: what to compare.
        threads: torch's threads, in place of those each row asks for.
        repeats: turns of each side.
        slow: with the rows that take long to start.
        seed: of inputs, masks and the order of turns.
        clock: nanoseconds.
        say: is told which row runs.

    Returns:
        The record; torch's generator and number of threads are what they were.

    Raises:
        OptionError: too few repeats, or less than one thread.
        BrokenContractError: a side does not do what it is timed for.
    """
    if repeats < LEAST_REPEATS:
        raise OptionError(
            f"repeats={repeats} was given; at least {LEAST_REPEATS} are needed for an interval. Leave it out for 21."
        )
    if any(number < 1 for number in threads):
        raise OptionError(f"threads={tuple(threads)} was given; a row runs on 1 thread or more.")
    begun = clock()
    machine = this_machine()
    results: list[Result] = []
    missing: list[Missing] = []
    with _as_it_was():
        for row in rows:
            reason = "slow to start; asked for with --slow" if row.slow and not slow else row.missing()
            if reason:
                missing.append(Missing(row.name, reason))
                continue
            for number in tuple(threads) or row.threads:
                if number > machine.cores:
                    missing.append(
                        Missing(row.name, f"{number} threads need more than {machine.cores} cores")
                    )
                    continue
                say(f"{row.name}, {number} thread{'s' * (number > 1)}")
                torch.set_num_threads(number)
                torch.manual_seed(seed)
                results.append(measure(row, number, clock, repeats, seed))
    seconds = round((clock() - begun) / 1e9, 1)
    return Bench(date.today().isoformat(), machine, P, repeats, seed, seconds, tuple(results), tuple(missing))


def measure(row: Row, threads: int, clock: Clock, repeats: int, seed: int) -> Result:
    """Check and measure one row on as many threads as torch is set to."""
    made, peer = row.make(row.shape), row.peer
    standings: tuple[Standing, ...] = ()
    if isinstance(made, Contest):
        pair, chosen, standings = made.settle(clock)
        peer = f"{peer}: {chosen}"
    else:
        pair = made
        pair.check()
    ours_memory, peer_memory = (memory_of(side, again=bool(standings)) for side in (pair.ours, pair.peer))
    best, attempts, begun = None, 0, clock()
    while row.measure != "bytes kept" and (
        best is None or (not best.quiet and attempts < ATTEMPTS and clock() - begun < BUDGET_NS)
    ):
        found = compare(pair.ours.timed, pair.peer.timed, clock=clock, repeats=repeats, seed=seed + attempts)
        best = found if best is None else quieter(best, found)
        attempts += 1
    return Result(
        row.name, row.work, peer, row.measure, float(row.target), threads, pair.elements, best,
        ours_memory, peer_memory, attempts, standings,
    )  # fmt: skip


def quieter(first: Comparison, second: Comparison) -> Comparison:
    """The one whose control is nearer to 1: chosen without a look at the ratio."""
    return min(first, second, key=lambda found: abs(found.control.middle - 1))


def check_rows(rows: Sequence[Row] = ROWS) -> dict[str, Pair | Contest]:
    """Check the outputs of all rows on small inputs, without timing; gives what was checked.

    Raises:
        BrokenContractError: a side does not do what it is timed for.
    """
    pairs: dict[str, Pair | Contest] = {}
    with _as_it_was():
        for row in rows:
            if not row.missing():
                torch.manual_seed(0)
                pairs[row.name] = row.make(row.small)
                pairs[row.name].check()
    return pairs


def memory_of(work: Work, *, again: bool = False) -> Memory:
    """Memory of one pass; `again` where one has been made."""
    return measure_memory(work.forward, None if work.gradient is None else work.backward, again=again)


def write_bench(bench: Bench, folder: Path) -> tuple[Path, ...]:
    """Write bench.txt, bench.json and bench.svg into a folder.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    from dropkit.bench.figure import figure_svg

    contents = {
        "bench.txt": to_text(bench),
        "bench.json": to_json(bench) + "\n",
        "bench.svg": figure_svg(bench),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{folder} was given; nothing can be written there ({error.strerror}). Give a folder of your own."
        ) from None
    return tuple(folder / name for name in contents)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Torch's generator and threads are the caller's."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
