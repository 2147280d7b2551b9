"""What a finished model does on rows it never saw: points, calibration, error against spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit import committee
from dropkit.committee.calibrate import ConformalInterval
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.errors import OptionError
from dropkit.evaluation.measures import (
    BINS,
    Floats,
    Ints,
    Measure,
    check_rows,
    classification_forecast,
    classification_measures,
    regression_forecast,
    regression_measures,
)
from dropkit.evaluation.records import (
    ClassificationEvaluation,
    ClassificationPoints,
    Coverage,
    RegressionEvaluation,
    RegressionPoints,
    Reliability,
    ReliabilityBin,
    Score,
    UncertainRow,
)
from dropkit.evaluation.spread import classification_spread, regression_spread

# A record keeps so many of the held-out rows one by one; every table is computed from all of them.
POINTS_KEPT = 2000
LEAST_CERTAIN = 8
CELL_LENGTH = 80

Cells = Callable[[int], Mapping[str, object]]


def evaluate_regression(
    y: Floats,
    prediction: RegressionPrediction,
    calibration: ConformalInterval,
    *,
    level: float = 0.9,
    row_numbers: Ints | None = None,
    cells: Cells | None = None,
) -> RegressionEvaluation:
    """All tables about n held-out rows of a number.

    Args:
        y: (n,) true values, in the unit of the prediction.
        prediction: the committee's, members with noise.
        calibration: conformal intervals fitted on other rows; coverage is counted for its levels.
        level: nominal level of the interval shown for each row; one of the calibration's.
        row_numbers: (n,) the rows' numbers in the file; 1 ... n if not given.
        cells: position in 0 ... n - 1 -> some columns of that row, asked for the least certain rows only.

    Raises:
        ShapeError: arrays of different lengths, or no row.
        OptionError: the calibration was not fitted for this level, or the members have no noise.
    """
    n = len(y)
    numbers = np.arange(1, n + 1) if row_numbers is None else row_numbers
    check_rows(n, row_numbers=numbers)
    forecast = regression_forecast(prediction, calibration, y, level)
    kept = evenly_spaced(n, POINTS_KEPT)
    uncertain = tuple(
        UncertainRow(
            row=int(numbers[i]),
            prediction=f"{forecast.mean[i]:.4g}",
            true=f"{y[i]:.4g}",
            spread=float(forecast.std[i]),
            cells=readable(cells, i),
        )
        for i in most_uncertain(forecast.std)
    )
    return RegressionEvaluation(
        rows=n,
        level=level,
        target_std=float(np.std(y)),
        scores=scores(regression_measures(y, forecast)),
        points=RegressionPoints(
            row=tuple(int(i) for i in numbers[kept]),
            true=as_floats(y[kept]),
            mean=as_floats(forecast.mean[kept]),
            std=as_floats(forecast.std[kept]),
            epistemic=as_floats(prediction.epistemic.sqrt().numpy()[kept]),
            aleatoric=as_floats(prediction.aleatoric.sqrt().numpy()[kept]),
            lower=as_floats(forecast.lower[kept]),
            upper=as_floats(forecast.upper[kept]),
        ),
        coverage=coverage_table(y, prediction, calibration),
        spread=regression_spread(np.abs(y - forecast.mean), forecast.std),
        uncertain=uncertain,
    )


def evaluate_classification(
    y: Ints,
    prediction: ClassificationPrediction,
    classes: Sequence[object],
    *,
    row_numbers: Ints | None = None,
    cells: Cells | None = None,
) -> ClassificationEvaluation:
    """All tables about n held-out rows of a class.

    Args:
        y: (n,) true class indices.
        prediction: the committee's, its temperature applied; without it is "before".
        classes: the C names, in the order of the probabilities' columns.
        row_numbers: (n,) the rows' numbers in the file; 1 ... n if not given.
        cells: position in 0 ... n - 1 -> some columns of that row, asked for the least certain rows only.

    Raises:
        ShapeError: arrays of different lengths, or no row.
    """
    n = len(y)
    numbers = np.arange(1, n + 1) if row_numbers is None else row_numbers
    check_rows(n, row_numbers=numbers)
    forecast = classification_forecast(prediction)
    probabilities = forecast.probabilities
    predicted = probabilities.argmax(axis=1)
    entropy = prediction.entropy.double().numpy()
    names = tuple(str(name) for name in classes)
    kept = evenly_spaced(n, min(POINTS_KEPT, 20 * POINTS_KEPT // len(names)))
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (y, predicted), 1)
    uncertain = tuple(
        UncertainRow(
            row=int(numbers[i]),
            prediction=f"{names[predicted[i]]} ({probabilities[i, predicted[i]]:.0%})",
            true=names[y[i]],
            spread=float(entropy[i]),
            cells=readable(cells, i),
        )
        for i in most_uncertain(entropy)
    )
    return ClassificationEvaluation(
        rows=n,
        classes=names,
        scores=scores(classification_measures(y, forecast)),
        points=ClassificationPoints(
            row=tuple(int(i) for i in numbers[kept]),
            true=tuple(int(i) for i in y[kept]),
            probabilities=tuple(as_floats(row) for row in probabilities[kept]),
            entropy=as_floats(entropy[kept]),
            mutual_information=as_floats(prediction.mutual_information.numpy()[kept]),
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        reliability=reliability_table(y, prediction),
        spread=classification_spread(predicted != y, entropy, 1 - probabilities.max(axis=1)),
        uncertain=uncertain,
    )


def scores(measures: Mapping[str, Measure]) -> tuple[Score, ...]:
    """Measures of dropkit itself, without a difference."""
    return tuple(Score(name, measure.value, measure.standard_error) for name, measure in measures.items())


def coverage_table(y: Floats, prediction: RegressionPrediction, calibration: ConformalInterval) -> Coverage:
    """Observed share of rows inside central intervals of each level the calibration was fitted for.

    A central interval of the committee's own law F holds y exactly when |F(y) - 1/2| <= level / 2, so one pass
    over the members serves all levels.
    """
    at_truth = distribution_function(y, prediction)
    after = committee.coverage(prediction, torch.from_numpy(y), calibration.levels, calibration)
    return Coverage(
        level=calibration.levels,
        before=tuple(float(np.mean(np.abs(at_truth - 0.5) <= level / 2)) for level in calibration.levels),
        after=after.covered,
    )


def distribution_function(y: Floats, prediction: RegressionPrediction) -> Floats:
    """F(y) = mean over m of Phi((y - samples[m]) / sqrt(noise[m])), the mixture the committee predicts.

    Args:
        y: (n,).
        prediction: of the same n rows, members with noise.

    Raises:
        OptionError: the members have no noise.
    """
    if prediction.noise is None:
        raise OptionError(
            "A point model's prediction was given; give it noise first: prediction.with_noise(variance)."
        )
    scaled = (torch.from_numpy(y) - prediction.samples.double()) / prediction.noise.double().sqrt()
    return np.asarray(torch.special.ndtr(scaled).mean(dim=0).numpy(), dtype=np.float64)


def reliability_table(y: Ints, prediction: ClassificationPrediction) -> Reliability:
    """Confidence against accuracy of the predicted class, at temperature 1 and at the prediction's own."""
    labels = torch.from_numpy(np.ascontiguousarray(y))
    before, after = (
        committee.reliability(p.probabilities, labels, BINS)
        for p in (replace(prediction, temperature=1.0), prediction)
    )
    return Reliability(
        before=bins_with_rows(before),
        after=bins_with_rows(after),
        error_before=before.expected_calibration_error,
        error_after=after.expected_calibration_error,
        temperature=prediction.temperature,
    )


def bins_with_rows(table: committee.Reliability) -> tuple[ReliabilityBin, ...]:
    """One line for each bin that holds a row; an empty one has no accuracy."""
    lines = zip(table.edges, table.edges[1:], table.count, table.confidence, table.accuracy, strict=False)
    return tuple(ReliabilityBin(*line) for line in lines if line[2])


def most_uncertain(spread: Floats, count: int = LEAST_CERTAIN) -> list[int]:
    """Positions of the rows with the greatest spread, the greatest first; equal ones in their own order."""
    return [int(i) for i in np.argsort(-spread, kind="stable")[:count]]


def evenly_spaced(rows: int, most: int) -> Ints:
    """All of 0 ... rows - 1 or `most` of them, evenly spaced, first and last included."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(np.int64))


def readable(cells: Cells | None, position: int) -> tuple[tuple[str, str], ...]:
    """A row's own cells as pairs of text."""
    if cells is None:
        return ()
    return tuple(
        (str(name)[:CELL_LENGTH], str(value)[:CELL_LENGTH]) for name, value in cells(position).items()
    )


def as_floats(values: NDArray[np.generic]) -> tuple[float, ...]:
    """Python floats, which JSON writes."""
    return tuple(np.asarray(values, dtype=np.float64).tolist())
