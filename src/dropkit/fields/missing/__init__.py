"""Missing data: the three mechanisms, a layer that prepares for each, and a check of what a table looks like."""

from dropkit.fields.missing.check import ColumnCheck, LittleTest, MissingCheck, check_missing
from dropkit.fields.missing.layer import MissingInputs
from dropkit.fields.missing.mechanisms import Mechanism, mar, mcar, self_masking

__all__ = [
    "ColumnCheck",
    "LittleTest",
    "Mechanism",
    "MissingCheck",
    "MissingInputs",
    "check_missing",
    "mar",
    "mcar",
    "self_masking",
]
