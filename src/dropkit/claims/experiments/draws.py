"""Figures of repeated draws beside their laws, as numbers and as series of a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from dropkit.claims.claim import Measured, Series

BOUND = 4.0  # standard errors: some 50 figures of one chance in 16 000 each give one false alarm in 300 runs


def mean_figure(draws: Tensor, predicted: float, unit: float = 1.0) -> Measured:
    """The mean over (N,) draws, divided by `unit`."""
    return Measured(
        float(draws.mean()) / unit, float(draws.std()) / len(draws) ** 0.5 / unit, predicted / unit
    )


def variance_figure(draws: Tensor, predicted: float, unit: float = 1.0) -> Measured:
    """The variance over (N,) draws, with the error that the fourth moment gives, divided by `unit`."""
    squares = (draws - draws.mean()).square()
    value = float(squares.sum()) / (len(draws) - 1)
    return Measured(value / unit, float(squares.std()) / len(draws) ** 0.5 / unit, predicted / unit)


def difference(a: Measured, b: Measured) -> Measured:
    """a - b of two figures whose errors are independent."""
    return Measured(a.value - b.value, (a.standard_error**2 + b.standard_error**2) ** 0.5)


def measured_series(
    name: str,
    x: Sequence[float],
    found: Sequence[Measured],
    style: Literal["measured", "bars", "points"] = "points",
) -> Series:
    """Figures with bars of two standard errors."""
    bars = tuple(2 * one.standard_error for one in found)
    return Series(name, tuple(x), tuple(one.value for one in found), bars, style=style)


def beside_law(name: str, found: Mapping[float, Measured], law: str) -> tuple[Series, Series]:
    """The law of figures as a line, and the figures as points: {x: figure}."""
    line = Series(law, tuple(found), tuple(one.predicted or 0.0 for one in found.values()), style="predicted")
    return line, measured_series(name, tuple(found), tuple(found.values()))
