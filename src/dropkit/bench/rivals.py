"""One work and several peers: each is checked against ours, those that are right are timed, the fastest is the peer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from dropkit.bench.timing import LONG_NS, Clock, loops_for
from dropkit.bench.work import NOT_TIMED, Pair, Work, require
from dropkit.errors import BrokenContractError

FALSE_ALARM = 1e-6  # of one check of one peer, were its outputs normal over members
POSITIONS = 64  # outputs whose means are compared, evenly spread over all


@dataclass(frozen=True, slots=True)
class Rival:
    """A peer that may be right, and may be there.

    Attributes:
        name: as the table says it.
        work: what it does; None where it cannot be had.
        check: asks it once; raises BrokenContractError, or whatever the peer raises, unless it does what ours does.
            Gives the nanoseconds that the call took.
        missing: why it cannot be had; "" where it can.
    """

    name: str
    work: Work | None
    check: Callable[[Clock], int] = lambda clock: 0
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a peer did beside the others.

    Attributes:
        name: of the peer.
        nanoseconds: of a call; None where it was not timed.
        reason: why it was not; "" where it was.
    """

    name: str
    nanoseconds: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Contest:
    """Ours and its rivals, on the same input.

    Attributes:
        ours: the work.
        check_ours: raises BrokenContractError unless ours does what it is timed for.
        rivals: the peers.
        elements: of the input, for figures by element.
        against: the name of the peer to compare with; "" for the fastest that is right.
    """

    ours: Work
    check_ours: Callable[[], None]
    rivals: tuple[Rival, ...]
    elements: int
    against: str = ""

    def check(self) -> None:
        """Check ours and all rivals; a rival that is wrong is no fault of ours, unless none is left.

        Raises:
            BrokenContractError: ours is wrong, or nothing right is left to compare it with.
        """
        self.check_ours()
        faults = {rival.name: examine(rival, time.perf_counter_ns).reason for rival in self.rivals}
        self.require_a_peer([name for name, fault in faults.items() if not fault], faults)

    def settle(self, clock: Clock) -> tuple[Pair, str, tuple[Standing, ...]]:
        """Check everyone, time the rivals that are right, and keep the one to compare with.

        Returns:
            Both sides, the name of the peer, and how each peer did.

        Raises:
            BrokenContractError: as in `check`.
        """
        self.check_ours()
        standings = tuple(standing_of(rival, clock) for rival in self.rivals)
        times = {s.name: s.nanoseconds for s in standings if s.nanoseconds is not None}
        self.require_a_peer(list(times), {s.name: s.reason for s in standings})
        best = self.against or min(times, key=lambda name: times[name])
        work = next(rival.work for rival in self.rivals if rival.name == best)
        assert work is not None
        return Pair(self.ours, work, lambda: None, self.elements), best, standings

    def require_a_peer(self, right: Sequence[str], faults: dict[str, str]) -> None:
        """Refuse to go on without the peer that is asked for, or without any."""
        there = self.against in right if self.against else bool(right)
        said = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
        require(there, "the peers", f"none is left to compare with ({said})")


def examine(rival: Rival, clock: Clock) -> Standing:
    """Check a rival; the time is that of the one call this takes."""
    if rival.missing or rival.work is None:
        return Standing(rival.name, None, rival.missing or "not there")
    try:
        return Standing(rival.name, float(rival.check(clock)))
    except Exception as error:  # whatever another package raises, it is out of the contest and said so
        if isinstance(error, BrokenContractError):
            return Standing(
                rival.name, None, str(error).removeprefix(f"{rival.name}: ").removesuffix(NOT_TIMED)
            )
        return Standing(rival.name, None, describe(error))


