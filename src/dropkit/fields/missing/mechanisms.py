"""How cells come to be missing: completely at random, at random given what is seen, by their own value.

    P(cell (i, j) is missing) = sigmoid(sum_k z[i, k] W[k, j] + b[j]),    z = (x - location) / scale

One form serves all three (Rubin 1976). MCAR: W = 0. MAR: rows of W are zero but for columns that are always seen.
MNAR by self-masking: W is diagonal, so a cell goes missing by its own value. The intercepts b are set so that each
column loses the asked share of the rows given. Which cells fall is a function of seed and row alone: they are drawn
as dropout's masks are: MCAR removes the cells that `dropkit.nn.Dropout`, given a rate for each feature, drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.functional import dropout
from dropkit.masks import masks

SITE = "missing"  # the name under which cells are drawn
Kind = Literal["mcar", "mar", "self-masking"]


@dataclass(frozen=True, slots=True, eq=False)
class Mechanism:
    """A law of missing cells.

    Attributes:
        kind: "mcar", "mar" or "self-masking".
        weights: (D, D); column j says what the chance of cell j depends on.
        intercepts: (D,); minus infinity where a column is never missing.
        location, scale: (D,) by which x is standardised.
    """

    kind: Kind
    weights: Tensor
    intercepts: Tensor
    location: Tensor
    scale: Tensor

    def chances(self, x: Tensor) -> Tensor:
        """Chance of each cell to be missing.

        Args:
            x: (B, D) complete rows; a cell that is missing already counts as its column's mean.

        Returns:
            (B, D) in [0, 1].

        Raises:
            ShapeError: x has not the columns that the mechanism knows.
        """
        if x.ndim != 2 or x.shape[1] != len(self.intercepts):
            raise ShapeError(
                f"x of shape {tuple(x.shape)} was given; the mechanism has (B rows, {len(self.intercepts)} columns)."
            )
        z = ((x.double() - self.location) / self.scale).nan_to_num(0.0)
        return torch.sigmoid(z @ self.weights + self.intercepts).to(x.dtype)

    def draw(self, x: Tensor, seed: int = 0, row_offset: int = 0) -> Tensor:
        """Which cells are missing: (B, D) bool, the same for a row in whatever batch it comes.

        Args:
            x: (B, D) rows.
            seed: 64 bits.
            row_offset: number of the first row.
        """
        with masks(seed=seed, row_offset=row_offset):
            return dropout(torch.ones_like(x), self.chances(x), site=SITE) == 0

    def remove(self, x: Tensor, seed: int = 0, row_offset: int = 0) -> Tensor:
        """X with NaN where a cell is missing.

        Args:
            x, seed, row_offset: as in `draw`.
        """
        return x.masked_fill(self.draw(x, seed, row_offset), float("nan"))


def mcar(x: Tensor, rate: float, *, columns: Sequence[int] | None = None) -> Mechanism:
    """Missing completely at random: every cell of the columns falls with the same chance.

    Args:
        x: (N, D) rows, for the number of columns.
        rate: share of the cells of `columns` that goes missing, in [0, 1).
        columns: that may be missing; None: all.

    Raises:
        ProbabilityError: rate outside [0, 1).
        ShapeError: x is not (N rows, D columns).
        OptionError: a column that x does not have.
    """
    rate, chosen = _check(x, rate, columns)
    size = x.shape[1]
    intercepts = torch.full((size,), -torch.inf, dtype=torch.float64)
    intercepts[chosen] = torch.logit(torch.tensor(rate, dtype=torch.float64))
    zero = torch.zeros(size, dtype=torch.float64)
    return Mechanism("mcar", torch.zeros(size, size, dtype=torch.float64), intercepts, zero, zero + 1)


def mar(
    x: Tensor,
    rate: float,
    *,
    columns: Sequence[int] | None = None,
    strength: float = 2.0,
    seed: int = 0,
) -> Mechanism:
    """Missing at random: the chance depends on columns that are always seen.

    The weights of each column are a random direction of the seen columns, scaled so that the logit has standard
    deviation `strength` over x.

    Args:
        x: (N, D) rows by which the law is set.
        rate: share of the cells of `columns` that goes missing, in [0, 1).
        columns: that may be missing; None: all but the first third, at least one, which stays seen.
        strength: standard deviation of the logit; 0 would be MCAR.
        seed: of the directions.

    Raises:
        ProbabilityError: rate outside [0, 1).
        ShapeError: x is not (N rows, D columns), D at least 2.
        OptionError: a column that x does not have, or no column is left to be seen.

    Source: the logistic protocol of Muzellec et al. 2020, arXiv:2002.03860.
    """
    size = x.shape[-1]
    columns = range(max(1, size // 3), size) if columns is None else columns
    rate, chosen = _check(x, rate, columns)
    seen = [j for j in range(size) if j not in set(chosen)]
    if not seen:
        raise OptionError("All columns may be missing; MAR depends on at least one that is always seen.")
    directions = np.random.default_rng([seed, 41]).standard_normal((len(seen), len(chosen)))
    weights = torch.zeros(size, size, dtype=torch.float64)
    weights[np.ix_(seen, chosen)] = torch.from_numpy(directions)
    return _set("mar", x, weights, chosen, rate, strength)


def self_masking(
    x: Tensor, rate: float, *, columns: Sequence[int] | None = None, strength: float = 2.0
) -> Mechanism:
    """Missing not at random: the larger a value, the likelier it is not seen.

    Args:
        x: (N, D) rows by which the law is set.
        rate: share of the cells of `columns` that goes missing, in [0, 1).
        columns: that may be missing; None: all.
        strength: standard deviation of the logit; negative: small values go missing.

    Raises:
        ProbabilityError: rate outside [0, 1).
        ShapeError: x is not (N rows, D columns).
        OptionError: a column that x does not have.
    """
    rate, chosen = _check(x, rate, columns)
    return _set("self-masking", x, torch.eye(x.shape[1], dtype=torch.float64), chosen, rate, strength)


def _check(x: Tensor, rate: float, columns: Sequence[int] | None) -> tuple[float, list[int]]:
    if x.ndim != 2 or not x.numel():
        raise ShapeError(
            f"x of shape {tuple(x.shape)} was given; it is (N rows, D columns), neither of them 0."
        )
    chosen = list(range(x.shape[1]) if columns is None else columns)
    wrong = [j for j in chosen if not 0 <= j < x.shape[1]]
    if wrong or not chosen:
        raise OptionError(f"columns {chosen} were given; x has columns 0 to {x.shape[1] - 1}.")
    if check_probability(rate, "rate") == 1:
        raise OptionError("rate=1 was given; a share of missing cells lies in [0, 1).")
    return rate, chosen


def _set(
    kind: Kind, x: Tensor, weights: Tensor, chosen: list[int], rate: float, strength: float
) -> Mechanism:
    """Scale the weights to the strength and set the intercepts to the rate, by bisection."""
    x = x.double()
    location = x.nanmean(0)
    scale = (x - location).square().nanmean(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    logits = ((x - location) / scale).nan_to_num(0.0) @ weights
    spread = logits.std(0, correction=0)
    factor = torch.where(spread > 0, strength / spread, 0.0)
    weights, logits = weights * factor, logits * factor
    low = torch.full((x.shape[1],), -50.0, dtype=torch.float64) - logits.abs().amax(0)
    high = -low
    for _ in range(80):
        middle = (low + high) / 2
        enough = torch.sigmoid(logits + middle).mean(0) > rate
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    intercepts = torch.full_like(low, -torch.inf)
    intercepts[chosen] = ((low + high) / 2)[chosen] if rate else -torch.inf
    return Mechanism(kind, weights, intercepts, location, scale)
