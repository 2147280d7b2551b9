"""Charts with many names along x, drawn on their side, so that each name has a line to itself."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dropkit.claims.claim import Chart, Series
from dropkit.claims.marks import (
    DASHES,
    finite_or_gap,
    half_widths,
    legend_text,
    log_axis,
    looks_of,
    lowest_end,
    place_legend,
)
from dropkit.report.drawing import MUTED, canvas
from dropkit.report.figures import few_ticks
from dropkit.report.wording import printable, short

MOST_UPRIGHT = 8  # names; more are set one below the other
LINE = 0.19  # inches for each name
SPREAD = 0.5  # of a line, over which the series of one name lie


def figure_of_names(chart: Chart) -> Figure:
    """Names from top to bottom, values from left to right; the series of one name lie close together."""
    names = [legend_text(series.name) for series in chart.series]
    figure, (axes,) = canvas(1.5 + LINE * len(chart.x_names) + 0.12 * len(names))
    drawn = len(chart.series)
    for place, (series, text, look) in enumerate(
        zip(chart.series, names, looks_of(chart.series), strict=True)
    ):
        draw_values(axes, series, text, look, SPREAD * (place - (drawn - 1) / 2) / drawn, log=chart.y_log)
    if chart.level is not None:
        said = legend_text(chart.level_name) or None
        axes.axvline(chart.level, color=MUTED, linewidth=1, linestyle=DASHES, label=said)
    few_ticks(axes)
    if chart.y_log:
        log_axis(axes, axes.xaxis, [y for series in chart.series for y in series.y], named=False)
        if (lowest := lowest_end(chart.series)) is not None:
            axes.set_xlim(left=lowest / 1.6)
    axes.set_yticks(range(len(chart.x_names)), [short(name, 30) for name in chart.x_names])
    axes.set_ylim(len(chart.x_names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(textwrap.fill(printable(chart.y_label), 52))
    axes.set_ylabel(textwrap.fill(printable(chart.x_label), 38))
    if len(names) > 1 or chart.level_name:
        place_legend(axes, names)
    return figure


def draw_values(
    axes: Axes, series: Series, text: str, look: tuple[str, str], shift: float, *, log: bool
) -> None:
    """One series: bars, or points with their errors; what is predicted is a stroke across the line."""
    colour, marker = look
    places, values = np.array(series.x, float) + shift, finite_or_gap(series.y)
    if series.style == "bars":
        axes.barh(places, values, height=SPREAD, color=colour, alpha=0.55, label=text, zorder=2)
    elif series.style == "predicted":
        axes.plot(values, places, "|", color=colour, markersize=9, label=text, zorder=2.5)
    if series.style != "predicted" and (series.style != "bars" or series.error):
        axes.errorbar(
            values, places, xerr=half_widths(series, log=log), color=colour, elinewidth=1.1, zorder=3,
            linestyle="none", marker="" if series.style == "bars" else marker, markersize=3.6,
            label=None if series.style == "bars" else text,
        )  # fmt: skip
