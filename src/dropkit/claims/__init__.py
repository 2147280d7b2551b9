"""The article's claims as experiments: what is predicted, what was measured, and the verdict."""

from dropkit.claims.chapters import CLAIMS
from dropkit.claims.claim import Chart, Claim, Findings, Judged, Measured, Rule, Series, Setting, judge

__all__ = ["CLAIMS", "Chart", "Claim", "Findings", "Judged", "Measured", "Rule", "Series", "Setting", "judge"]
