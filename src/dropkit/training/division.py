"""Which rows train and which validate: held-out rows, and folds for the search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dropkit.training.network import Likelihood
from dropkit.training.records import Fold, Rows

DIVISION = 3  # purpose: a stream of random numbers that meets no other


def divide_rows(
    y: NDArray[np.generic], share: float, *, likelihood: Likelihood, seed: int, most: int = 20_000
) -> Rows:
    """Rows to hold out for validation: drawn at random, for classes the same share of each.

    Of every class at least one row stays in training.

    Args:
        y: (N,), N at least 2.
        share: part to hold out, in (0, 1).
        likelihood: "categorical" draws from each class its share; else any rows.
        seed: of the draw.
        most: never more rows than this.

    Returns:
        Row numbers, rising; at least 1, at most N - 1.
    """
    n = len(y)
    generator = np.random.default_rng([seed, DIVISION])
    wanted = int(np.clip(round(share * n), 1, min(most, n - 1)))
    shuffled = generator.permutation(n)
    if likelihood == "gaussian":
        return np.sort(shuffled[:wanted])
    # Deal the classes out one row at a time: (rank + 1/2) / size orders the rows of all classes evenly, and the last
    # row of each class is never dealt.
    labels = np.asarray(y)[shuffled]
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank, size = np.arange(n) - np.repeat(starts, sizes), np.repeat(sizes, sizes)
    dealt = np.flatnonzero(rank < size - 1)
    if not len(dealt):  # every class was seen once
        return np.sort(shuffled[:1])
    turn = (rank[dealt] + 0.5) / size[dealt]
    return np.sort(shuffled[order[dealt[np.argsort(turn, kind="stable")[:wanted]]]])


def make_folds(train: Rows, validation: Rows, count: int, *, seed: int) -> list[Fold]:
    """The held-out rows as fold 0, and `count` - 1 folds that turn the training rows into validation rows in turn.

    Fold 0 is the division of the final fit, so its winner is the final network already. All folds train on
    equally many rows.
    """
    everything = np.sort(np.concatenate((train, validation)))
    folds = [Fold(train, validation, 0)]
    shuffled = np.random.default_rng([seed, DIVISION, 1]).permutation(train)
    for i in range(1, count):
        held = shuffled[(i - 1) * len(validation) : i * len(validation)]
        if len(held) == len(validation):
            folds.append(Fold(np.setdiff1d(everything, held), np.sort(held), i))
    return folds
