"""The tables about held-out rows, as plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """One measure of one model.

    Attributes:
        name: "RMSE", "log loss", ...
        value: over all held-out rows.
        standard_error: of `value`, over rows.
        difference: dropkit's value minus this one, on the same rows; None in dropkit's own line.
        difference_error: standard error of `difference`, rows paired.
    """

    name: str
    value: float
    standard_error: float
    difference: float | None = None
    difference_error: float | None = None


@dataclass(frozen=True, slots=True)
class RegressionPoints:
    """Held-out rows of a number, one by one, in its unit; at most 2000, evenly spaced over all."""

    row: tuple[int, ...]
    true: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epistemic: tuple[float, ...]
    aleatoric: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ClassificationPoints:
    """Held-out rows of a class, one by one, evenly spaced over all; entropy and information in nats.

    At most 2000 rows, and fewer where there are more than 20 classes.
    """

    row: tuple[int, ...]
    true: tuple[int, ...]
    probabilities: tuple[tuple[float, ...], ...]
    entropy: tuple[float, ...]
    mutual_information: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often the truth lay inside central intervals.

    Attributes:
        level: nominal levels, each in (0, 1).
        before: observed, for the committee's own law, the mixture of its members' Gaussians.
        after: observed, for the conformal intervals.
    """

    level: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Rows whose confidence in the predicted class lies in (lower, upper]."""

    lower: float
    upper: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence against accuracy, before and after the temperature; empty bins are left out."""

    before: tuple[ReliabilityBin, ...]
    after: tuple[ReliabilityBin, ...]
    error_before: float
    error_after: float
    temperature: float


@dataclass(frozen=True, slots=True)
class SpreadBin:
    """Rows of similar spread.

    Attributes:
        lower: least spread in the bin (regression: standard deviation; classification: entropy in nats).
        upper: greatest.
        count: rows.
        expected: the error the model itself foresees (root mean variance; mean chance to be wrong).
        observed: the error found (root mean squared error; share of wrong rows).
        standard_error: of `observed`.
    """

    lower: float
    upper: float
    count: int
    expected: float
    observed: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class ErrorBySpread:
    """Does the committee know when it is wrong?

    Attributes:
        bins: rows in order of their spread, cut into groups of equal size.
        rank_correlation: Spearman's, between spread and error; None where one of them is constant.
        rank_correlation_error: its standard error; None where undefined.
        detection: chance that a wrong row has more entropy than a right one; None where undefined.
    """

    bins: tuple[SpreadBin, ...]
    rank_correlation: float | None
    rank_correlation_error: float | None
    detection: float | None = None


@dataclass(frozen=True, slots=True)
class UncertainRow:
    """One of the rows the committee is least sure about.

    Attributes:
        row: its number in the file, the first one being 1.
        prediction: as a person reads it.
        true: what happened.
        spread: standard deviation in the unit of the target, or entropy in nats.
        cells: some of the row's own columns and values.
    """

    row: int
    prediction: str
    true: str
    spread: float
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RegressionEvaluation:
    """Everything the report says about held-out rows of a number."""

    rows: int
    level: float
    target_std: float
    scores: tuple[Score, ...]
    points: RegressionPoints
    coverage: Coverage
    spread: ErrorBySpread
    uncertain: tuple[UncertainRow, ...]


@dataclass(frozen=True, slots=True)
class ClassificationEvaluation:
    """Everything the report says about held-out rows of a class.

    confusion[i][j] counts rows of class i that were predicted as class j.
    """

    rows: int
    classes: tuple[str, ...]
    scores: tuple[Score, ...]
    points: ClassificationPoints
    confusion: tuple[tuple[int, ...], ...]
    reliability: Reliability
    spread: ErrorBySpread
    uncertain: tuple[UncertainRow, ...]
