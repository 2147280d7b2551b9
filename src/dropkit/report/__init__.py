"""The record of a finished fit, and the record as text, JSON and one self-contained HTML page."""

from __future__ import annotations

from dropkit.report.html import to_html
from dropkit.report.record import (
    ColumnSummary,
    DataSummary,
    FitReport,
    LearningCurves,
    ModelSummary,
    Search,
    Timing,
    Trial,
)
from dropkit.report.text import to_text

__all__ = [
    "ColumnSummary",
    "DataSummary",
    "FitReport",
    "LearningCurves",
    "ModelSummary",
    "Search",
    "Timing",
    "Trial",
    "to_html",
    "to_text",
]
