"""Layers, one file for each thing that can be forgotten."""

from dropkit.nn.features import Dropout
from dropkit.nn.layer import name_sites

__all__ = ["Dropout", "name_sites"]
