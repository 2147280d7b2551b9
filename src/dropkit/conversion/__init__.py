"""Existing models: every place where chance enters them, a changed copy, and the way back."""

from dropkit.conversion.converting import convert
from dropkit.conversion.inserting import insert
from dropkit.conversion.records import Change, Conversion, Finding, Left, Scan, Site
from dropkit.conversion.restoring import restore
from dropkit.conversion.scanning import scan

__all__ = ["Change", "Conversion", "Finding", "Left", "Scan", "Site", "convert", "insert", "restore", "scan"]
