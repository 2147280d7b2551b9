"""What to build next, from what the members of a committee predict of each design."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dropkit.errors import OptionError, ShapeError

Floats = NDArray[np.floating]


def greedy(samples: Floats, count: int) -> NDArray[np.int64]:
    """The designs of the highest mean.

    Args:
        samples: (M, N) predictions of M members; minus infinity where a design may not be picked.
        count: designs to pick, at most as many as may be.

    Returns:
        (count,) numbers of designs, best first; ties by number.
    """
    return _highest(_check(samples, count).mean(0), count)


def upper_bound(samples: Floats, count: int, weight: float = 1.0) -> NDArray[np.int64]:
    """The designs of the highest mean + weight * standard deviation over members.

    Args:
        samples, count: as in `greedy`.
        weight: of the spread; 0 is greedy.

    Source: Auer 2002, JMLR 3, 397; for Gaussian processes Srinivas et al. 2010.
    """
    values = _check(samples, count)
    allowed = np.isfinite(values).all(0)
    score = np.full(values.shape[1], -np.inf)
    score[allowed] = values[:, allowed].mean(0) + weight * values[:, allowed].std(0)
    return _highest(score, count)


def thompson(samples: Floats, count: int) -> NDArray[np.int64]:
    """The favourite of each member in turn; who finds its favourite taken names the next.

    Args:
        samples, count: as in `greedy`; with fewer members than picks they are asked again.

    Source: Thompson 1933; in batches Hernandez-Lobato et al. 2017, arXiv:1706.01825.
    """
    values = _check(samples, count)
    orders = np.argsort(-values, axis=1, kind="stable")
    taken: dict[int, None] = {}
    position = np.zeros(len(values), np.int64)
    member = 0
    while len(taken) < count:
        while int(orders[member, position[member]]) in taken:
            position[member] += 1
        taken[int(orders[member, position[member]])] = None
        member = (member + 1) % len(values)
    return np.array(list(taken), np.int64)


def _check(samples: Floats, count: int) -> Floats:
    if samples.ndim != 2 or not samples.size:
        raise ShapeError(f"samples of shape {samples.shape} were given; they are (M members, N designs).")
    free = int(np.isfinite(samples).all(0).sum())
    if not 0 < count <= free:
        raise OptionError(f"count={count} was given; {free} designs may be picked, at least 1.")
    return samples


def _highest(score: Floats, count: int) -> NDArray[np.int64]:
    return np.argsort(-score, kind="stable")[:count]
