"""What the holes of a table look like, and what nobody can know from the table alone.

MCAR can be refuted: by Little's test (means of the rows that share a pattern against the means of all), and by
propensity (whether the other columns predict that a cell is missing). MAR and MNAR cannot be told apart from the
table: the values that would decide are the missing ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dropkit.errors import OptionError, ShapeError

Floats = NDArray[np.float64]
LEAST = 10  # missing and seen cells of a column, each, from which its propensity is asked


@dataclass(frozen=True, slots=True)
class LittleTest:
    """Little's test of MCAR for normal data; valid in large samples for others.

    Attributes:
        statistic: sum over patterns of rows x squared Mahalanobis distance of their mean from the mean of all.
        degrees: of freedom of its chi-squared law under MCAR.
        p_value: chance of so large a statistic under MCAR.
        patterns: different sets of seen columns.
    """

    statistic: float
    degrees: int
    p_value: float
    patterns: int


@dataclass(frozen=True, slots=True)
class ColumnCheck:
    """Whether the rest of a row predicts that a cell is missing.

    Attributes:
        column: its number.
        missing: share of its cells.
        auc: area under the ROC curve of the prediction on rows held out; 1/2: no better than chance. NaN where too few
            cells are missing or seen.
        p_value: chance of so large an area under MCAR (Mann and Whitney, one-sided, the better half of two, doubled);
            NaN where not asked.
    """

    column: int
    missing: float
    auc: float
    p_value: float


@dataclass(frozen=True, slots=True)
class MissingCheck:
    """What a table's holes look like.

    Attributes:
        rows: of the table.
        little: Little's test; None where fewer than two patterns have enough rows, or nothing varies.
        columns: those with missing cells.
        level: chance of a false alarm by which `refutes_mcar` is said, over both tests and all columns.
    """

    rows: int
    little: LittleTest | None
    columns: tuple[ColumnCheck, ...]
    level: float

    @property
    def refutes_mcar(self) -> bool:
        """Whether MCAR is refuted; each of the two tests has half the level, columns share theirs evenly."""
        asked = [c for c in self.columns if np.isfinite(c.p_value)]
        by_column = any(c.p_value < self.level / 2 / len(asked) for c in asked)
        return by_column or (self.little is not None and self.little.p_value < self.level / 2)

    def to_text(self) -> str:
        """What was found, and what cannot be."""
        if not self.columns:
            return "Nothing is missing."
        lines = [f"{self.rows:,} rows; {len(self.columns)} columns have missing cells."]
        if self.little is not None:
            t = self.little
            lines.append(
                f"Little's test: {t.statistic:.1f} on {t.degrees} degrees of freedom, p = {t.p_value:.2g} "
                f"({t.patterns} patterns)."
            )
        for c in self.columns:
            known = "too few cells to ask" if np.isnan(c.auc) else f"area {c.auc:.2f}, p = {c.p_value:.2g}"
            lines.append(
                f"  column {c.column}: {100 * c.missing:.1f} % missing; predicted by the others: {known}."
            )
        lines.append(
            "Missing completely at random is refuted: use what predicts the holes (indicators, imputation from the "
            "other columns), not feature dropout alone."
            if self.refutes_mcar
            else "Nothing speaks against missing completely at random; that is no proof of it."
        )
        lines.append(
            "Whether cells go missing by their own value (MNAR) cannot be known from this table; only who collected "
            "it can tell."
        )
        return "\n".join(lines)


def check_missing(x: ArrayLike, *, level: float = 0.05, seed: int = 0) -> MissingCheck:
    """Look at the holes of a table of numbers.

    Args:
        x: (N, D), NaN where missing.
        level: chance of a false alarm for `refutes_mcar`.
        seed: of the halves by which holes are predicted.

    Raises:
        ShapeError: x is not (N rows, D columns), N at least 2.
        OptionError: an infinite cell, or a level outside (0, 1).

    Source: Little 1988, JASA 83, 1198 to 1202.
    """
    table = np.asarray(x, np.float64)
    if table.ndim != 2 or len(table) < 2 or not table.shape[1]:
        raise ShapeError(f"x of shape {table.shape} was given; it is (N rows, D columns), N at least 2.")
    if np.isinf(table).any():
        raise OptionError("x has infinite cells; a missing cell is NaN, any other is a finite number.")
    if not 0 < level < 1:
        raise OptionError(f"level={level} was given; a chance of a false alarm lies between 0 and 1.")
    gone = np.isnan(table)
    spread = np.nanstd(np.where(gone.all(0), 0.0, table), axis=0)
    centre = np.nanmean(np.where(gone.all(0), 0.0, table), axis=0)
    z = (table - centre) / np.where(spread > 0, spread, 1.0)
    usable = (spread > 0) & (~gone).any(0)
    columns = tuple(_propensity(z, gone, int(j), seed) for j in np.flatnonzero(gone.any(0)))
    return MissingCheck(len(table), _little(z[:, usable]) if gone.any() else None, columns, level)


def _propensity(z: Floats, gone: NDArray[np.bool_], column: int, seed: int) -> ColumnCheck:
    """Predict a column's holes from the other columns, their values and their holes, on rows held out.

    Either half of the rows is predicted from the other, and tested by itself: areas pooled over folds are not
    independent, and a test that takes them for it cries wolf twice too often.
    """
    from scipy import stats
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    hole = gone[:, column]
    share = float(hole.mean())
    others = np.delete(
        np.concatenate((np.nan_to_num(z), gone), axis=1), [column, column + z.shape[1]], axis=1
    )
    others = others[:, others.std(0) > 0]
    if min(hole.sum(), (~hole).sum()) < LEAST or not others.shape[1]:
        return ColumnCheck(column, share, np.nan, np.nan)
    areas, chances = [], []
    for learn, test in StratifiedKFold(2, shuffle=True, random_state=seed).split(others, hole):
        model = LogisticRegression(C=0.1, max_iter=1000).fit(others[learn], hole[learn])
        score, truth = model.decision_function(others[test]), hole[test]
        found = stats.mannwhitneyu(score[truth], score[~truth], alternative="greater")
        areas.append(float(found.statistic) / (int(truth.sum()) * int((~truth).sum())))
        chances.append(float(found.pvalue))
    return ColumnCheck(column, share, float(np.mean(areas)), min(1.0, 2 * min(chances)))


def _little(z: Floats) -> LittleTest | None:
    """Little's statistic with mean and covariance by maximum likelihood; constant columns are left out before."""
    from scipy import stats

    seen = ~np.isnan(z)
    z, seen = z[seen.any(1)], seen[seen.any(1)]
    patterns, which = np.unique(seen, axis=0, return_inverse=True)
    if len(patterns) < 2:
        return None
    mean, covariance = maximum_likelihood(z, patterns, which.reshape(-1))
    statistic, degrees = 0.0, -z.shape[1]
    for k, pattern in enumerate(patterns):
        rows = z[which.reshape(-1) == k][:, pattern]
        off = rows.mean(0) - mean[pattern]
        statistic += len(rows) * float(off @ np.linalg.solve(covariance[np.ix_(pattern, pattern)], off))
        degrees += int(pattern.sum())
    return LittleTest(statistic, degrees, float(stats.chi2.sf(statistic, degrees)), len(patterns))


