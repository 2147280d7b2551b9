"""Rates that change while a network trains: functions of the optimizer step, which is part of every address."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from dropkit.errors import AddressError, OptionError, check_probability
from dropkit.masks import address

POINTS = 512  # of a curve


@dataclass(frozen=True, slots=True)
class Schedule:
    """A rate by the step: straight lines between given points, level before the first and after the last.

    p(t) = p_i + (p_{i+1} - p_i) (t - t_i) / (t_{i+1} - t_i)    for t_i <= t < t_{i+1}

    Where two points have the same step, the rate jumps there, to the later one.

    Attributes:
        steps: in rising order.
        rates: one for each step, in [0, 1].

    Raises:
        OptionError: no points, steps that fall, or as many rates as there are not steps.
        ProbabilityError: a rate outside [0, 1].

    Example:
        >>> from dropkit.nn import schedules
        >>> rate = schedules.linear(0.0, 0.5, steps=100)
        >>> rate(0), rate(50), rate(1000)
        (0.0, 0.25, 0.5)
    """

    steps: tuple[int, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.rates):
            raise OptionError(
                f"{len(self.steps)} steps and {len(self.rates)} rates were given; a schedule needs one rate for each "
                "step, and at least one."
            )
        if any(later < earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise OptionError(f"steps={self.steps} were given; they must not fall.")
        for rate in self.rates:
            check_probability(rate, "a scheduled rate")

    def __call__(self, step: int) -> float:
        """The rate at one step."""
        i = bisect_right(self.steps, step)
        if i == 0:
            return self.rates[0]
        if i == len(self.steps):
            return self.rates[-1]
        share = (step - self.steps[i - 1]) / (self.steps[i] - self.steps[i - 1])
        return self.rates[i - 1] + share * (self.rates[i] - self.rates[i - 1])

    @property
    def final(self) -> float:
        """The rate after the last step, which is that of a committee of the finished network."""
        return self.rates[-1]

    def times(self, factor: float) -> Schedule:
        """The same curve, higher or lower: factor * p(t)."""
        return Schedule(self.steps, tuple(factor * rate for rate in self.rates))


def rate_at_step(schedule: Schedule, who: str) -> float | Tensor:
    """The rate at the step of the open context.

    Inside a compiled graph it is a 0-d tensor, which the graph asks for each time it runs: a new step compiles nothing.

    Args:
        schedule: of the rate.
        who: asks, for the error.

    Raises:
        AddressError: no context is open.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.dropkit.rate_at_step(schedule.steps, schedule.rates, who)
    context = address.current()
    if context is None:
        raise AddressError(
            f"{who} has a scheduled rate, and no masks(...) context says which step this is. "
            "Open one for each step: with dropkit.masks(seed=..., step=...)."
        )
    return schedule(context.step)


def _rate_in_graph(steps: Sequence[int], rates: Sequence[float], who: str) -> Tensor:
    rate = rate_at_step(Schedule(tuple(steps), tuple(rates)), who)
    return torch.tensor(rate, dtype=torch.float64, device="cpu")


def _rate_in_graph_fake(steps: Sequence[int], rates: Sequence[float], who: str) -> Tensor:
    # Asked for once in a pass: a backward pass that asked again might do so outside of the context. See `compiled.py`.
    spared = getattr(sys.modules.get("torch._functorch.compile_utils"), "rand_ops", [])
    if torch.ops.dropkit.rate_at_step not in spared:
        spared.append(torch.ops.dropkit.rate_at_step)
    return torch.empty((), dtype=torch.float64)


_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "rate_at_step(int[] steps, float[] rates, str who) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
_library.impl("rate_at_step", _rate_in_graph, "CompositeExplicitAutograd")
torch.library.register_fake("dropkit::rate_at_step", _rate_in_graph_fake, lib=_library)


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps={steps!r} was given; how many steps is a whole number from 1 on.")
    return steps


def linear(start: float, stop: float, steps: int) -> Schedule:
    """From one rate to another in a straight line over `steps` steps, then level.

    p(t) = start + (stop - start) min(t / steps, 1)

    Source: linearly scheduled DropPath, Zoph et al. 2018, CVPR (there it is the chance to drop that rises).
    """
    return Schedule((0, _check_steps(steps)), (start, stop))


