"""The benchmark: its arithmetic under a clock that is told the time, and the outputs of every row."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import dropkit as dk
from dropkit.bench import ROWS, bench_from_json, choose, run_bench, to_json, to_text, write_bench
from dropkit.bench.figure import target_ratio
from dropkit.bench.machine import Machine, cores_at_hand
from dropkit.bench.memory import Memory, measure_memory
from dropkit.bench.record import Bench, Result, duration, warnings_of
from dropkit.bench.rows import Row, torch_dropout
from dropkit.bench.run import check_rows, quieter
from dropkit.bench.timing import (
    BUDGET_NS,
    LEAST_REPEATS,
    MOST_LOOPS,
    Comparison,
    Interval,
    affordable,
    compare,
    interleave,
    loops_for,
    median_interval,
)
from dropkit.bench.work import Pair, check_dropped, dropping
from dropkit.errors import BrokenContractError, DropkitError, OptionError, OutputError


class ToldClock:
    """A clock that only the work moves on, by what the work is said to take, times noise."""

    def __init__(self, seed: int = 0, noise: float = 0.0) -> None:
        self.now = 0
        self.turns: list[str] = []
        self.order, self.noise = np.random.default_rng(seed), noise

    def __call__(self) -> int:
        return self.now

    def work(self, nanoseconds: float, name: str = "") -> Callable[[], None]:
        def run() -> None:
            self.turns.append(name)
            self.now += round(nanoseconds * math.exp(self.noise * self.order.standard_normal()))

        return run


# --- timing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "peer"), [(1_000, 35_000), (7_000_000, 3_500_000), (50, 50)])
def test_without_noise_the_ratio_is_exact(ours: int, peer: int) -> None:
    clock = ToldClock()
    found = compare(clock.work(ours), clock.work(peer), clock=clock, repeats=7)
    assert (found.ours, found.peer) == (ours, peer)
    assert found.ratio.low == found.ratio.middle == found.ratio.high == peer / ours
    assert found.extra.middle == ours - peer
    assert found.control.middle == 1
    assert found.quiet


def test_what_slows_the_whole_machine_cancels() -> None:
    clock = ToldClock()

    def slowing(nanoseconds: int) -> Callable[[], None]:
        def run() -> None:
            clock.now += nanoseconds * (1 + len(clock.turns) // 50)  # ten times slower towards the end
            clock.turns.append("")

        return run

    found = compare(slowing(3_000_000), slowing(30_000_000), clock=clock, repeats=101)
    assert found.ratio.middle == pytest.approx(10, rel=0.05)
    assert found.control.middle == pytest.approx(1, abs=0.03)


def test_times_that_differ_from_turn_to_turn_show_in_the_control() -> None:
    clock = ToldClock(seed=0, noise=3.0)
    run = clock.work(4e6)
    found = compare(run, run, clock=clock, repeats=6)
    assert not found.quiet


def test_every_repeat_gives_each_its_turn_in_a_shuffled_order() -> None:
    clock = ToldClock()
    runs = [clock.work(10, name) for name in "abc"]
    times = interleave(runs, (2, 3, 1), 40, clock, seed=1)
    assert times.shape == (40, 3)
    per_repeat = (1 + 2) + (1 + 3) + (1 + 1)  # one untimed call before each turn
    orders = set()
    for i in range(40):
        turn = clock.turns[i * per_repeat : (i + 1) * per_repeat]
        assert [turn.count(name) for name in "abc"] == [3, 4, 2]
        orders.add("".join(dict.fromkeys(turn)))
    assert len(orders) == 6  # of 40 shuffles one order is missing once in 250 seeds; the seed is fixed
    again = ToldClock()
    interleave([again.work(10, name) for name in "abc"], (2, 3, 1), 40, again, seed=1)
    assert again.turns == clock.turns


def test_the_untimed_call_is_not_counted() -> None:
    clock = ToldClock()
    costs = iter([1_000_000, 10, 1_000_000, 10])

    def run() -> None:
        clock.now += next(costs)

    assert interleave([run], [1], 2, clock, seed=0).tolist() == [[10], [10]]


@pytest.mark.parametrize("nanoseconds", [1, 300, 40_000, 1_500_000, 10**9])
def test_loops_fill_one_timing(nanoseconds: int) -> None:
    clock = ToldClock()
    loops = loops_for(clock.work(nanoseconds), clock, sample_ns=1_000_000)
    assert loops == min(MOST_LOOPS, max(1, round(1_000_000 / nanoseconds)))


def test_a_clock_that_stands_still_ends_at_the_most_loops() -> None:
    assert loops_for(lambda: None, lambda: 0) == MOST_LOOPS


def test_slow_calls_take_fewer_turns() -> None:
    clock = ToldClock()
    assert affordable(clock.work(1_000), clock.work(9_000), clock, 21) == 21
    assert affordable(clock.work(BUDGET_NS / 100), clock.work(BUDGET_NS / 100), clock, 21) == 12
    assert affordable(clock.work(BUDGET_NS), clock.work(1), clock, 21) == LEAST_REPEATS
    assert (
        median_interval(range(LEAST_REPEATS)).coverage
        >= 0.95
        > median_interval(range(LEAST_REPEATS - 1)).coverage
    )


# --- intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 15, 21, 50])
def test_the_coverage_is_that_of_the_order_statistics(n: int) -> None:
    found = median_interval(list(range(n, 0, -1)))
    k = round(found.low)
    assert found.high == n + 1 - k
    assert found.coverage == pytest.approx(max(0.0, 1 - 2 * binom.cdf(k - 1, n, 0.5)))
    if n >= 6:
        assert found.coverage >= 0.95
        assert 1 - 2 * binom.cdf(k, n, 0.5) < 0.95  # a narrower one would not do
    assert found.middle == (n + 1) / 2


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(5).lognormal(mean=math.log(20), sigma=0.7, size=(4000, 15))
    intervals = [median_interval(row) for row in draws]
    hits = sum(found.low <= 20 <= found.high for found in intervals)
    # Two-sided binomial at 1e-6; the seed is fixed, so this is the chance that a right interval needed another one.
    assert (
        binom.ppf(5e-7, 4000, intervals[0].coverage) <= hits <= binom.isf(5e-7, 4000, intervals[0].coverage)
    )


def test_under_noise_the_ratio_is_found_within_its_interval() -> None:
    hits = 0
    for seed in range(20):
        clock = ToldClock(seed, noise=0.3)
        found = compare(clock.work(5e6), clock.work(5e7), clock=clock, repeats=21, seed=seed)
        hits += found.ratio.low <= 10 <= found.ratio.high
        assert found.ratio.middle == pytest.approx(10, rel=0.5)
    assert hits >= binom.ppf(1e-6, 20, found.ratio.coverage)


def test_a_falling_function_turns_the_interval_round() -> None:
    assert Interval(2, 4, 8, 0.9).map(lambda x: 1 / x) == Interval(0.125, 0.25, 0.5, 0.9)


# --- memory --------------------------------------------------------------------------------------------


def test_memory_counts_results_noise_and_what_is_kept() -> None:
    x = torch.ones(1000, 1000, requires_grad=True)
    gradient = torch.ones_like(x)

    def keeps_two(t: Tensor) -> Tensor:
        return t.exp() * t.sin()  # multiplication keeps both factors; t itself is an input

    found = measure_memory(lambda: keeps_two(x), lambda y: torch.autograd.grad(y, x, gradient))
    assert found.kept == pytest.approx(8e6, rel=0.01)
    assert found.peak >= found.kept + 4e6

    def makes_array(t: Tensor) -> Tensor:
        torch.from_numpy(np.ones(250_000))
        return t * 2

    with torch.no_grad():
        found = measure_memory(lambda: makes_array(x), None)
    assert found.kept == 0
    assert found.peak == pytest.approx(6e6, rel=0.01)  # bounds the sum: both at once


# --- what is timed -------------------------------------------------------------------------------------


def test_the_outputs_of_every_row_are_checked() -> None:
    pairs = check_rows()
    assert set(pairs) == {row.name for row in ROWS if not row.missing()}
    for row in ROWS:
        assert row.name not in pairs or pairs[row.name].elements == math.prod(row.small)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "drops nothing": lambda x: x / 0.9,
    "drops half": lambda x: torch.nn.functional.dropout(x, 0.5),
    "does not scale": lambda x: x * (torch.rand_like(x) >= 0.1),
    "scales wrongly": lambda x: torch.nn.functional.dropout(x, 0.1) * 1.01,
    "another dtype": lambda x: torch.nn.functional.dropout(x, 0.1).double(),
    "another shape": lambda x: torch.nn.functional.dropout(x, 0.1)[:-1],
    "whole rows": lambda x: x * (torch.rand(len(x), 1) >= 0.1) / 0.9 * torch.tensor([0.0, 1.0]).repeat(32),
    "gradient of another mask": lambda x: x + (torch.nn.functional.dropout(x, 0.1) - x).detach(),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_work_is_not_timed(fault: str) -> None:
    pair = dropping(WRONG[fault], dk.functional.dropout, (64, 64), 0.1, backward=True)
    x = pair.ours.inputs[0]
    if fault.startswith("another"):  # these have no gradient of the input's form
        pair = dataclasses.replace(pair, ours=dataclasses.replace(pair.ours, gradient=None))
    with pytest.raises(BrokenContractError, match="Nothing was timed"):
        check_dropped(pair.ours, x, 0.1, (), "ours")


def test_a_run_checks_before_it_times() -> None:
    clock = ToldClock()
    calls = []

    def wrong(x: Tensor) -> Tensor:
        calls.append(1)
        return x / 0.9

    pair = dropping(wrong, torch.nn.functional.dropout, (64, 64), 0.1, backward=True)
    row = told_row(clock, 1e6, 1e6, "wrong", make=lambda shape: pair)
    with pytest.raises(BrokenContractError):
        run_bench([row], clock=clock, repeats=6)
    assert len(calls) == 1


def test_a_mask_that_is_not_shared_is_found() -> None:
    pair = dropping(
        lambda x: dk.functional.dropout(x, 0.1, shared=(1,)),
        lambda x: dk.functional.dropout(x, 0.1),
        (32, 16, 4), 0.1, shared=(1,), backward=True,
    )  # fmt: skip
    with pytest.raises(BrokenContractError, match="the peer: the mask is not constant along dims"):
        pair.check()


def test_rows_are_named_once_and_chosen_by_pattern() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert choose([]) == ROWS
    assert [row.name for row in choose(["kept", "call-1*"])] == [
        "call-1",
        "call-10",
        "call-100",
        "call-1000",
        "kept",
    ]
    with pytest.raises(OptionError, match="forward-float32"):
        choose(["no-such-row"])


# --- a run ---------------------------------------------------------------------------------------------


def told_row(clock: ToldClock, ours: float, peer: float, name: str, **options: object) -> Row:
    """A row of real dropout on a few elements, whose sides move the clock on by what they are told to take."""
    turns = clock.work(ours, "ours"), clock.work(peer, "peer")

    def moving(turn: Callable[[], None]) -> Callable[[Tensor], Tensor]:
        def form(x: Tensor) -> Tensor:
            turn()
            return dk.functional.dropout(x, 0.1)

        return form

    row = Row(
        name, "some work", "some peer", "times faster", 3, (1,), (8, 8), (8, 8),
        lambda shape: dropping(*map(moving, turns), shape, 0.1, backward=True),
    )  # fmt: skip
    return dataclasses.replace(row, **options)


def keeping(shape: tuple[int, ...]) -> Pair:
    """Torch on our side, which keeps four bytes an element."""
    return dropping(torch_dropout, torch_dropout, shape, 0.1, backward=True)


@pytest.fixture(scope="module")
def found() -> Bench:
    """One run of rows of every kind, by a told clock."""
    clock = ToldClock(noise=0.001)
    rows = [
        told_row(clock, 1e6, 4e6, "fast"),
        told_row(clock, 1e6, 2e6, "slow"),
        told_row(clock, 1e6, 1e6, "share", measure="of its time", target=1.5),
        told_row(clock, 907_000, 900_000, "call", measure="us more", target=10),
        told_row(clock, 1, 1, "kept", measure="bytes kept", target=0, make=keeping),
        told_row(clock, 1, 1, "absent", missing=lambda: "no such peer"),
        told_row(clock, 1, 1, "late", slow=True),
        told_row(clock, 1, 1, "wide", threads=(10**6,)),
    ]
    return run_bench(rows, clock=clock, repeats=9)


def test_verdicts_follow_from_the_targets(found: Bench) -> None:
    verdicts = {result.name: result.verdict for result in found.results}
    assert verdicts == {
        "fast": "reached", "slow": "not reached", "share": "reached", "call": "reached", "kept": "not reached"
    }  # fmt: skip
    figures = {result.name: result.figure.middle for result in found.results}
    assert figures["fast"] == pytest.approx(4, rel=0.01)
    assert figures["share"] == pytest.approx(1, rel=0.01)
    assert figures["call"] == pytest.approx(7, abs=2)
    assert {item.name for item in found.missing} == {"absent", "late", "wide"}


def test_address_bytes_are_not_kept_by_an_element() -> None:
    kept = run_bench(choose(["kept"]), repeats=6).results[0]
    assert kept.ours_memory.kept < 1000 < kept.elements
    assert kept.figure.middle == 0
    assert kept.peer_memory.kept == pytest.approx(4 * kept.elements, rel=0.001)
    assert kept.verdict == "reached"


def test_the_text_has_every_row_and_what_is_missing(found: Bench) -> None:
    text = to_text(found)
    for result in found.results:
        assert sum(line.startswith(result.name) for line in text.splitlines()) == 1
    for item in found.missing:
        assert f"{item.name}: not run, {item.reason}" in text
    assert max(map(len, text.splitlines())) <= 130


def test_json_gives_the_record_back(found: Bench) -> None:
    text = to_json(found)
    assert bench_from_json(text) == found
    assert json.loads(text)["verdicts"] == [result.verdict for result in found.results]
    for damaged in (
        "",
        "[]",
        "{}",
        text.replace('"ratio"', '"ration"'),
        text.replace('"seed": 0', '"seed": "0"'),
    ):
        with pytest.raises(DropkitError):
            bench_from_json(damaged)


def test_a_run_leaves_torch_as_it_was(found: Bench) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    clock = ToldClock()
    run_bench([told_row(clock, 1e6, 1e6, "row")], clock=clock, repeats=6, threads=[1])
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_chosen_threads_replace_those_of_the_row() -> None:
    clock = ToldClock()
    seen = []
    row = told_row(clock, 1e6, 1e6, "row", threads=(1,))
    make = row.make
    row = dataclasses.replace(row, make=lambda shape: (seen.append(torch.get_num_threads()), make(shape))[1])
    wanted = [1, 2] if cores_at_hand() >= 2 else [1]
    run = run_bench([row], clock=clock, repeats=6, threads=[1, 2])
    assert seen == wanted == [result.threads for result in run.results]


@pytest.mark.parametrize("options", [{"repeats": 5}, {"threads": [0]}])
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="was given"):
        run_bench([], **options)


def comparison(ratio: float, control: float) -> Comparison:
    def at(value: float) -> Interval:
        return Interval(value * 0.9, value, value * 1.1, 0.95)

    return Comparison(1e6, ratio * 1e6, at(ratio), at(1e6 - ratio * 1e6), at(control), 9, (1, 1))


def result(ratio: float, control: float = 1.0, target: float = 3.0) -> Result:
    memory = Memory(10, 0)
    return Result(
        "row", "w", "p", "times faster", target, 1, 8192, comparison(ratio, control), memory, memory, 1
    )


def test_the_quieter_attempt_is_kept_whatever_its_ratio() -> None:
    good, lucky = comparison(2, 1.01), comparison(200, 0.9)
    assert quieter(good, lucky) is quieter(lucky, good) is good


def test_a_noisy_control_is_timed_again_and_then_warned_of() -> None:
    machine = Machine("one", 4, 0.1, "3", "2", "1")
    calm = Bench("2026-01-01", machine, 0.1, 9, 0, 1.0, (result(4), result(5)), ())
    assert warnings_of(calm) == ()
    noisy = dataclasses.replace(calm, results=(result(4, control=1.05),))
    assert "too noisy for row" in warnings_of(noisy)[0]
    assert "1.05!" in to_text(noisy)
    shared = dataclasses.replace(calm, machine=dataclasses.replace(machine, load=3.0))
    assert "other work" in warnings_of(shared)[0]

    clock = ToldClock(noise=3.0)
    assert run_bench([told_row(clock, 1e6, 1e6, "row")], clock=clock, repeats=6).results[0].attempts == 3


def test_an_interval_that_holds_both_verdicts_is_marked() -> None:
    assert [result(r).verdict for r in (4, 3.1, 2.9, 2)] == [
        "reached",
        "reached?",
        "not reached?",
        "not reached",
    ]


def test_files_are_written_and_the_figure_stands_alone(found: Bench, tmp_path: Path) -> None:
    paths = write_bench(found, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["bench.txt", "bench.json", "bench.svg"]
    assert paths[0].read_text() == to_text(found)
    assert bench_from_json(paths[1].read_text()) == found
    svg = paths[2].read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for row in ("fast", "slow", "share", "call"):
        assert f"{row}, 1 thr" in svg
    assert "var(--ink)" in svg
    assert "--ink:" in svg
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="was given"):
        write_bench(found, tmp_path / "file")


def test_targets_in_the_figure_are_ratios() -> None:
    assert target_ratio(result(4)) == 3
    assert target_ratio(dataclasses.replace(result(4), measure="of its time", target=1.6)) == 1 / 1.6
    assert target_ratio(dataclasses.replace(result(4), measure="us more")) is None


def test_times_are_said_in_a_unit_that_suits() -> None:
    assert [duration(n) for n in (12, 3_400, 5_600_000, 2.5e9)] == ["12 ns", "3.4 us", "5.6 ms", "2.5 s"]
