"""Exact tests of mask bits; every one gives p-values, and one false-alarm rate is stated for all of them together.

With n p-values in a run, an alarm is a p-value below RATE / n, so a run in which all is well gives an alarm with a
chance below RATE. Seeds are fixed: what passes once passes always.

    python tests/bit_statistics.py      the tables of the documentation: what was computed, and what found which fault
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, survivor_scale
from faulty_bits import DROPKIT, FAULTS, Address, Source, with_fault

Array = np.ndarray[Any, Any]

RATE = 1e-6  # of a false alarm, in all of a run
SCALE = int(os.environ.get("DROPKIT_TRUST_SCALE", "1"))  # the nightly run draws so many times more

RATES = (0.5, 0.1, 0.01, 1 / 3, 0.9, 0.9999, 3 / 65536, 5e-6, 1e-5)
WIDTH = 4096
BASES = 32 * SCALE  # addresses around which neighbours are compared
PAIRS = 1 << 14  # of counters that differ in one bit, for each of the 128 bits

# By how much neighbours differ: by one, and in one high bit.
DISTANCES = {
    "seed": (1, 1 << 31, 1 << 32, 1 << 63),
    "step": (1, 1 << 16, 1 << 24, 1 << 31),
    "member": (1, 1 << 8, 1 << 16, 1 << 23),
    "sample": (1, 1 << 16, 1 << 31, 1 << 32, 1 << 39),
}
LIMITS = {"seed": 1 << 64, "step": 1 << 32, "member": 1 << 24, "sample": 1 << 40}
SHIFTS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 512, 2048)  # of features within one mask


class Outcome(NamedTuple):
    """One p-value: of which statistic, about what."""

    statistic: str
    about: str
    p: float


def rate_in_use(p: float) -> float:
    """The chance to drop after rounding to 2**-16, or 2**-32 for tiny rates; 0 and 1 stay."""
    scale = float(survivor_scale(torch.tensor(p, dtype=torch.float64)))
    return 1 - 1 / scale if scale else 1.0


def two_sided(count: Any, n: int, p: float) -> Any:
    """Exact binomial p-value: twice the smaller tail, at most 1."""
    return np.minimum(
        1, 2 * np.minimum(stats.binom.cdf(count, n, p), stats.binom.sf(np.asarray(count) - 1, n, p))
    )


def agreement(pairs: list[tuple[Array, Array]], p: float) -> Iterator[float]:
    """Whether masks are independent: how often they agree, in all and in each of the eight lanes of a block."""
    rate = rate_in_use(p)
    chance = rate**2 + (1 - rate) ** 2
    same = np.stack([one == other for one, other in pairs])
    yield float(two_sided(same.sum(), same.size, chance))
    if same.shape[-1] % 8 == 0:
        lanes = same.reshape(-1, 8)
        yield from two_sided(lanes.sum(axis=0), len(lanes), chance).tolist()


def addresses(label: str, count: int = BASES) -> Iterator[Address]:
    """Addresses to compare around: every other one has the small fields of ordinary use, the others any."""
    draw = np.random.default_rng([20140615, *label.encode()])
    for i in range(count):
        bits = {"seed": 63, "step": 30, "member": 22, "sample": 38} if i % 2 else dict.fromkeys(LIMITS, 6)
        numbers = {name: int(draw.integers(0, 1 << bit)) for name, bit in bits.items()}
        yield Address(site=f"layers.{i}", **numbers)


def totals(source: Source) -> Iterator[Outcome]:
    """How many elements are dropped in all."""
    for p in RATES:
        rows = (
            256 if 0.001 < p < 0.999 else 4096
        ) * SCALE  # where one side is rare, one lane more or less must show
        dropped = rows * WIDTH - int(source.keep(Address(seed=1), rows, WIDTH, p, False).sum())
        yield Outcome("totals", f"p = {p:.6g}", float(two_sided(dropped, rows * WIDTH, rate_in_use(p))))


def positions(source: Source) -> Iterator[Outcome]:
    """How often each position of a mask is dropped, and each row."""
    rows, width = 8192 * SCALE, 64
    for p in (0.5, 0.1):
        dropped = ~source.keep(Address(seed=2), rows, width, p, False)
        for axis, name, n in ((0, "position", rows), (1, "row", width)):
            values = two_sided(dropped.sum(axis=axis), n, rate_in_use(p))
            yield from (Outcome("positions", f"p = {p}, {name} {i}", float(v)) for i, v in enumerate(values))


def _compare(source: Source, moves: Iterator[tuple[Address, Address]], p: float) -> Iterator[float]:
    pairs = [
        (source.keep(one, 1, WIDTH, p, False), source.keep(other, 1, WIDTH, p, False)) for one, other in moves
    ]
    yield from agreement(pairs, p)


def neighbours(source: Source) -> Iterator[Outcome]:
    """Masks whose addresses differ in one field, by one or in one high bit, are independent."""
    for p in (0.5, 0.1):
        for field, distances in DISTANCES.items():
            for distance in distances:
                moves = (
                    (
                        a,
                        a._replace(
                            **{
                                field: getattr(a, field) + 1
                                if distance == 1
                                else getattr(a, field) ^ distance
                            }
                        ),
                    )
                    for a in addresses(f"{field} {distance}")
                )
                for value in _compare(source, moves, p):
                    yield Outcome(f"neighbours: {field}", f"p = {p}, {field} + {distance}", value)
        for about, change in (
            ("next name", lambda a: {"site": f"layers.{int(a.site[7:]) + 1}"}),
            ("one letter more", lambda a: {"site": a.site + "."}),
            ("next call", lambda a: {"call": 1}),
        ):
            moves = ((a, a._replace(**change(a))) for a in addresses(about))
            for value in _compare(source, moves, p):
                yield Outcome("neighbours: site", f"p = {p}, {about}", value)
        for shift in SHIFTS:
            masks = [source.keep(a, 1, WIDTH, p, False)[0] for a in addresses(f"feature {shift}")]
            # Pairs that do not overlap, so that they are independent of each other.
            pairs = [
                tuple(mask.reshape(-1, 2, shift).swapaxes(0, 1))
                for mask in (m[: WIDTH // (2 * shift) * 2 * shift] for m in masks)
            ]
            for value in agreement([(one.reshape(-1), other.reshape(-1)) for one, other in pairs], p):
                yield Outcome("neighbours: feature", f"p = {p}, {shift} further", value)


def diagonals(source: Source) -> Iterator[Outcome]:
    """One field one up is not another field one up: no two fields are added up somewhere."""
    for one, other in itertools.combinations(LIMITS, 2):
        moves = (
            (a._replace(**{one: getattr(a, one) + 1}), a._replace(**{other: getattr(a, other) + 1}))
            for a in addresses(f"{one} {other}")
        )
        for value in _compare(source, moves, 0.5):
            yield Outcome("diagonals", f"{one} and {other}", value)


def defined(where: Address, width: int, p: float) -> Array:
    """The mask of one row as `dropkit.masks.philox` defines it, (1, width)."""
    key = torch.tensor(signed(site_key(where.seed, site_hash(where.site, where.call))))
    member, samples = torch.tensor(where.member), torch.tensor([where.sample])
    return bernoulli_keep(
        key, member, samples, where.step, width, torch.tensor(p, dtype=torch.float64)
    ).numpy()


def exchanged_fields(source: Source) -> Iterator[Outcome]:
    """A mask is independent of the one that is defined for the same numbers in each other's place."""
    for one, other in itertools.combinations(LIMITS, 2):
        pairs = []
        for a in addresses(f"exchange {one} {other}"):
            small = a._replace(**{name: getattr(a, name) % (1 << 22) for name in (one, other)})
            turned = small._replace(**{one: getattr(small, other), other: getattr(small, one)})
            if small != turned:
                pairs.append((source.keep(small, 1, WIDTH, 0.5, False), defined(turned, WIDTH, 0.5)))
        for value in agreement(pairs, 0.5):
            yield Outcome("exchanged fields", f"{one} and {other}", value)


