"""How the spread of a committee depends on how many members are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dropkit.committee.information import mutual_information
from dropkit.committee.prediction import Prediction, RegressionPrediction
from dropkit.errors import ShapeError
from dropkit.evaluation.held_out import evenly_spaced

# With this many disjoint committees of one size their own scatter is the Monte Carlo error; else the jackknife.
GROUPS_FOR_SCATTER = 8
# Rows are thinned, evenly, until members x rows x classes are this many: the jackknife visits all of it M times.
VALUES = 400_000


@dataclass(frozen=True, slots=True)
class SpreadByMembers:
    """Mean spread over rows as a committee of 2, 4, 8, ... members sees it.

    Attributes:
        quantity: "standard deviation" (unit of the target) or "mutual information" (nats).
        members: sizes.
        spread: mean over rows, and over the disjoint committees of that size.
        monte_carlo_error: standard error of the spread that one committee of that size shows.
        rows: how many rows were averaged.
    """

    quantity: Literal["standard deviation", "mutual information"]
    members: tuple[int, ...]
    spread: tuple[float, ...]
    monte_carlo_error: tuple[float, ...]
    rows: int


def spread_by_members(prediction: Prediction) -> SpreadByMembers:
    """Spread between members for committees of growing size, with its Monte Carlo error.

    Numbers:  mean over rows of sd over members of samples[m, b]      (n - 1 in the variance)
    Classes:  mean over rows of the mutual information between class and member

    Args:
        prediction: of M members, at least 4, for some held-out rows.

    Raises:
        ShapeError: fewer than 4 members, or no row.
    """
    samples = prediction.samples.detach()
    members, rows = samples.shape[:2]
    if members < 4 or rows == 0:
        raise ShapeError(f"{members} members and {rows} rows were given; ask at least 4 members about 1 row.")
    numbers = isinstance(prediction, RegressionPrediction)
    kept = evenly_spaced(rows, max(1, VALUES // (members * (1 if numbers else samples.shape[2]))))
    samples = samples[:, torch.from_numpy(kept)]
    statistic = mean_deviation if numbers else mean_information
    sizes = sorted({*(2**k for k in range(1, members.bit_length())), members})
    lines = [committees_of(samples, size, statistic) for size in sizes]
    return SpreadByMembers(
        quantity="standard deviation" if numbers else "mutual information",
        members=tuple(sizes),
        spread=tuple(spread for spread, _ in lines),
        monte_carlo_error=tuple(error for _, error in lines),
        rows=len(kept),
    )


def committees_of(samples: Tensor, size: int, statistic: Callable[[Tensor], float]) -> tuple[float, float]:
    """Mean of a statistic over the disjoint committees of one size, and the error of a single one of them."""
    groups = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
    values = np.array([statistic(group) for group in groups])
    if len(groups) >= GROUPS_FOR_SCATTER or size < 4:
        return float(values.mean()), float(values.std(ddof=1))
    errors = [jackknife_error(group, statistic) for group in groups]
    return float(values.mean()), float(np.sqrt(np.mean(np.square(errors))))


def jackknife_error(samples: Tensor, statistic: Callable[[Tensor], float]) -> float:
    """Standard error of a statistic of M members, from leaving each out in turn.

    se^2 = (M - 1) / M * sum over m of (t_without_m - mean t)^2
    """
    size = len(samples)
    others = ~torch.eye(size, dtype=torch.bool)
    without = np.array([statistic(samples[others[m]]) for m in range(size)])
    return float(np.sqrt((size - 1) * np.mean((without - without.mean()) ** 2)))


def mean_deviation(samples: Tensor) -> float:
    """Mean over rows of the standard deviation between members; samples (M, B)."""
    return float(samples.double().std(dim=0, correction=1).mean())


def mean_information(samples: Tensor) -> float:
    """Mean over rows of the mutual information between class and member, nats; samples (M, B, C)."""
    return float(mutual_information(samples.double()).mean())
