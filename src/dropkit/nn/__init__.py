"""Layers, one file for each thing that can be forgotten."""

from dropkit.nn import schedules
from dropkit.nn.alpha import AlphaDropout, FeatureAlphaDropout
from dropkit.nn.features import Dropout
from dropkit.nn.gaussian import ExactDropout, GaussianDropout, UniformDropout
from dropkit.nn.layer import name_sites
from dropkit.nn.schedules import Schedule

__all__ = [
    "AlphaDropout",
    "Dropout",
    "ExactDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "Schedule",
    "UniformDropout",
    "name_sites",
    "schedules",
]