def layouts(source: Source) -> Iterator[Outcome]:
    """A mask does not depend on how its input lies in memory: here chance has no part, one difference is an alarm."""
    for i, where in enumerate(addresses("layouts", 4)):
        rows, width = 16 + i, 24 + i
        same = np.array_equal(
            source.keep(where, rows, width, 0.5, True), source.keep(where, rows, width, 0.5, False)
        )
        yield Outcome("layouts", f"{rows} x {width}", float(same))


def avalanche(source: Source) -> Iterator[Outcome]:
    """A counter that differs in one bit gives a block in which each bit differs with chance 1/2: 128 x 128 counts."""
    draw = np.random.default_rng(7)
    counters = draw.integers(0, 1 << 32, (PAIRS * SCALE, 4)).astype(np.uint64)
    keys = draw.integers(0, 1 << 32, (PAIRS * SCALE, 2)).astype(np.uint64)
    plain = source.blocks(counters, keys)
    for bit in range(128):
        near = counters.copy()
        near[:, bit // 32] ^= np.uint64(1 << bit % 32)
        changed = (plain ^ source.blocks(near, keys)).astype(np.uint32)
        counts = np.unpackbits(changed.view(np.uint8), axis=1, bitorder="little").sum(axis=0, dtype=np.int64)
        values = two_sided(counts, len(counters), 0.5)
        yield from (Outcome("avalanche", f"bit {bit} to bit {i}", float(v)) for i, v in enumerate(values))


STATISTICS = (totals, positions, neighbours, diagonals, exchanged_fields, layouts, avalanche)


def outcomes(source: Source) -> list[Outcome]:
    """Every p-value of a run."""
    return [outcome for statistic in STATISTICS for outcome in statistic(source)]


def alarms(run: list[Outcome], rate: float = RATE) -> list[Outcome]:
    """Those of a run that chance does not explain."""
    return [outcome for outcome in run if outcome.p < rate / len(run)]


def table() -> Iterator[str]:
    """The statistics of the masks, and what found each planted fault, as Markdown."""
    run = outcomes(DROPKIT)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for outcome in run:
        by_name[outcome.statistic].append(outcome.p)
    yield f"{len(run)} p-values, {len(alarms(run))} alarms; an alarm is a p-value below {RATE / len(run):.1e}.\n"
    yield "| statistic | p-values | smallest | smallest times how many |\n|---|---|---|---|"
    for name, values in by_name.items():
        yield f"| {name} | {len(values)} | {min(values):.2g} | {min(1, min(values) * len(values)):.2g} |"
    yield "\n| planted fault | found by |\n|---|---|"
    rounds = {f"{n} rounds in place of 10": with_fault(rounds=n) for n in range(3, 10)}
    for fault, source in (rounds | {name: with_fault(name) for name in FAULTS}).items():
        found = defaultdict(int)
        for outcome in alarms(outcomes(source)):
            found[outcome.statistic] += 1
        yield f"| {fault} | {', '.join(f'{name} ({count})' for name, count in found.items()) or 'nothing'} |"


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
