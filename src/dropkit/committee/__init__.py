"""A committee of thinned networks: what it is asked, how it is run, what it answers, and how that is calibrated."""

from dropkit.committee.averages import Average, Averages, averages
from dropkit.committee.batch_bald import (
    BatchSelection,
    information_gain,
    joint_mutual_information,
    select_batch,
)
from dropkit.committee.calibrate import ConformalInterval, Temperature, rows_needed
from dropkit.committee.calibrated import CalibratedCommittee, calibrate
from dropkit.committee.committee import Committee, Member
from dropkit.committee.conformal_sets import ClassSets, ConformalSet
from dropkit.committee.enumeration import Enumeration, enumerate_masks
from dropkit.committee.export import exported_program
from dropkit.committee.information import entropy, expected_entropy, mutual_information
from dropkit.committee.moments.record import Moments
from dropkit.committee.onnx import Export, export
from dropkit.committee.plan import Plan
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Interval,
    Prediction,
    RegressionPrediction,
)
from dropkit.committee.rate_choice import RateChoice, choose_rates
from dropkit.committee.reliability import Coverage, Reliability, coverage, reliability
from dropkit.committee.saving import load, save
from dropkit.committee.summary import ClassificationSummary, RegressionSummary, Summary
from dropkit.committee.tolerance import Stream, draw_until

__all__ = [
    "Average",
    "Averages",
    "BatchSelection",
    "CalibratedCommittee",
    "ClassSets",
    "ClassificationPrediction",
    "ClassificationSummary",
    "Committee",
    "ConformalInterval",
    "ConformalSet",
    "Coverage",
    "Enumeration",
    "Export",
    "Interval",
    "Member",
    "Moments",
    "Plan",
    "Prediction",
    "RateChoice",
    "RegressionPrediction",
    "RegressionSummary",
    "Reliability",
    "Stream",
    "Summary",
    "Temperature",
    "averages",
    "calibrate",
    "choose_rates",
    "coverage",
    "draw_until",
    "entropy",
    "enumerate_masks",
    "expected_entropy",
    "export",
    "exported_program",
    "information_gain",
    "joint_mutual_information",
    "load",
    "mutual_information",
    "reliability",
    "rows_needed",
    "save",
    "select_batch",
]