def maximum_likelihood(
    z: Floats, patterns: NDArray[np.bool_], which: NDArray[np.int64], steps: int = 500
) -> tuple[Floats, Floats]:
    """Mean and covariance of a normal law from rows with holes, by expectation and maximisation.

    Args:
        z: (N, D) standardised, NaN where missing.
        patterns: (P, D) seen columns; which: (N,) the pattern of each row.
        steps: at most; it stops when nothing moves by more than 1e-6.

    Returns:
        (D,) mean and (D, D) covariance, its diagonal raised by 1e-6 so that copies of a column do no harm.

    Source: Dempster, Laird and Rubin 1977; Little and Rubin, Statistical Analysis with Missing Data, chapter 11.
    """
    size = z.shape[1]
    mean, covariance = np.zeros(size), np.eye(size)
    for _ in range(steps):
        total, square = np.zeros(size), np.zeros((size, size))
        for k, seen in enumerate(patterns):
            rows = z[which == k]
            filled = np.where(seen, np.nan_to_num(rows), 0.0)
            if not seen.all():
                part = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, ~seen)])
                filled[:, ~seen] = mean[~seen] + (rows[:, seen] - mean[seen]) @ part
                left = covariance[np.ix_(~seen, ~seen)] - covariance[np.ix_(~seen, seen)] @ part
                square[np.ix_(~seen, ~seen)] += len(rows) * left
            total += filled.sum(0)
            square += filled.T @ filled
        before = mean
        mean = total / len(z)
        moved = square / len(z) - np.outer(mean, mean) + 1e-6 * np.eye(size)
        change = max(np.abs(mean - before).max(), np.abs(moved - covariance).max())
        covariance = moved
        if change < 1e-6:
            break
    return mean, covariance
