"""Layers, one file for each thing that can be forgotten."""

from dropkit.nn.alpha import AlphaDropout, FeatureAlphaDropout
from dropkit.nn.features import Dropout
from dropkit.nn.gaussian import GaussianDropout
from dropkit.nn.layer import name_sites

__all__ = ["AlphaDropout", "Dropout", "FeatureAlphaDropout", "GaussianDropout", "name_sites"]
