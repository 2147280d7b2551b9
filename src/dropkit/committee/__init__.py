"""A committee of thinned networks: what it is asked, what it answers, and how the answer is calibrated."""

from dropkit.committee.calibrate import (
    ConformalInterval,
    Coverage,
    Reliability,
    Temperature,
    coverage,
    reliability,
    rows_needed,
)
from dropkit.committee.committee import Committee, Member
from dropkit.committee.information import entropy, expected_entropy, mutual_information
from dropkit.committee.plan import Plan
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Interval,
    Prediction,
    RegressionPrediction,
)

__all__ = [
    "ClassificationPrediction",
    "Committee",
    "ConformalInterval",
    "Coverage",
    "Interval",
    "Member",
    "Plan",
    "Prediction",
    "RegressionPrediction",
    "Reliability",
    "Temperature",
    "coverage",
    "entropy",
    "expected_entropy",
    "mutual_information",
    "reliability",
    "rows_needed",
]
