"""The article's claims as experiments: what is predicted, what was measured, and the verdict."""

from dropkit.claims.chapters import CLAIMS
from dropkit.claims.claim import Chart, Claim, Findings, Judged, Measured, Rule, Series, Setting, judge
from dropkit.claims.fetching import fetch
from dropkit.claims.record import Outcome, Results, Unfinished
from dropkit.claims.runner import choose, run_claims
from dropkit.claims.table import to_text

__all__ = [
    "CLAIMS",
    "Chart",
    "Claim",
    "Findings",
    "Judged",
    "Measured",
    "Outcome",
    "Results",
    "Rule",
    "Series",
    "Setting",
    "Unfinished",
    "choose",
    "fetch",
    "judge",
    "run_claims",
    "to_text",
]
