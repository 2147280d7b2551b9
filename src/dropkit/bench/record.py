"""What a run found: a frozen record, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Any

from dropkit import records
from dropkit.bench.machine import Machine
from dropkit.bench.memory import Memory
from dropkit.bench.rivals import Standing
from dropkit.bench.rows import Measure
from dropkit.bench.timing import CONTROL_TOLERANCE, Comparison, Interval
from dropkit.errors import OptionError


@dataclass(frozen=True, slots=True)
class Result:
    """One row on one number of threads.

    Attributes:
        name, work, peer, measure, target: as the row says.
        threads: torch's threads.
        elements: of the input.
        comparison: times; None where only memory is compared.
        ours_memory, peer_memory: bytes of one pass.
        attempts: how often it was timed until the control was quiet; the quietest stands here.
        standings: of the peers there were to choose from; each timed alone, before the comparison.
    """

    name: str
    work: str
    peer: str
    measure: Measure
    target: float
    threads: int
    elements: int
    comparison: Comparison | None
    ours_memory: Memory
    peer_memory: Memory
    attempts: int
    standings: tuple[Standing, ...] = ()

    @property
    def figure(self) -> Interval:
        """The figure that is judged, in the unit of `measure`."""
        if self.comparison is None:
            # The address is a few bytes a call; what grows with the input is a thousandth of a byte and more.
            kept = round(self.ours_memory.kept / self.elements, 3)
            return Interval(kept, kept, kept, 1.0)
        if self.measure == "times faster":
            return self.comparison.ratio
        if self.measure == "of its time":
            return self.comparison.ratio.map(lambda ratio: 1 / ratio)
        return self.comparison.extra.map(lambda nanoseconds: nanoseconds / 1000)

    def meets(self, value: float) -> bool:
        """Whether this value of the figure reaches the target."""
        return value >= self.target if self.measure == "times faster" else value <= self.target

    @property
    def reached(self) -> bool:
        """Whether the median reaches the target."""
        return self.meets(self.figure.middle)

    @property
    def verdict(self) -> str:
        """reached or not reached; with a question mark where the interval holds both."""
        clear = self.meets(self.figure.low) == self.meets(self.figure.high)
        return ("reached" if self.reached else "not reached") + ("" if clear else "?")

    @property
    def quiet(self) -> bool:
        """Whether the machine was quiet enough: ours against ours reads 1."""
        return self.comparison is None or self.comparison.quiet


@dataclass(frozen=True, slots=True)
class Missing:
    """A row that did not run here.

    Attributes:
        name: of the row.
        reason: what is missing.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the table.

    Attributes:
        date: year-month-day.
        machine: where.
        rate: chance to drop, in all rows.
        repeats: turns of each side.
        seed: of inputs and of the order of turns.
        seconds: the whole run.
        results: one for each row and number of threads.
        missing: rows that did not run.
    """

    date: str
    machine: Machine
    rate: float
    repeats: int
    seed: int
    seconds: float
    results: tuple[Result, ...]
    missing: tuple[Missing, ...]

    @property
    def noisy(self) -> tuple[Result, ...]:
        """Results whose control does not read 1."""
        return tuple(result for result in self.results if not result.quiet)

    @property
    def was_shared(self) -> bool:
        """Whether other work had taken half of the machine or more before the run began."""
        return self.machine.load > self.machine.cores / 2


def to_json(bench: Bench) -> str:
    """The whole record; what is computed from it is not repeated, but for the verdicts."""
    value: dict[str, Any] = dataclasses.asdict(bench)
    verdicts = [result.verdict for result in bench.results]
    return json.dumps(records.finite({"bench": value, "verdicts": verdicts}), indent=2, ensure_ascii=False)


def bench_from_json(text: str) -> Bench:
    """The record that `to_json` wrote.

    Raises:
        OptionError: the text is no JSON object with a bench in it.
        ModelDirectoryError: a part of it is missing, unknown, or of another type.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(
            f"a benchmark that is no JSON was given ({error}). Give what --json printed."
        ) from None
    if not isinstance(value, dict) or "bench" not in value:
        raise OptionError("JSON without a bench was given. Give what `dropkit bench --json` printed.")
    bench: Bench = records.rebuild(Bench, value["bench"], "bench")
    return bench


