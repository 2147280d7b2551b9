"""The contract any dropout should keep, as checks that run on anybody's layer or function."""

from dropkit.testing.checking import CHECKS, check_dropout
from dropkit.testing.registry import Check
from dropkit.testing.report import Outcome, Report, compare

__all__ = ["CHECKS", "Check", "Outcome", "Report", "check_dropout", "compare"]
