"""Measures of a forecast on held-out rows, each with its standard error over the rows.

Every measure is a value and one number per row, its influence: the value moves by influence / n when a row
is weighted a little more. So one rule gives the standard errors, and that of a difference between two models
on the same rows comes from the difference of their influences (a paired comparison).

    standard error = sd(influence) / sqrt(n)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.committee.calibrate import ConformalInterval
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.errors import ShapeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Probabilities are kept this far from 0 before a logarithm; 0 for what happened costs 27.6 nats.
PROBABILITY_FLOOR = 1e-12
# Equal parts of (0, 1] in which confidence is compared with accuracy.
BINS = 10


@dataclass(frozen=True, slots=True)
class RegressionForecast:
    """What some model says about n rows of a number.

    Attributes:
        mean: (n,) in the unit of the target.
        std: (n,) predictive standard deviation, the same unit, above 0.
        lower: (n,) lower end of the interval at the nominal level.
        upper: (n,) upper end.
        nll: (n,) negative log-likelihood of the true value, nats; None: that of a Gaussian.
    """

    mean: Floats
    std: Floats
    lower: Floats
    upper: Floats
    nll: Floats | None = None


@dataclass(frozen=True, slots=True)
class ClassificationForecast:
    """What some model says about n rows of a class.

    Attributes:
        probabilities: (n, C), each row summing to 1.
    """

    probabilities: Floats


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure before its rows are summed up.

    Attributes:
        value: the measure over all rows.
        influence: (n,) what each row adds; its mean need not be `value`.
        standard_error: error of `value` that comes from having n rows only; 0 for a single row, where it is unknown.
    """

    value: float
    influence: Floats
    standard_error: float


def regression_forecast(
    prediction: RegressionPrediction, calibration: ConformalInterval, y: Floats, level: float
) -> RegressionForecast:
    """The committee's forecast with calibrated intervals; its likelihood is that of the members' mixture."""
    interval = calibration.interval(prediction, level)
    return RegressionForecast(
        mean=prediction.mean.double().numpy(),
        std=prediction.std.double().numpy(),
        lower=interval.lower.double().numpy(),
        upper=interval.upper.double().numpy(),
        nll=-prediction.log_likelihood(torch.from_numpy(y)).double().numpy(),
    )


def classification_forecast(prediction: ClassificationPrediction) -> ClassificationForecast:
    """The committee's calibrated probabilities."""
    return ClassificationForecast(prediction.probabilities.double().numpy())


def standard_error(values: Floats) -> float:
    """sd(values) / sqrt(n), with n - 1 in the variance; 0 for a single value.

    Args:
        values: (n,).
    """
    n = len(values)
    if n < 2 or np.ptp(values) <= 1e-12 * np.max(np.abs(values)):  # equal but for rounding
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(n))


def gaussian_nll(y: Floats, mean: Floats, std: Floats) -> Floats:
    """Negative log-likelihood of a Gaussian, in nats.

    nll = log(std) + (y - mean)^2 / (2 std^2) + log(2 pi) / 2

    Args:
        y: (n,) true values.
        mean: (n,).
        std: (n,) above 0.
    """
    scaled = (y - mean) / std
    return np.asarray(np.log(std) + 0.5 * scaled**2 + 0.5 * np.log(2 * np.pi), dtype=np.float64)


def average(values: Floats) -> Measure:
    """The mean over rows, as a measure."""
    return Measure(float(np.mean(values)), np.asarray(values, dtype=np.float64), standard_error(values))


def share(hits: NDArray[np.bool_]) -> Measure:
    """The share of rows that are hits, with a standard error that none or all hits do not make zero.

    p' = (k + 2) / (n + 4),    standard error = sqrt(p' (1 - p') / (n + 4))

    Source: Agresti and Coull 1998, The American Statistician 52, 119-126.
    """
    return Measure(float(np.mean(hits)), hits.astype(np.float64), share_error(int(hits.sum()), len(hits)))


def share_error(hits: int, rows: int) -> float:
    """Standard error of a share, as in `share`."""
    moved = (hits + 2) / (rows + 4)
    return float(np.sqrt(moved * (1 - moved) / (rows + 4)))