def describe(error: Exception) -> str:
    """An error in a line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def standing_of(rival: Rival, clock: Clock) -> Standing:
    """Check a rival and time it alone, which is enough to find the fastest: three turns where a call is short."""
    found = examine(rival, clock)
    if found.nanoseconds is None or found.nanoseconds > LONG_NS or rival.work is None:
        return found
    run = rival.work.timed
    loops, turns = loops_for(run, clock), []
    for _ in range(3):
        begun = clock()
        for _ in range(loops):
            run()
        turns.append((clock() - begun) / loops)
    return Standing(rival.name, sorted(turns)[1])


def t_threshold(chance: float, degrees: int) -> float:
    """What Student's t exceeds, on either side, with this chance.

    t = sqrt(n (exp(z'^2 / n) - 1)),    z' = z (8 n + 3) / (8 n + 1),    z the same of a normal variable

    Args:
        chance: of both tails together.
        degrees: n, of freedom; from 15 on the result is right to a few percent down to chances of 1e-9.

    Source: Wallace 1959, Annals of Mathematical Statistics 30, 1121.
    """
    z = NormalDist().inv_cdf(1 - chance / 2) * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(z * z / degrees))


def same_law(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Check that two sets of samples can come from one law, by their means and their spread.

    |mean a - mean b| <= t sqrt(var a / M + var b / M')    at up to 64 outputs,
    and the same for v[m] = mean over outputs of (sample[m] - mean over samples)^2.

    v has one value for each member, so that members whose masks serve all rows, and hence stray together, get the
    wider limit that is theirs. t is such that all limits hold with a chance of 1 - 1e-6 for normal outputs.

    Args:
        ours: (M, ...).
        theirs: (M', ...), the same outputs.
        name: of the peer, for the error.

    Raises:
        BrokenContractError: a spread is exactly 0, or a limit is exceeded.
    """
    require(
        ours.shape[1:] == theirs.shape[1:],
        name,
        f"outputs {tuple(theirs.shape[1:])}, ours {tuple(ours.shape[1:])}",
    )
    a, b = (s.detach().flatten(1).double() for s in (ours, theirs))
    for side, samples in (("ours", a), (name, b)):
        require(bool(samples.isfinite().all()), side, "an output is not finite")
        require(bool((samples != samples[:1]).any()), side, "its spread is exactly 0")
    at = torch.linspace(0, a.shape[1] - 1, min(POSITIONS, a.shape[1])).long()
    limit = t_threshold(FALSE_ALARM / (len(at) + 1), min(len(a), len(b)) - 1)
    worst = float(welch(a[:, at], b[:, at]).max())
    require(
        worst <= limit, name, f"a mean lies {worst:.1f} standard errors from ours, allowed are {limit:.1f}"
    )
    spreads = [(s - s.mean(dim=0)).square().mean(dim=1) for s in (a, b)]
    apart = float(welch(*spreads))
    ratio = float((spreads[1].mean() / spreads[0].mean()).sqrt())
    require(
        apart <= limit,
        name,
        f"its spread is {ratio:.2f} times ours, {apart:.1f} standard errors apart, allowed are {limit:.1f}",
    )


def welch(a: Tensor, b: Tensor) -> Tensor:
    """(M, ...), (M', ...) -> (...): distance of the means in standard errors; 0 where nothing varies and all agree."""
    error = (a.var(dim=0) / len(a) + b.var(dim=0) / len(b)).sqrt()
    return ((a.mean(dim=0) - b.mean(dim=0)).abs() / error).nan_to_num(nan=0.0, posinf=math.inf)


def same_moments(mean: Tensor, deviation: Tensor, samples: Tensor, name: str) -> None:
    """Check samples against an exact mean and standard deviation, at up to 64 outputs each.

    |mean of samples - mean| <= z deviation / sqrt(M),    |v - 1| <= z sqrt((k - 1) / M)

    with v the mean square of (sample - mean) / deviation, over members, and k that of its fourth power, at least 3.

    Args:
        mean, deviation: (...), exact.
        samples: (M, ...).
        name: of the side, for the error.

    Raises:
        BrokenContractError: a limit is exceeded.
    """
    require(
        mean.shape == samples.shape[1:], name, f"outputs {tuple(samples.shape[1:])}, ours {tuple(mean.shape)}"
    )
    at = torch.linspace(0, mean.numel() - 1, min(POSITIONS, mean.numel())).long()
    centre, scale = (t.detach().flatten()[at].double() for t in (mean, deviation))
    standard = (samples.detach().flatten(1)[:, at].double() - centre) / scale
    members = len(standard)
    limit = t_threshold(FALSE_ALARM / (2 * len(at)), members - 1)
    shift = float(standard.mean(dim=0).abs().max()) * math.sqrt(members)
    require(shift <= limit, name, f"a mean lies {shift:.1f} standard errors off, allowed are {limit:.1f}")
    square = standard.square().mean(dim=0)
    width = ((standard.pow(4).mean(dim=0).clamp_min(3) - 1) / members).sqrt()
    apart = float(((square - 1).abs() / width).max())
    require(apart <= limit, name, f"a variance lies {apart:.1f} standard errors off, allowed are {limit:.1f}")
