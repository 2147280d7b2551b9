"""Means and other statistics of repeated draws, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dropkit.errors import MeasurementError, OptionError
from dropkit.masks.address import MEMBERS, SEEDS


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of K independent draws and its standard error.

    error = sqrt( sum_k (d_k - mean)^2 / (K (K - 1)) )

    Args:
        draws: (K, *shape), K at least 2.

    Returns:
        Both (*shape).
    """
    return draws.mean(dim=0), draws.std(dim=0) / math.sqrt(len(draws))


def variance_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased variance over K independent draws, summed over the other axes, and its standard error.

    V = sum_k |d_k - mean|^2 / (K - 1)

    The error is that of a mean of the K squared distances.

    Args:
        draws: (K, *shape), K at least 2.

    Returns:
        Both ().
    """
    distances = (draws - draws.mean(dim=0)).flatten(1).square().sum(dim=1)
    correction = len(draws) / (len(draws) - 1)
    mean, error = mean_and_error(distances)
    return mean * correction, error * correction


def jackknife(draws: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A smooth function of a mean of K draws, and its standard error by leaving out one draw at a time.

    error^2 = (K - 1) / K * sum_k (f_(-k) - mean f_(-k))^2

    Args:
        draws: (K, *shape), K at least 2.
        statistic: (*shape) -> (*out), of the mean of the draws.

    Returns:
        Both (*out).

    Source: Efron and Stein 1981, Annals of Statistics 9.
    """
    count, total = len(draws), draws.sum(dim=0)
    without = torch.stack([statistic((total - draw) / (count - 1)) for draw in draws])
    spread = (without - without.mean(dim=0)).square().sum(dim=0)
    return statistic(total / count), (spread * (count - 1) / count).sqrt()


def check_whole(name: str, value: int, low: int = 2, high: int = MEMBERS) -> int:
    """Return a whole number, or say what is allowed.

    Raises:
        OptionError: it is none, or outside of low to high.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name}={value!r} was given; a whole number from {low} to {high} is allowed.")
    return value


def check_seed(seed: int) -> int:
    """Return a seed, or say what is allowed.

    Raises:
        OptionError: it is no whole number of 64 bits.
    """
    return check_whole("seed", seed, 0, SEEDS - 1)


def check_error(tolerance: float | None, error: Tensor, count: int, what: str) -> None:
    """Say how many draws are needed where a standard error is larger than was asked.

    Errors fall like 1 / sqrt(count).

    Args:
        tolerance: largest standard error that is accepted; None accepts any.
        error: what was reached; the largest counts.
        count: draws behind it.
        what: what was drawn: "members", "rows".

    Raises:
        OptionError: the tolerance is no positive number.
        MeasurementError: it was not reached.
    """
    if tolerance is None:
        return
    if not tolerance > 0:
        raise OptionError(f"tolerance={tolerance!r} was given; a standard error to reach is positive.")
    worst = float(error.max())
    if worst > tolerance:
        need = math.ceil(count * (worst / tolerance) ** 2)
        raise MeasurementError(
            f"tolerance={tolerance:g} was asked; with {count} {what} the standard error is {worst:.3g}. "
            f"Give about {need} {what}."
        )
