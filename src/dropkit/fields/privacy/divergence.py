"""Differential privacy of one release, exactly: the hockey-stick divergence, and dropout as its counter-example.

A release M is (epsilon, delta)-private if for all neighbours d, d' and all sets S:
P(M(d) in S) <= exp(epsilon) P(M(d') in S) + delta. The least delta for an epsilon is

    delta(epsilon) = sum over outcomes of max(0, P(o) - exp(epsilon) Q(o)),   the larger of both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dropkit.errors import OptionError, check_probability


def delta_at(first: Mapping[object, float], second: Mapping[object, float], epsilon: float) -> float:
    """The least delta with which two laws of outcomes are epsilon-indistinguishable.

    Args:
        first, second: {outcome: chance}, each summing to 1.
        epsilon: at least 0.

    Raises:
        OptionError: chances that do not sum to 1, or a negative epsilon.
    """
    for law in (first, second):
        if abs(sum(law.values()) - 1) > 1e-9 or min(law.values()) < 0:
            raise OptionError(f"Chances {dict(law)} were given; they are at least 0 and sum to 1.")
    if not epsilon >= 0:
        raise OptionError(f"epsilon={epsilon} was given; it is at least 0.")
    factor = math.exp(epsilon)
    ways = ((first, second), (second, first))
    return max(sum(max(0.0, a[o] - factor * b.get(o, 0.0)) for o in a) for a, b in ways)


def dropout_delta(p: float, epsilon: float, *, steps: int = 1) -> float:
    """Least delta of releasing x m / q with x in {0, 1}, m a fresh mask in each of so many steps.

    delta(epsilon) = 1 - p^steps for every epsilon: without the person nothing but zeros is released, with the person
    something else is, unless all masks drop it. No epsilon, however large, makes up for it.

    Args:
        p: chance to drop, in [0, 1].
        epsilon: at least 0.
        steps: releases.

    Raises:
        ProbabilityError: p outside [0, 1]. OptionError: a negative epsilon, or no step.
    """
    if steps < 1:
        raise OptionError(f"steps={steps} was given; at least one release is made.")
    silent = check_probability(p) ** steps
    return delta_at({"something": 1 - silent, "zeros": silent}, {"something": 0.0, "zeros": 1.0}, epsilon)
