"""A committee with its calibration: what a finished model is asked through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dropkit.committee.calibrate import ConformalInterval, Temperature, rows_needed
from dropkit.committee.committee import Committee
from dropkit.committee.conformal_sets import ClassSets, ConformalSet, Score
from dropkit.committee.outputs import Inputs, count_rows, take
from dropkit.committee.prediction import ClassificationPrediction, Interval, Prediction, RegressionPrediction
from dropkit.committee.rate_choice import RateChoice, choose_rates
from dropkit.committee.summary import ClassificationSummary, RegressionSummary
from dropkit.errors import OptionError, ShapeError

LEVEL = 0.9
# Coverage is shown at these levels; each needs enough validation rows to be calibrated.
LEVELS = (0.5, 0.6, 0.7, 0.8, LEVEL, 0.95)


@dataclass(frozen=True, slots=True)
class CalibratedCommittee:
    """A committee, and what was learned on validation rows about how far to trust it.

    Attributes:
        committee: of thinned networks.
        calibration: conformal intervals for numbers, a temperature for classes; None where there were too few
            rows to calibrate on, and the committee's own word stands.
        sets: conformal sets of classes; None for numbers, and where there were too few rows.
        rates: which rates were tried, where they were chosen again.
    """

    committee: Committee
    calibration: ConformalInterval | Temperature | None
    sets: ConformalSet | None = None
    rates: RateChoice | None = None

    @classmethod
    def fit(cls, committee: Committee, x: Inputs, y: Inputs) -> CalibratedCommittee:
        """Calibrate on rows the network was not trained on: intervals for numbers, a temperature for classes.

        Args:
            committee: asked about them.
            x: (B, D) encoded rows.
            y: (B,) values or class indices.
        """
        prediction = _asked(committee, x)
        truth = torch.as_tensor(y)
        if isinstance(prediction, ClassificationPrediction):
            return cls(committee, Temperature.fit(prediction, truth) if len(truth) else None)
        return cls(committee, _intervals(prediction, truth, LEVELS))

    def predict(self, x: Inputs, **options: Any) -> Any:
        """Ask about rows as `Committee.predict` does, with its options; class probabilities are tempered."""
        return self._calibrated(self.committee.predict(x, **options))

    def predict_chunks(self, chunks: Iterable[Inputs]) -> Iterator[Prediction]:
        """Ask about rows that come in pieces of any size; answers come tile by tile, the same whatever the pieces."""
        return map(self._calibrated, self.committee.predict_chunks(chunks))

    def interval(
        self, prediction: RegressionPrediction | RegressionSummary, level: float = LEVEL
    ) -> Interval:
        """Conformal where that level was calibrated, else the committee's own."""
        if isinstance(self.calibration, ConformalInterval) and level in self.calibration.levels:
            return self.calibration.interval(prediction, level)
        return prediction.interval(level)

    def class_sets(
        self,
        prediction: ClassificationPrediction | ClassificationSummary,
        level: float = LEVEL,
        *,
        ids: Tensor | None = None,
    ) -> ClassSets:
        """Conformal sets of classes for what `predict` gave.

        Raises:
            OptionError: there were too few rows for sets, or for this level.
        """
        if self.sets is None:
            raise OptionError(
                "sets of classes were asked of a committee that was calibrated without them; use dropkit.committee."
                f"calibrate on held-out rows, {rows_needed(level)} of them or more beside those for the temperature."
            )
        return self.sets.sets(prediction, level, ids=ids)

    def _calibrated(self, prediction: Any) -> Any:
        of_classes = isinstance(prediction, ClassificationPrediction | ClassificationSummary)
        if isinstance(self.calibration, Temperature) and of_classes:
            return replace(prediction, temperature=self.calibration.temperature)
        return prediction


