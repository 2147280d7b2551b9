"""What chance explains: exact binomial tails and Bernstein's bound, so that every check states its false-alarm rate."""

from __future__ import annotations

import math

import torch


def binomial_p_value(count: int, trials: int, p: float) -> float:
    """How often chance alone lies as far out as `count`, both sides together; exact.

    P = min(1, 2 P(X >= count)) above the mean, min(1, 2 P(X <= count)) below it,    X ~ Binomial(trials, p)

    Args:
        count: how many of the trials came true, 0 to trials.
        trials: 1 or more.
        p: chance of each, in (0, 1).
    """
    if count < trials * p:
        count, p = trials - count, 1 - p
    # Beyond the mean the terms fall at least geometrically past a few standard deviations: the rest is below 1e-300.
    reach = 60 * math.sqrt(trials * p * (1 - p)) + 1000
    k = torch.arange(count, min(trials, count + int(reach)) + 1, dtype=torch.float64)
    n = torch.tensor(trials, dtype=torch.float64)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    tail = (log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).logsumexp(0).exp()
    return min(1.0, 2 * float(tail))


def bernstein_p_value(total: float, variance: float, largest: float) -> float:
    """A bound on how often a sum of independent terms of mean 0 lies as far out as `total`, both sides together.

    P(|S| >= t) <= 2 exp(-t**2 / (2 (variance + largest t / 3)))

    Args:
        total: the sum that was seen.
        variance: of the sum.
        largest: no term is larger in size.

    Source: Bernstein 1924; Boucheron, Lugosi, Massart 2013, Concentration Inequalities, cor. 2.11.
    """
    t = abs(total)
    spread = 2 * (variance + largest * t / 3)
    return min(1.0, 2 * math.exp(-t * t / spread)) if spread > 0 else float(t == 0)