UNITS: dict[Measure, str] = {"times faster": "x", "of its time": "of", "us more": "us", "bytes kept": "B"}
HEADER = (
    "row",
    "thr",
    "ours",
    "peer",
    "figure",
    "95 % interval",
    "target",
    "verdict",
    "A/A",
    "peak MB",
    "B kept",
)


def to_text(bench: Bench) -> str:
    """The table with its legend, as a terminal shows it."""
    machine = bench.machine
    lines = [
        f"dropkit bench, {bench.date}: {machine.processor}, {machine.cores} cores, load {machine.load:.1f} "
        "before it began",
        f"Python {machine.python}, torch {machine.torch}, numba {machine.numba}; rate {bench.rate}, "
        f"{bench.repeats} repeats, seed {bench.seed}, {bench.seconds:.0f} s",
        "",
        *_table([HEADER, *map(_cells, bench.results)]),
        "",
        *_paragraph(
            "figure: ours is so many times faster (x), takes this share of the peer's time (of), or this much longer "
            "a call (+); medians of interleaved repeats, fewer for slow calls. A question mark: the interval holds "
            "both verdicts. A/A: ours against ours. peak MB, B kept: ours / peer; the most allocated beyond the "
            "inputs, and bytes an element kept for the backward pass."
        ),
        "",
        *_legend(bench),
    ]
    lines += [f"  {item.name}: not run, {item.reason}" for item in bench.missing]
    lines += _peers(bench)
    for warning in warnings_of(bench):
        lines += ["", *_paragraph(warning)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def warnings_of(bench: Bench) -> tuple[str, ...]:
    """What speaks against quoting the figures, in sentences."""
    found = []
    if bench.noisy:
        names = ", ".join(dict.fromkeys(result.name for result in bench.noisy))
        found.append(
            f"The machine is too noisy for {names}: ours against ours is not 1.00 +- {CONTROL_TOLERANCE}. Do not "
            "quote these; run again on a quiet machine."
        )
    if bench.was_shared:
        found.append(
            f"The machine had other work (load {bench.machine.load:.1f} on {bench.machine.cores} cores before the "
            "run): what takes longer is interrupted more often, which flatters the faster side. The control cannot "
            "see this."
        )
    return tuple(found)


def _legend(bench: Bench) -> list[str]:
    """What each row is, once."""
    said = {result.name: f"{result.work}; against {result.peer}" for result in bench.results}
    width = max(map(len, said), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in said.items()]


def _peers(bench: Bench) -> list[str]:
    """How all peers did where there were several."""
    lines = [""] if any(result.standings for result in bench.results) else []
    for result in bench.results:
        said = [
            f"{s.name}: {s.reason if s.nanoseconds is None else duration(s.nanoseconds)}"
            for s in result.standings
        ]
        if said:
            lines += _paragraph(f"{result.name}, {result.threads} thr, each peer alone: {'; '.join(said)}.")
    return lines


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_on_hyphens=False)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they must be, words to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    left = {0, rows[0].index("verdict")}
    return [
        "  ".join(
            cell.ljust(w) if k in left else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cells(result: Result) -> tuple[str, ...]:
    """One line of the table; as many cells as `HEADER`."""
    figure, times = result.figure, result.comparison
    control = "-" if times is None else f"{times.control.middle:.2f}" + ("" if times.quiet else "!")
    sides = (result.ours_memory, result.peer_memory)
    return (
        result.name,
        str(result.threads),
        "-" if times is None else duration(times.ours),
        "-" if times is None else duration(times.peer),
        quantity(figure.middle, result.measure),
        "-" if times is None else f"{number(figure.low)} .. {number(figure.high)}",
        (">= " if result.measure == "times faster" else "<= ") + quantity(result.target, result.measure),
        result.verdict,
        control,
        " / ".join(f"{memory.peak / 1e6:.1f}" for memory in sides),
        " / ".join(f"{round(memory.kept / result.elements, 1):g}" for memory in sides)
        if result.elements >= 4096
        else "-",
    )


def quantity(value: float, measure: Measure) -> str:
    """A figure with its unit, short."""
    sign = "+" if measure == "us more" and value > 0 else ""
    return f"{sign}{number(value)} {UNITS[measure]}"


def number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(nanoseconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            return f"{number(nanoseconds / size)} {unit}"
    return f"{number(nanoseconds)} ns"
