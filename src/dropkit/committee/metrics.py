"""Metrics for torchmetrics: `update(prediction, target)` batch by batch, `compute()` over all batches and processes.

Each is a thin shell; the mathematics is in `mixture`, `reliability` and `ranking`. They go into a MetricCollection
together, as all are updated with a committee's prediction and what was seen.
Needs torchmetrics: pip install "dropkit[metrics]".
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dropkit.committee.calibrate import ConformalInterval
from dropkit.committee.conformal_sets import ConformalSet
from dropkit.committee.mixture import mixture_crps, sample_crps
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Prediction,
    RegressionPrediction,
    check_level,
    check_rows,
)
from dropkit.committee.ranking import auroc
from dropkit.committee.reliability import Reliability, reliability_of, reliability_sums
from dropkit.committee.summary import ClassificationSummary, RegressionSummary
from dropkit.errors import MissingPackageError, OptionError

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingPackageError(
        'torchmetrics is not installed, which dropkit.committee.metrics is made for: pip install "dropkit[metrics]"'
    ) from error

Answer = Prediction | RegressionSummary | ClassificationSummary
OF_CLASSES = (ClassificationPrediction, ClassificationSummary)

__all__ = [
    "ContinuousRankedProbabilityScore",
    "Coverage",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "SpreadAUROC",
]


class _Average(Metric):
    """Parent of the means over rows; never built itself."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean; nan before the first row."""
        return self.total / self.count

    def _take(self, values: Tensor) -> None:
        self.total = self.total + values.detach().double().sum().to(self.total.device)
        self.count = self.count + values.numel()


class NegativeLogLikelihood(_Average):
    """Mean of -log p(what was seen), in nats: under the mixture of members' normal laws, or of calibrated classes.

    Of numbers a density, in nats per value, which depends on the unit; may be negative.
    """

    higher_is_better = False
    is_differentiable = False

    def update(self, prediction: Answer, target: Tensor) -> None:
        """Take rows: (B, *out) values, or (B,) classes."""
        self._take(-prediction.log_likelihood(target))


