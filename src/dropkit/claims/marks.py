"""What the charts of claims are drawn with: colours and markers, errors, logarithmic ticks, the legend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from dropkit.claims.claim import Series
from dropkit.report.drawing import FIRST, FOURTH, INK, MUTED, SECOND, THIRD
from dropkit.report.wording import printable

COLOURS, MARKERS = (FIRST, SECOND, THIRD, INK, MUTED, FOURTH), ("o", "s", "D", "^", "v", "P")
UNPAIRED = (MUTED, INK, THIRD, FOURTH)  # of predictions that belong to no series
DASHES = (0, (4, 3))
MOST_TICKS = 8  # places on a logarithmic axis that are named one by one
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def place_legend(axes: Axes, names: Sequence[str]) -> None:
    """The legend above the drawing, in the order of the series, the level last."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [
        *dict.fromkeys(text for text in names if text in found),
        *(text for text in found if text not in names),
    ]
    widest = max(len(line) for text in order for line in text.split("\n"))
    axes.legend(
        [found[text] for text in order], order, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.1,
        ncols=1 if widest > 26 else min(len(order), 2 if widest > 14 else 3),
    )  # fmt: skip


def looks_of(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Colour and marker of each series. What is predicted has the colour of what is measured under the same number."""
    seen = [one for one in series if one.style != "predicted"]
    lines = [one for one in series if one.style == "predicted"]
    paired = len(lines) > 1 and len(lines) <= len(seen)
    found = []
    for one in series:
        if one.style == "predicted" and not paired:
            place = lines.index(one)
            found.append((UNPAIRED[place % len(UNPAIRED)], ""))
        else:
            place = (lines if one.style == "predicted" else seen).index(one)
            found.append((COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]))
    return found


def half_widths(series: Series, *, log: bool) -> Any:
    """Lower and upper half widths; on a logarithmic axis no bar reaches 0, but it may leave the drawing below."""
    if not series.error:
        return None
    error = np.nan_to_num(np.abs(np.array(series.error, float)), nan=0.0, posinf=0.0)
    lower = np.minimum(error, (1 - 1e-6) * np.abs(finite_or_gap(series.y))) if log else error
    return np.stack([np.nan_to_num(lower), error])


def finite_or_gap(values: Sequence[float]) -> NDArray[np.float64]:
    """Values with a gap where there is no number."""
    found = np.array(values, float)
    return np.where(np.isfinite(found), found, np.nan)


def lowest_end(series: Sequence[Series]) -> float | None:
    """The lowest point or bar's end that a logarithmic axis should show: bars that nearly reach 0 do not count."""
    points = [
        (y, error) for one in series for y, error in zip(one.y, one.error or [0.0] * len(one.y), strict=True)
    ]
    points = [(y, error) for y, error in points if math.isfinite(y) and y > 0]
    return min((y - error if 0 <= error < 0.8 * y else y for y, error in points), default=None)


def log_axis(axes: Axes, axis: Axis, values: Sequence[float], *, named: bool) -> None:
    """A logarithmic axis whose ticks are plain text, since a page has no fonts for mathematics.

    Args:
        axes: of the drawing.
        axis: one of its two.
        values: what is drawn along it.
        named: whether few different values that are short to write are ticks themselves.
    """
    positive = sorted({value for value in values if math.isfinite(value) and value > 0})
    if not positive:
        return
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    apart = all(after / before > 1.35 for before, after in pairwise(positive))
    short = all(math.isclose(float(f"{value:.2g}"), value, rel_tol=1e-9) for value in positive)
    if named and len(positive) <= MOST_TICKS and apart and short:
        axis.set_major_locator(FixedLocator(positive))
    else:
        narrow = positive[-1] / positive[0] < 100
        axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def power(value: float) -> str:
    """A tick of a logarithmic axis: 0.01, 300, 5·10⁻⁶."""
    if not math.isfinite(value) or value <= 0:
        return ""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -4 < exponent < 5:
        return f"{float(f'{value:.4g}'):,.10g}".replace(",", "\u202f")
    lead = value / 10**exponent
    return (f"{lead:.3g}·" if abs(lead - 1) > 1e-6 else "") + "10" + str(exponent).translate(SUPERSCRIPTS)


def legend_text(text: str) -> str:
    """A name for the legend, in lines that fit."""
    return textwrap.fill(printable(text), 48)