def root_mean_square(errors: Floats) -> Measure:
    """sqrt(mean(e^2)); by the delta method its influence is e^2 / (2 rms)."""
    rms = float(np.sqrt(np.mean(errors**2)))
    influence = errors**2 / (2 * rms) if rms > 0 else np.zeros(len(errors))
    return Measure(rms, influence, standard_error(influence))


def regression_measures(y: Floats, forecast: RegressionForecast) -> dict[str, Measure]:
    """RMSE, MAE, negative log-likelihood, and the interval's coverage and width.

    Args:
        y: (n,) true values.
        forecast: for the same rows.

    Returns:
        By name: "RMSE", "MAE", "NLL", "coverage", "width".

    Raises:
        ShapeError: the arrays are not all (n,), or there is no row.
    """
    check_rows(len(y), mean=forecast.mean, std=forecast.std, lower=forecast.lower, upper=forecast.upper)
    nll = gaussian_nll(y, forecast.mean, forecast.std) if forecast.nll is None else forecast.nll
    inside = (forecast.lower <= y) & (y <= forecast.upper)
    return {
        "RMSE": root_mean_square(y - forecast.mean),
        "MAE": average(np.abs(y - forecast.mean)),
        "NLL": average(nll),
        "coverage": share(inside),
        "width": average(forecast.upper - forecast.lower),
    }


def classification_measures(y: Ints, forecast: ClassificationForecast) -> dict[str, Measure]:
    """Accuracy, log loss, Brier score and expected calibration error.

    Args:
        y: (n,) true class indices.
        forecast: for the same rows.

    Returns:
        By name: "accuracy", "log loss" (nats), "Brier" (0 to 2), "ECE" (0 to 1).

    Raises:
        ShapeError: probabilities are not (n, C), or there is no row.
    """
    probabilities = forecast.probabilities
    if probabilities.ndim != 2:
        raise ShapeError(
            f"probabilities of shape {probabilities.shape} were given; the axes are (rows, classes)."
        )
    check_rows(len(y), probabilities=probabilities[:, 0])
    of_truth = probabilities[np.arange(len(y)), y]
    right = probabilities.argmax(axis=1) == y
    # |p - onehot|^2 = |p|^2 - 2 p_true + 1
    brier = (probabilities**2).sum(axis=1) - 2 * of_truth + 1
    return {
        "accuracy": share(right),
        "log loss": average(-np.log(np.maximum(of_truth, PROBABILITY_FLOOR))),
        "Brier": average(brier),
        "ECE": calibration_error(probabilities.max(axis=1), right),
    }


def confidence_bin(confidence: Floats, bins: int = BINS) -> Ints:
    """Which of `bins` equal parts of (0, 1] each confidence lies in; the upper edge belongs to the part.

    Args:
        confidence: (n,) in [0, 1].

    Returns:
        (n,) in 0 ... bins - 1.
    """
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def calibration_error(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> Measure:
    """Expected calibration error: how far confidence is from accuracy, on average over rows.

    ECE = sum over bins of (n_bin / n) |accuracy_bin - mean confidence_bin|

    Args:
        confidence: (n,) probability of the predicted class.
        right: (n,) whether the prediction was right.
        bins: equal parts of (0, 1].

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    place = confidence_bin(confidence, bins)
    excess = confidence - right
    sign = np.sign(np.bincount(place, weights=excess, minlength=bins))[place]
    # sum over rows of sign * excess is the sum over bins of |sum of excess|
    return average(sign * excess)


def paired_difference(ours: Measure, theirs: Measure) -> tuple[float, float]:
    """Ours minus theirs for one measure on the same rows, and the standard error of that difference."""
    return ours.value - theirs.value, standard_error(ours.influence - theirs.influence)


def check_rows(rows: int, **arrays: NDArray[np.generic]) -> None:
    """Refuse an empty table and arrays of another length, naming the array."""
    if rows == 0:
        raise ShapeError("No held-out row was given; an evaluation needs at least one.")
    for name, array in arrays.items():
        if array.shape != (rows,):
            raise ShapeError(f"{name} of shape {array.shape} was given for {rows} rows; give ({rows},).")