class ContinuousRankedProbabilityScore(_Average):
    """Mean CRPS, in the unit of the output: of the members' mixture of normal laws, or of a point model's values.

    Args:
        fair: for a point model, the score that does not depend on how many members were asked (`sample_crps`).
    """

    higher_is_better = False
    is_differentiable = False

    def __init__(self, fair: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.fair = fair

    def update(self, prediction: RegressionPrediction, target: Tensor) -> None:
        """Take rows: (B, *out) values.

        Raises:
            OptionError: the fair score of members with noise, for which there is none; or members that were not kept.
        """
        if not isinstance(prediction, RegressionPrediction):
            raise OptionError(
                f"a {type(prediction).__name__} was given; the score takes the members of numbers, as in its "
                "`kept`."
            )
        check_rows(target, prediction.samples.shape[1:])
        if prediction.noise is None:
            self._take(sample_crps(prediction.samples, target, fair=self.fair))
            return
        if self.fair:
            raise OptionError(
                "fair=True was given for members with noise; the fair score is one of a point model."
            )
        self._take(mixture_crps(prediction.samples, prediction.noise, target))


class ExpectedCalibrationError(Metric):
    """How far confidence is from accuracy on average over rows, with the bins it was computed from.

    The same number as torchmetrics' MulticlassCalibrationError with norm="l1" (but for rows whose confidence is
    exactly an edge: ours belong to the bin below, as in Guo et al. 2017).

    Args:
        bins: equal parts of (0, 1].
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    sums: Tensor

    def __init__(self, bins: int = 15, **options: Any) -> None:
        super().__init__(**options)
        if bins < 1:
            raise OptionError(f"bins={bins!r} was given; at least 1.")
        self.bins = bins
        self.add_state("sums", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: ClassificationPrediction | ClassificationSummary, target: Tensor) -> None:
        """Take rows: (B,) classes."""
        self.sums = self.sums + reliability_sums(prediction.probabilities, target, self.bins).to(
            self.sums.device
        )

    def compute(self) -> Tensor:
        """The error, 0 to 1; nan before the first row."""
        count, sure, hits = self.sums
        return (hits - sure).abs().sum() / count.sum()

    @property
    def reliability(self) -> Reliability:
        """The table bin by bin, of this process's rows.

        Raises:
            ShapeError: there were no rows.
        """
        return reliability_of(self.sums)


class Coverage(_Average):
    """Share of values inside their intervals, or of classes inside their conformal sets; `width` says at what price.

    Args:
        level: what was promised.
        calibration: conformal intervals or sets; None for the members' own intervals.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    extent: Tensor

    def __init__(
        self, level: float = 0.9, calibration: ConformalInterval | ConformalSet | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.level = check_level(level)
        self.calibration = calibration
        self.add_state("extent", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Answer, target: Tensor) -> None:
        """Take rows: (B, *out) values, or (B,) classes.

        Raises:
            OptionError: classes without conformal sets, or numbers with them.
        """
        if isinstance(self.calibration, ConformalSet) != isinstance(prediction, OF_CLASSES):
            raise OptionError(
                f"a {type(prediction).__name__} was given with calibration {type(self.calibration).__name__}; numbers "
                "have intervals, classes have sets (dropkit.committee.calibrated.calibrate)."
            )
        if isinstance(prediction, OF_CLASSES):
            assert isinstance(self.calibration, ConformalSet)
            sets = self.calibration.sets(prediction, self.level)
            inside, extent = (
                sets.included.gather(1, target.to(sets.included.device)[:, None]),
                sets.size.double(),
            )
        else:
            assert not isinstance(self.calibration, ConformalSet)
            ask = prediction.interval if self.calibration is None else self._conformal(prediction)
            interval = ask(self.level)
            check_rows(target, interval.lower.shape)
            value = target.to(interval.lower)
            inside = (interval.lower <= value) & (value <= interval.upper)
            extent = (interval.upper.double() - interval.lower.double()).flatten()
        self._take(inside.double())
        self.extent = self.extent + extent.sum().to(self.extent.device)

    @property
    def width(self) -> Tensor:
        """Mean width of the intervals, in the unit of the output, or mean number of classes in the sets."""
        return self.extent / self.count

    def _conformal(self, prediction: RegressionPrediction | RegressionSummary) -> Any:
        assert isinstance(self.calibration, ConformalInterval)
        calibration = self.calibration
        return lambda level: calibration.interval(prediction, level)


Against = Literal["error", "novelty"]
SPREADS = ("epistemic", "aleatoric", "total", "entropy", "expected_entropy", "mutual_information")


class SpreadAUROC(Metric):
    """Chance that a wrong (or strange) row has more spread than another one; 0.5 says the spread tells nothing.

    Keeps one number and one flag for each row (or value).

    Args:
        against: "error": the target is what was seen, and rows are wrong where the label is another, or the mean is
            further off than `error_above`. "novelty": the target says, (B,) bool, which rows are from elsewhere.
        spread: which number; by default the members' disagreement, "mutual_information" or "epistemic".
        error_above: for numbers, from which error on a value counts as wrong, in the unit of the output.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    spreads: list[Tensor]
    flags: list[Tensor]

    def __init__(
        self,
        against: Against = "error",
        spread: str | None = None,
        error_above: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if against not in get_args(Against):
            raise OptionError(f"against={against!r} was given; it is one of {', '.join(get_args(Against))}.")
        if spread is not None and spread not in SPREADS:
            raise OptionError(f"spread={spread!r} was given; it is one of {', '.join(SPREADS)}.")
        if error_above is not None and not error_above >= 0.0:
            raise OptionError(f"error_above={error_above!r} was given; an error is at least 0.")
        self.against, self.spread, self.error_above = against, spread, error_above
        self.add_state("spreads", [], dist_reduce_fx="cat")
        self.add_state("flags", [], dist_reduce_fx="cat")

    def update(self, prediction: Answer, target: Tensor) -> None:
        """Take rows, and what `against` says.

        Raises:
            OptionError: errors of numbers without `error_above`, or a spread that the prediction does not have.
            ShapeError: the target does not belong to the prediction.
        """
        name = self.spread or ("mutual_information" if isinstance(prediction, OF_CLASSES) else "epistemic")
        if not hasattr(prediction, name):
            raise OptionError(
                f"spread={name!r} was asked of a {type(prediction).__name__}, which has none such."
            )
        spread: Tensor = getattr(prediction, name).detach()
        if self.against == "novelty":
            check_rows(target, spread.shape[:1])
            # Of several outputs the one with most spread speaks for the row.
            spread = spread.unsqueeze(-1).flatten(1).amax(dim=1)
            positive = target.bool()
        elif isinstance(prediction, OF_CLASSES):
            check_rows(target, spread.shape)
            positive = prediction.label != target.to(spread.device)
        else:
            if self.error_above is None:
                raise OptionError(
                    "errors of numbers were asked for; say from which size on: error_above=...."
                )
            check_rows(target, spread.shape)
            positive = (prediction.mean.detach() - target.to(spread)).abs() > self.error_above
        self.spreads.append(spread.flatten())
        self.flags.append(positive.to(spread.device).flatten())

    def compute(self) -> Tensor:
        """The area; nan where all rows are of one kind."""
        spreads, flags = (
            torch.cat(v) if isinstance(v, list) and v else torch.as_tensor(v).flatten()
            for v in (self.spreads, self.flags)
        )
        area = auroc(spreads, flags)
        return torch.tensor(math.nan if area is None else area, dtype=torch.float64)
