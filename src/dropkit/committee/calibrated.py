"""A committee with its calibration: what a finished model is asked through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from dropkit.committee.calibrate import ConformalInterval, Temperature, rows_needed
from dropkit.committee.committee import Committee, Rows
from dropkit.committee.prediction import ClassificationPrediction, Interval, Prediction, RegressionPrediction

LEVEL = 0.9
# Coverage is shown at these levels; each needs enough validation rows to be calibrated.
LEVELS = (0.5, 0.6, 0.7, 0.8, LEVEL, 0.95)


@dataclass(frozen=True, slots=True)
class CalibratedCommittee:
    """A committee, and what was learned on validation rows about how far to trust it.

    Attributes:
        committee: of thinned networks, "gaussian" or "categorical".
        calibration: conformal intervals for numbers, a temperature for classes; None where there were too few
            rows to calibrate on, and the committee's own word stands.
    """

    committee: Committee
    calibration: ConformalInterval | Temperature | None

    @classmethod
    def fit(cls, committee: Committee, x: Rows, y: Rows) -> CalibratedCommittee:
        """Calibrate on rows the network was not trained on.

        Args:
            committee: asked about them.
            x: (B, D) encoded rows.
            y: (B,) values or class indices.
        """
        prediction = committee.predict(x)
        truth = torch.as_tensor(y)
        if isinstance(prediction, ClassificationPrediction):
            return cls(committee, Temperature.fit(prediction, truth) if len(truth) else None)
        levels = [level for level in LEVELS if rows_needed(level) <= len(truth)]
        if LEVEL not in levels:
            return cls(committee, None)
        return cls(committee, ConformalInterval.fit(prediction, truth, levels))

    def predict(self, x: Rows) -> Prediction:
        """Ask about encoded rows; class probabilities are tempered."""
        return self._calibrated(self.committee.predict(x))

    def predict_chunks(self, chunks: Iterable[Rows]) -> Iterator[Prediction]:
        """Ask about rows that come in pieces of any size; answers come tile by tile, the same whatever the pieces."""
        return map(self._calibrated, self.committee.predict_chunks(chunks))

    def interval(self, prediction: RegressionPrediction, level: float = LEVEL) -> Interval:
        """Conformal where that level was calibrated, else the committee's own."""
        if isinstance(self.calibration, ConformalInterval) and level in self.calibration.levels:
            return self.calibration.interval(prediction, level)
        return prediction.interval(level)

    def _calibrated(self, prediction: Prediction) -> Prediction:
        if isinstance(self.calibration, Temperature) and isinstance(prediction, ClassificationPrediction):
            return self.calibration.apply(prediction)
        return prediction
