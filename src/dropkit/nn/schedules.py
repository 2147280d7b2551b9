"""Rates that change while a network trains: functions of the optimizer step, which is part of every address."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dropkit.errors import OptionError, check_probability


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


def early(p: float, steps: int) -> Schedule:
    """Dropout for the first `steps` steps only, against underfitting.

    p(t) = p for t < steps, else 0

    Source: Liu et al. 2023, ICML, "Dropout Reduces Underfitting".
    """
    return Schedule((0, _check_steps(steps), steps), (p, p, 0.0))


def late(p: float, steps: int) -> Schedule:
    """No dropout for the first `steps` steps, against overfitting without a slow start.

    p(t) = 0 for t < steps, else p

    Source: Liu et al. 2023, ICML, "Dropout Reduces Underfitting".
    """
    return Schedule((0, _check_steps(steps), steps), (0.0, 0.0, p))


def curriculum(p: float, steps: int, points: int = 64) -> Schedule:
    """From no dropout towards p, quickly at first: easy examples before hard ones.

    p(t) = p (1 - exp(-10 t / steps)),    as straight lines between `points` values

    Args:
        p: the rate it goes towards.
        steps: of the whole training; p is reached there within 5e-5 of itself, and exactly after it.
        points: where the curve is met.

    Source: Morerio et al. 2017, ICCV, eq. 2, with their gamma = 10 / steps (there it is the chance to keep that falls).
    """
    at = [round(_check_steps(steps) * i / points) for i in range(points + 1)]
    rates = [check_probability(p) * -math.expm1(-10 * t / steps) for t in at]
    return Schedule((*at, steps), (*rates, p))


def ramp(p: float, layers: int) -> Sequence[float]:
    """The rates of layers in their order, rising linearly to p: deep paths are dropped more often.

    p_l = p l / (L - 1),    l = 0 ... L - 1    (p alone where there is one layer)

    Source: Huang et al. 2016, ECCV, "Deep Networks with Stochastic Depth", section 3, counted from 0 as timm does.
    """
    check_probability(p)
    return tuple(p * i / max(layers - 1, 1) if layers > 1 else p for i in range(layers))