def calibrate(
    committee: Committee,
    x: Inputs,
    y: Tensor,
    *,
    levels: Sequence[float] = LEVELS,
    multipliers: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
    score: Score = "adaptive",
    seed: int = 0,
) -> CalibratedCommittee:
    """Make a committee's promises agree with held-out rows; the network is not trained again.

    1. With `multipliers` or `rates`, other rates are tried, and the likeliest is kept where it gains more than a
       standard error (`choose_rates`).
    2. Classes get a temperature, where it gains more than a standard error.
    3. Classes get conformal sets, numbers conformal intervals, at those levels for which there are rows enough.

    A conformal promise takes rows that chose nothing. So where 1. or 2. choose, they do it on one half of the rows,
    drawn by the seed, and 3. is fitted on the other; numbers without 1. have all rows for 3.

    Args:
        committee: its members are asked about the rows.
        x: (B, ...) rows that trained nothing, or a structure of them.
        y: (B,) class indices, or values like the prediction's mean.
        levels: of the sets and intervals.
        multipliers: of all rates, to be tried beside 1.
        rates: one rate for all sites instead.
        score: of the sets: "adaptive" or "least" (`ConformalSet`).
        seed: of the halves.

    Returns:
        The committee (of other rates, where these were chosen) with what was fitted; None where rows were too few.

    Raises:
        OptionError, ShapeError: y does not belong to x, a level or rate is out of range.

    Example:
        >>> import dropkit as dk
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), dk.nn.Dropout(0.2), torch.nn.Linear(16, 4))
        >>> x, y = torch.randn(60, 3), torch.randint(0, 4, (60,))
        >>> calibrated = calibrate(dk.Committee(model, 8, likelihood="categorical"), x, y, levels=(0.8,))
        >>> calibrated.class_sets(calibrated.predict(x), 0.8).included.shape
        torch.Size([60, 4])
    """
    rows = count_rows(x)
    if y.ndim == 0 or len(y) != rows:
        raise ShapeError(f"y of shape {tuple(y.shape)} was given for {rows} rows of x; they must agree.")
    categorical = committee.likelihood == "categorical"
    choosing = categorical or multipliers is not None or rates is not None
    first, second = _halves(rows, seed) if choosing else (torch.arange(0), torch.arange(rows))
    choice = None
    if multipliers is not None or rates is not None:
        held = take(x, first)
        choice, network = choose_rates(
            network_of(committee),
            lambda model: _asked(around(committee, model), held),
            y[first],
            multipliers=multipliers,
            rates=rates,
        )
        if choice.chosen is not None:
            committee = around(committee, network)
    rest = _asked(committee, take(x, second))
    if isinstance(rest, RegressionPrediction):
        return CalibratedCommittee(committee, _intervals(rest, y[second], levels), rates=choice)
    temperature = None
    if len(first):
        chosen_on = _asked(committee, take(x, first))
        assert isinstance(chosen_on, ClassificationPrediction)
        temperature = Temperature.fit(chosen_on, y[first])
        rest = replace(rest, temperature=temperature.temperature)
    enough = [level for level in levels if rows_needed(level) <= len(second)]
    sets = ConformalSet.fit(rest, y[second], enough, score=score) if enough else None
    return CalibratedCommittee(committee, temperature, sets, choice)


def network_of(committee: Committee) -> nn.Module:
    """The network that a committee asks, its sites named."""
    return committee.network


def around(committee: Committee, network: nn.Module) -> Committee:
    """The same committee, in all its options, of another network; without spread it is accepted."""
    return Committee(
        network,
        committee.members,
        committee.seed,
        committee.likelihood,
        tile=committee.tile,
        per_row=committee.per_row,
        memory=committee.memory,
        allow=(*committee.allow, "no spread"),
    )


def _asked(committee: Committee, x: Inputs) -> Prediction:
    """What a committee of one output says.

    Raises:
        ShapeError: it puts out a structure.
    """
    prediction = committee.predict(x)
    if not isinstance(prediction, RegressionPrediction | ClassificationPrediction):
        raise ShapeError(
            f"a committee whose model puts out a {type(prediction).__name__} was given; one output is calibrated. Wrap "
            "the model in a module that returns it alone."
        )
    return prediction


def _intervals(
    prediction: RegressionPrediction, y: Tensor, levels: Sequence[float]
) -> ConformalInterval | None:
    enough = [level for level in levels if rows_needed(level) <= len(y)]
    if not enough or (LEVEL in levels and LEVEL not in enough):
        return None
    return ConformalInterval.fit(prediction, y, enough)


def _halves(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: rows // 2], order[rows // 2 :]
