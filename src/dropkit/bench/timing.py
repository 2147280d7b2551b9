"""Two functions timed against each other on a machine that does other things as well.

They take turns within one process, in an order shuffled anew for each repeat, and each repeat gives one ratio: what
slows both down cancels. A third turn times ours once more, against itself; that control must read 1.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

Clock = Callable[[], int]  # nanoseconds, never running backwards
Array = np.ndarray[Any, Any]

SAMPLE_NS = (
    4_000_000  # one timing lasts about this long: far above the clock's grain, below a scheduler's slice
)
MOST_LOOPS = 1 << 16
CONTROL_TOLERANCE = 0.03
LEAST_REPEATS = 6  # fewer give no interval of 95 %
BUDGET_NS = 8_000_000_000  # slow calls take fewer turns, so that a comparison ends in about this time
LONG_NS = 500_000_000  # a call that takes longer is not warmed up by an untimed one


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and where the true one lies.

    Attributes:
        low, middle, high: of the interval, in the unit of what was measured.
        coverage: chance that such an interval holds the true median, whatever the distribution.
    """

    low: float
    middle: float
    high: float
    coverage: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of a monotone function of the quantity."""
        low, high = sorted((function(self.low), function(self.high)))
        return Interval(low, function(self.middle), high, self.coverage)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours against a peer, and against itself.

    Attributes:
        ours, peer: nanoseconds a call, medians.
        ratio: peer / ours.
        extra: ours - peer, nanoseconds a call.
        control: ours / ours, 1 on a machine quiet enough.
        repeats: how many times each took its turn.
        loops: calls in one turn, of ours and of the peer.
    """

    ours: float
    peer: float
    ratio: Interval
    extra: Interval
    control: Interval
    repeats: int
    loops: tuple[int, int]

    @property
    def quiet(self) -> bool:
        """Whether the control reads 1 within the tolerance."""
        return abs(self.control.middle - 1) <= CONTROL_TOLERANCE


def median_interval(values: Sequence[float] | Array, level: float = 0.95) -> Interval:
    """Median with its distribution-free interval between two order statistics.

    P(x_(k) <= median <= x_(n+1-k)) >= 1 - 2 P(Binomial(n, 1/2) < k),    k the largest with at least `level`

    Args:
        values: (n,) independent measurements.
        level: coverage wanted; with few values the whole range is taken, and `coverage` says what that is worth.

    Source: Conover 1999, Practical Nonparametric Statistics, sec. 3.2.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    k, coverage = 1, 1 - 2 / 2**n
    below = 1 / 2**n
    for candidate in range(2, n // 2 + 1):
        below += math.comb(n, candidate - 1) / 2**n
        if 1 - 2 * below < level:
            break
        k, coverage = candidate, 1 - 2 * below
    return Interval(
        float(ordered[k - 1]), float(np.median(ordered)), float(ordered[n - k]), max(coverage, 0.0)
    )


def loops_for(run: Callable[[], object], clock: Clock, sample_ns: int = SAMPLE_NS) -> int:
    """How many calls fill one timing; found by doubling until they do."""
    loops = 1
    while loops < MOST_LOOPS:
        begun = clock()
        for _ in range(loops):
            run()
        spent = clock() - begun
        if spent >= sample_ns // 2:
            return max(1, min(MOST_LOOPS, round(loops * sample_ns / spent)))
        loops *= 2
    return MOST_LOOPS


def interleave(
    runs: Sequence[Callable[[], object]],
    loops: Sequence[int],
    repeats: int,
    clock: Clock,
    seed: int,
    warm: Sequence[bool] = (),
) -> Array:
    """Time several functions in turns.

    Args:
        runs: K functions.
        loops: (K,) calls of each in one turn.
        repeats: turns of each.
        clock: nanoseconds.
        seed: of the order of the turns, a fresh shuffle for each repeat.
        warm: (K,) whether an untimed call comes before each turn; all by default.

    Returns:
        (repeats, K) nanoseconds a call.
    """
    order = np.random.default_rng(seed)
    times = np.empty((repeats, len(runs)))
    for i in range(repeats):
        for k in order.permutation(len(runs)):
            run, count = runs[k], loops[k]
            if not warm or warm[k]:
                run()  # untimed: who had the cache and the threads before must not matter
            begun = clock()
            for _ in range(count):
                run()
            times[i, k] = (clock() - begun) / count
    return times


def time_once(run: Callable[[], object], clock: Clock) -> int:
    """Nanoseconds of one call."""
    begun = clock()
    run()
    return clock() - begun


def affordable(
    ours: Callable[[], object],
    peer: Callable[[], object],
    clock: Clock,
    repeats: int,
    budget_ns: int = BUDGET_NS,
) -> int:
    """The repeats that fit into the budget, at most as many as asked for and at least `LEAST_REPEATS`."""
    return fitting(time_once(ours, clock) + time_once(peer, clock), repeats, budget_ns)


def fitting(both: int, repeats: int, budget_ns: int = BUDGET_NS) -> int:
    """The same, for what one call of each takes together, in nanoseconds."""
    turns = 4 * both  # ours twice and the peer once, each with its untimed call
    return max(LEAST_REPEATS, min(repeats, budget_ns // max(turns, 1)))


def compare(
    ours: Callable[[], object], peer: Callable[[], object], *, clock: Clock, repeats: int = 21, seed: int = 0
) -> Comparison:
    """Time ours and the peer in turns, with the control; calls of a second take fewer turns than `repeats`, and come
    without the untimed call before each.
    """
    lengths = time_once(ours, clock), time_once(peer, clock)
    short = lengths[0] < LONG_NS, lengths[1] < LONG_NS
    loops = loops_for(ours, clock) if short[0] else 1, loops_for(peer, clock) if short[1] else 1
    repeats = affordable(ours, peer, clock, repeats) if all(short) else fitting(sum(lengths), repeats)
    with _no_collection():
        times = interleave((ours, peer, ours), (*loops, loops[0]), repeats, clock, seed, (*short, short[0]))
    first, other, again = times.T
    return Comparison(
        ours=float(np.median(first)),
        peer=float(np.median(other)),
        ratio=median_interval(other / first),
        extra=median_interval(first - other),
        control=median_interval(again / first),
        repeats=repeats,
        loops=loops,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would stop one of the two at random."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
