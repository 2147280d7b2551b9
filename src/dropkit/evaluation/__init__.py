"""A finished model on held-out rows: measures, calibration, error against spread, and the alternatives."""

from __future__ import annotations

from dropkit.evaluation.comparison import Comparison, Competitor, Split, compare
from dropkit.evaluation.held_out import evaluate_classification, evaluate_regression
from dropkit.evaluation.measures import ClassificationForecast, RegressionForecast
from dropkit.evaluation.members import SpreadByMembers, spread_by_members
from dropkit.evaluation.records import ClassificationEvaluation, RegressionEvaluation

__all__ = [
    "ClassificationEvaluation",
    "ClassificationForecast",
    "Comparison",
    "Competitor",
    "RegressionEvaluation",
    "RegressionForecast",
    "Split",
    "SpreadByMembers",
    "compare",
    "evaluate_classification",
    "evaluate_regression",
    "spread_by_members",
]
