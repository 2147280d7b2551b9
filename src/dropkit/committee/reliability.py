"""Instruments of calibration: how often probabilities and intervals were right, against how often they said so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.committee.calibrate import ConformalInterval
from dropkit.committee.information import check_class_probabilities
from dropkit.committee.prediction import RegressionPrediction, check_level, check_rows, pick_class
from dropkit.errors import OptionError, ShapeError


@dataclass(frozen=True, slots=True)
class Reliability:
    """How sure the predicted classes were against how often they were right, bin by bin.

    Attributes:
        edges: (bins + 1,) equal steps from 0 to 1; a bin holds its upper edge, not its lower one.
        count: (bins,) rows whose largest probability fell in the bin.
        confidence: (bins,) mean of that probability; nan where the bin is empty.
        accuracy: (bins,) share of these rows whose class was predicted; nan where the bin is empty.
        expected_calibration_error: sum over bins of count / rows * |accuracy - confidence|.
        maximum_calibration_error: the largest |accuracy - confidence| of a bin with rows.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 2 to 5.
    """

    edges: tuple[float, ...]
    count: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    expected_calibration_error: float
    maximum_calibration_error: float

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return sum(self.count)

    @property
    def standard_error(self) -> tuple[float, ...]:
        """(bins,), of the accuracies, sqrt(a (1 - a) / count); nan where the bin is empty."""
        pairs = zip(self.accuracy, self.count, strict=True)
        return tuple(math.sqrt(a * (1 - a) / n) if n else math.nan for a, n in pairs)


def reliability(probabilities: Tensor, y: Tensor, bins: int = 15) -> Reliability:
    """Sort rows by how sure the predicted class is, and see how often it was right.

    Args:
        probabilities: (B, C).
        y: (B,) class indices.
        bins: how many equal bins on [0, 1].

    Raises:
        NotProbabilitiesError, ShapeError, OptionError: the input is not what it should be, or there are no rows.
    """
    if bins < 1:
        raise OptionError(f"bins={bins!r} was given; at least 1.")
    return reliability_of(reliability_sums(probabilities, y, bins))


def reliability_sums(probabilities: Tensor, y: Tensor, bins: int) -> Tensor:
    """(3, bins) float64: rows, sum of confidence and rows that were right, for each bin; those of batches add up.

    Args:
        probabilities: (B, C).
        y: (B,) class indices.
        bins: how many equal bins on [0, 1].

    Raises:
        NotProbabilitiesError, ShapeError, OptionError: the input is not what it should be.
    """
    check_class_probabilities(probabilities, axes="B C")
    pick_class(probabilities, y)  # checks y
    top, label = probabilities.detach().double().max(dim=-1)
    right = (label == y.to(label)).double()
    inner = torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64, device=top.device)[1:-1]
    place = torch.bucketize(top, inner)
    return torch.stack(
        [torch.bincount(place, weights=w, minlength=bins) for w in (torch.ones_like(top), top, right)]
    )


def reliability_of(sums: Tensor) -> Reliability:
    """The table of all rows that `reliability_sums` met.

    Raises:
        ShapeError: there were none.
    """
    count, sure, hits = sums.double().cpu()
    rows = float(count.sum())
    if rows == 0.0:
        raise ShapeError("no rows were given; reliability is measured on at least one.")
    gap = (hits - sure).abs()
    return Reliability(
        edges=tuple(torch.linspace(0.0, 1.0, len(count) + 1, dtype=torch.float64).tolist()),
        count=tuple(int(n) for n in count.tolist()),
        confidence=tuple((sure / count).tolist()),
        accuracy=tuple((hits / count).tolist()),
        expected_calibration_error=float(gap.sum() / rows),
        maximum_calibration_error=float((gap / count.clamp_min(1.0)).max()),
    )


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often intervals held the seen value, level by level.

    Attributes:
        levels: what was asked for.
        covered: share of values inside, ends included.
        width: mean width of the intervals, in the unit of the output.
        rows: how many values.
    """

    levels: tuple[float, ...]
    covered: tuple[float, ...]
    width: tuple[float, ...]
    rows: int

    @property
    def standard_error(self) -> tuple[float, ...]:
        """Of `covered` if the intervals are right: sqrt(level (1 - level) / rows)."""
        return tuple(math.sqrt(v * (1 - v) / self.rows) for v in self.levels)


def coverage(
    prediction: RegressionPrediction,
    y: Tensor,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    calibration: ConformalInterval | None = None,
) -> Coverage:
    """Count how often the prediction's intervals hold the seen values.

    Args:
        prediction: of rows that neither trained nor calibrated.
        y: (B, *out) like its mean, in its unit.
        levels: which intervals; with a calibration, those it was fitted for.
        calibration: conformal intervals instead of the members' own ones.

    Raises:
        ShapeError: y does not belong to the prediction, or there are no rows.
        OptionError: a level is not inside (0, 1) or was not fitted.
    """
    check_rows(y, prediction.samples.shape[1:])
    if y.numel() == 0:
        raise ShapeError("no rows were given; coverage is measured on at least one.")
    covered, width = [], []
    for level in levels:
        ask = prediction.interval if calibration is None else lambda v: calibration.interval(prediction, v)
        interval = ask(check_level(level))
        covered.append(interval.covers(y) / y.numel())
        width.append(float((interval.upper.double() - interval.lower.double()).mean()))
    return Coverage(tuple(levels), tuple(covered), tuple(width), rows=y.numel())