def early(p: float, steps: int, shape: Literal["constant", "linear"] = "constant") -> Schedule:
    """Dropout for the first `steps` steps only, against underfitting.

    constant  p(t) = p                           for t < steps, else 0
    linear    p(t) = p (1 - t / (steps - 1))     for t < steps, else 0

    Args:
        p: the rate at the first step.
        steps: how many have dropout: epochs times the steps of an epoch. The last of them is at 0 where it falls
            linearly, as in the authors' program.
        shape: whether the rate stays or falls in between.

    Raises:
        OptionError: less than one step, or another shape.
        ProbabilityError: p is outside [0, 1].

    Source: Liu et al. 2023, ICML, "Dropout Reduces Underfitting".

    Example:
        >>> from dropkit.nn import schedules
        >>> rate = schedules.early(0.1, steps=5, shape="linear")
        >>> [round(rate(step), 3) for step in range(7)]
        [0.1, 0.075, 0.05, 0.025, 0.0, 0.0, 0.0]
    """
    if shape not in ("constant", "linear"):
        raise OptionError(f"shape={shape!r} was given; the rate is 'constant', or falls as 'linear'.")
    if shape == "linear":
        return Schedule((0, max(_check_steps(steps) - 1, 1)), (p, 0.0))
    return Schedule((0, _check_steps(steps), steps), (p, p, 0.0))


def late(p: float, steps: int) -> Schedule:
    """No dropout for the first `steps` steps, against overfitting without a slow start.

    p(t) = 0 for t < steps, else p

    Source: Liu et al. 2023, ICML, "Dropout Reduces Underfitting".
    """
    return Schedule((0, _check_steps(steps), steps), (0.0, 0.0, p))


def curriculum(p: float, steps: int) -> Schedule:
    """From no dropout towards p, quickly at first: easy examples before hard ones.

    p(t) = p (1 - exp(-10 t / steps))

    The curve is met exactly at up to 512 steps that lie closer where it bends, and by straight lines between them,
    which keeps within 2^-17: half of the grain of a mask's own rate.

    Args:
        p: the rate it goes towards.
        steps: of the whole training; the curve is within 5e-5 of p there, and the rate exactly p from there on.

    Raises:
        OptionError: less than one step.
        ProbabilityError: p is outside [0, 1].

    Source: Morerio et al. 2017, ICCV, eq. 2, with their gamma = 10 / steps (there it is the chance to keep that falls).
    """
    check_probability(p)
    # An interval of width w strays by w^2 |p''| / 8; this spacing makes that equal for all intervals.
    whole = -math.expm1(-5.0)
    shares = [-math.log1p(-whole * i / POINTS) / 5 for i in range(POINTS + 1)]
    at = sorted({round(_check_steps(steps) * share) for share in shares})
    rates = [p * -math.expm1(-10 * t / steps) for t in at]
    return Schedule((*at, steps), (*rates, p))


@overload
def ramp(p: float, layers: int) -> tuple[float, ...]: ...
@overload
def ramp(p: Schedule, layers: int) -> tuple[Schedule, ...]: ...
def ramp(p: float | Schedule, layers: int) -> tuple[float, ...] | tuple[Schedule, ...]:
    """The rates of layers in their order, rising linearly to p: deep paths are dropped more often.

    p_l = p l / (L - 1),    l = 0 ... L - 1    (p alone where there is one layer)

    Args:
        p: rate of the last layer; a schedule gives each layer one of its own.
        layers: L, at least 1.

    Raises:
        OptionError: less than one layer.
        ProbabilityError: p is outside [0, 1].

    Source: Huang et al. 2016, ECCV, "Deep Networks with Stochastic Depth", section 3, counted from 0 as timm does.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise OptionError(f"layers={layers!r} was given; how many layers is a whole number from 1 on.")
    shares = [i / max(layers - 1, 1) if layers > 1 else 1.0 for i in range(layers)]
    if isinstance(p, Schedule):
        return tuple(p.times(share) for share in shares)
    check_probability(p)
    return tuple(p * share for share in shares)
