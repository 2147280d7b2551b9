"""Instruments: what dropout does to this model on these data, as numbers with error bars."""

from dropkit.measure.attenuation import Attenuation, attenuation
from dropkit.measure.capacity import Capacity, capacity
from dropkit.measure.coadaptation import Coadaptation, SiteAblation, coadaptation
from dropkit.measure.flatness import Flatness, flatness
from dropkit.measure.generalization_gap import GeneralizationGap, generalization_gap
from dropkit.measure.gradient_bias import GradientBias, LayerBias, gradient_bias
from dropkit.measure.gradient_noise import GradientNoise, LayerNoise, gradient_noise
from dropkit.measure.grouping import Grouping, Pair, grouping
from dropkit.measure.penalty import Penalty, SitePenalty, penalty
from dropkit.measure.records import Measurement
from dropkit.measure.stability import Stability, stability
from dropkit.measure.variance_law import VarianceLaw, variance_law
from dropkit.measure.variance_shift import NormShift, VarianceShift, variance_shift

__all__ = [
    "Attenuation",
    "Capacity",
    "Coadaptation",
    "Flatness",
    "GeneralizationGap",
    "GradientBias",
    "GradientNoise",
    "Grouping",
    "LayerBias",
    "LayerNoise",
    "Measurement",
    "NormShift",
    "Pair",
    "Penalty",
    "SiteAblation",
    "SitePenalty",
    "Stability",
    "VarianceLaw",
    "VarianceShift",
    "attenuation",
    "capacity",
    "coadaptation",
    "flatness",
    "generalization_gap",
    "gradient_bias",
    "gradient_noise",
    "grouping",
    "penalty",
    "stability",
    "variance_law",
    "variance_shift",
]
