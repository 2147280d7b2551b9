"""A committee of thinned networks: what it is asked, what it answers, and how the answer is calibrated."""

from dropkit.committee.calibrate import ConformalInterval, Temperature, rows_needed
from dropkit.committee.calibrated import CalibratedCommittee
from dropkit.committee.committee import Committee, Member
from dropkit.committee.information import entropy, expected_entropy, mutual_information
from dropkit.committee.plan import Plan
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Interval,
    Prediction,
    RegressionPrediction,
)
from dropkit.committee.reliability import Coverage, Reliability, coverage, reliability

__all__ = [
    "CalibratedCommittee",
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
