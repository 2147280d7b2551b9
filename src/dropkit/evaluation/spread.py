"""Does spread go with error? Rows in order of their spread, the errors found, and the rank correlation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.committee.ranking import auroc
from dropkit.evaluation.measures import Floats, Ints, root_mean_square, share
from dropkit.evaluation.records import ErrorBySpread, SpreadBin


def regression_spread(error: Floats, std: Floats) -> ErrorBySpread:
    """Observed against foreseen error in groups of rows of similar predictive standard deviation.

    Args:
        error: (n,) |y - mean|.
        std: (n,).
    """
    bins = []
    for group in equal_groups(std):
        observed = root_mean_square(error[group])
        expected = float(np.sqrt(np.mean(std[group] ** 2)))
        bins.append(spread_bin(std[group], expected, observed.value, observed.standard_error))
    correlation = rank_correlation(error, std)
    return ErrorBySpread(tuple(bins), correlation, rank_correlation_error(correlation, len(std)))


def classification_spread(wrong: NDArray[np.bool_], entropy: Floats, expected: Floats) -> ErrorBySpread:
    """Share of wrong rows against the foreseen one, in groups of rows of similar entropy.

    Args:
        wrong: (n,).
        entropy: (n,) nats.
        expected: (n,) the model's own chance to be wrong, 1 - confidence.
    """
    bins = []
    for group in equal_groups(entropy):
        observed = share(wrong[group])
        foreseen = float(expected[group].mean())
        bins.append(spread_bin(entropy[group], foreseen, observed.value, observed.standard_error))
    correlation = rank_correlation(wrong.astype(np.float64), entropy)
    return ErrorBySpread(
        bins=tuple(bins),
        rank_correlation=correlation,
        rank_correlation_error=rank_correlation_error(correlation, len(entropy)),
        detection=detection_chance(wrong, entropy),
    )


def spread_bin(spread: Floats, expected: float, observed: float, error: float) -> SpreadBin:
    """One line of the table of error against spread."""
    return SpreadBin(float(spread.min()), float(spread.max()), len(spread), expected, observed, error)


def equal_groups(spread: Floats, most: int = 10, rows_each: int = 10) -> list[Ints]:
    """Positions in order of spread, cut into up to `most` groups of at least `rows_each` rows, or one group."""
    groups = max(1, min(most, len(spread) // rows_each))
    return list(np.array_split(np.argsort(spread, kind="stable").astype(np.int64), groups))


def ranks(values: Floats) -> Floats:
    """Ranks 1 ... n; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], dtype=np.float64)


def rank_correlation(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks. None where a or b is constant.

    Args:
        a: (n,).
        b: (n,).
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def rank_correlation_error(correlation: float | None, rows: int) -> float | None:
    """Standard error of Spearman's r, (1 - r^2) sqrt((1 + r^2 / 2) / (n - 3)).

    Fisher's z has variance (1 + r^2 / 2) / (n - 3) here; 1 - r^2 brings it back to the scale of r.

    Source: Bonett and Wright 2000, Psychometrika 65, 23-28.
    """
    if correlation is None or rows < 4:
        return None
    return float((1 - correlation**2) * np.sqrt((1 + correlation**2 / 2) / (rows - 3)))


def detection_chance(wrong: NDArray[np.bool_], spread: Floats) -> float | None:
    """Chance that a wrong row has more spread than a right one, ties counting half (area under the ROC).

    Returns:
        In [0, 1]; 0.5 says spread tells nothing. None where all rows are right, or all wrong.
    """
    return auroc(
        torch.from_numpy(np.ascontiguousarray(spread)), torch.from_numpy(np.ascontiguousarray(wrong))
    )
