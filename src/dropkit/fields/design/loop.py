"""Design, build, test, learn: rounds over a pool of designs whose values are measured when they are picked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dropkit.errors import OptionError, ShapeError

Rows = NDArray[np.int64]
TOP = 0.01  # share of the pool that counts as its best designs


@dataclass(frozen=True, slots=True)
class Round:
    """After so many builds.

    Attributes:
        built: designs measured so far.
        best: highest value among them.
        regret: highest value of the pool - best.
        recall: share of the best 1 % of the pool that was built.
    """

    built: int
    best: float
    regret: float
    recall: float


@dataclass(frozen=True, slots=True, eq=False)
class Campaign:
    """A campaign of several rounds.

    Attributes:
        rounds: the start, then each round.
        rows: numbers of the designs in the order they were built.
    """

    rounds: tuple[Round, ...]
    rows: Rows


def run_campaign(
    values: NDArray[np.floating],
    pick: Callable[[Rows, int], Rows],
    *,
    rounds: int = 4,
    batch: int = 96,
    start: int = 96,
    seed: int = 0,
) -> Campaign:
    """Build a random start, then in each round what `pick` names.

    Args:
        values: (N,) of every design of the pool; only those that were built are shown to `pick`, by their rows.
        pick: (rows built so far, how many to name) -> numbers of designs not built yet.
        rounds, batch, start: how often and how many.
        seed: of the start.

    Raises:
        ShapeError: values are not (N,).
        OptionError: the pool is smaller than what is to be built, or `pick` names designs twice or built ones.
    """
    if values.ndim != 1:
        raise ShapeError(f"values of shape {values.shape} were given; they are (N designs).")
    needed = start + rounds * batch
    if not 0 < start or needed > len(values):
        raise OptionError(
            f"{needed} builds were asked for from a pool of {len(values)} designs; start is at least 1."
        )
    built = np.random.default_rng([seed, 67]).permutation(len(values))[:start].astype(np.int64)
    found = [_look(values, built)]
    for _ in range(rounds):
        more = np.asarray(pick(built, batch), np.int64)
        whole = np.concatenate((built, more))
        if len(more) != batch or len(np.unique(whole)) != len(whole):
            raise OptionError(
                f"pick named {len(more)} designs, some twice or built; {batch} new ones were asked for."
            )
        built = whole
        found.append(_look(values, built))
    return Campaign(tuple(found), built)


def _look(values: NDArray[np.floating], built: Rows) -> Round:
    count = max(1, round(TOP * len(values)))
    top = np.argsort(-values, kind="stable")[:count]
    best = float(values[built].max())
    return Round(len(built), best, float(values.max()) - best, float(np.isin(top, built).mean()))
