"""A claim's charts, drawn in the colours of the page."""

from __future__ import annotations

import math
import textwrap
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dropkit.claims.claim import Chart, Series
from dropkit.claims.marks import (
    DASHES,
    MOST_TICKS,
    finite_or_gap,
    half_widths,
    legend_text,
    log_axis,
    looks_of,
    lowest_end,
    place_legend,
)
from dropkit.claims.sideways import MOST_UPRIGHT, figure_of_names
from dropkit.report.drawing import MUTED, canvas, drawing_style, to_svg
from dropkit.report.figures import few_ticks
from dropkit.report.wording import printable

CROWDED = 25  # points on a line, from which markers get small


def draw(chart: Chart, name: str) -> str:
    """A chart as SVG for a page.

    Args:
        chart: plain data.
        name: of the figure on its page; letters, digits and dashes.
    """
    with drawing_style(name):
        return to_svg(figure_of(chart), name, chart.caption)


def figure_of(chart: Chart) -> Figure:
    """A chart as a figure of matplotlib, inside `drawing_style`."""
    if len(chart.x_names) > MOST_UPRIGHT:
        return figure_of_names(chart)
    names = [legend_text(series.name) for series in chart.series]
    lines = sum(1 + text.count("\n") for text in names) + (chart.level is not None)
    turned = sum(map(len, chart.x_names)) > 40
    figure, (axes,) = canvas(3.5 + 0.12 * max(lines - 3, 0) + 0.45 * turned)
    bars = [series for series in chart.series if series.style == "bars"]
    for series, text, (colour, marker) in zip(chart.series, names, looks_of(chart.series), strict=True):
        if series.style == "bars":
            draw_bars(axes, series, text, colour, bars.index(series), len(bars), log=chart.y_log)
        else:
            draw_line(axes, series, text, colour, marker, log=chart.y_log)
    if chart.level is not None:
        said = legend_text(chart.level_name) or None
        axes.axhline(chart.level, color=MUTED, linewidth=1, linestyle=DASHES, label=said)
    few_ticks(axes)
    place_x(axes, chart, turned=turned)
    if chart.y_log:
        log_axis(axes, axes.yaxis, [y for series in chart.series for y in series.y], named=False)
        if (lowest := lowest_end(chart.series)) is not None:
            axes.set_ylim(bottom=lowest / 1.6)
    elif bars:
        axes.axhline(0, color=MUTED, linewidth=0.7)
    axes.set_xlabel(textwrap.fill(printable(chart.x_label), 52))
    axes.set_ylabel(textwrap.fill(printable(chart.y_label), 38))
    if len(names) > 1 or chart.level_name:
        place_legend(axes, names)
    return figure


def place_x(axes: Axes, chart: Chart, *, turned: bool) -> None:
    """The x axis: names, a logarithm, or ticks where there are few places to name."""
    places = sorted({x for series in chart.series for x in series.x if math.isfinite(x)})
    if chart.x_names:
        shown = [printable(text) for text in chart.x_names]
        axes.set_xticks(
            range(len(shown)), shown, rotation=30 if turned else 0, ha="right" if turned else "center"
        )
        axes.set_xlim(-0.6, len(shown) - 0.4)
        axes.grid(axis="x", visible=False)
    elif chart.x_log:
        log_axis(axes, axes.xaxis, places, named=True)
    elif 2 <= len(places) <= MOST_TICKS + 1:
        least = min(after - before for before, after in pairwise(places))
        if least > 0.09 * (places[-1] - places[0]):
            axes.set_xticks(places)


def draw_line(axes: Axes, series: Series, text: str, colour: str, marker: str, *, log: bool) -> None:
    """Points joined by a line, points alone, or a line alone, with bars where there are errors."""
    x, y = np.array(series.x, float), finite_or_gap(series.y)
    if series.style == "predicted":
        axes.plot(x, y, color=colour, linestyle=DASHES, linewidth=1.4, label=text, zorder=2.5)
        return
    size = 2.6 if len(x) > CROWDED else 4.2
    line = "none" if series.style == "points" else "-"
    look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": size, "linestyle": line}
    error = half_widths(series, log=log)
    axes.errorbar(x, y, error, elinewidth=1.1, linewidth=1.5, label=text, zorder=3, **look)


def draw_bars(axes: Axes, series: Series, text: str, colour: str, place: int, of: int, *, log: bool) -> None:
    """Bars side by side, with their errors."""
    width = 0.76 / of
    x = np.array(series.x, float) + (place - (of - 1) / 2) * width
    y = finite_or_gap(series.y)
    axes.bar(x, y, width=0.92 * width, color=colour, alpha=0.55, label=text, zorder=2)
    if series.error:
        axes.errorbar(x, y, half_widths(series, log=log), fmt="none", ecolor=colour, elinewidth=1.3, zorder=3)
