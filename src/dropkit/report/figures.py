"""The figures about held-out rows: predictions, calibration, error against spread, members, the other models."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from dropkit.evaluation import Comparison, SpreadByMembers
from dropkit.evaluation.held_out import evenly_spaced
from dropkit.evaluation.measures import share_error
from dropkit.evaluation.records import Coverage, ErrorBySpread, RegressionPoints, Reliability
from dropkit.report.drawing import FIRST, GRID, INK, MUTED, PAPER, SECOND, canvas
from dropkit.report.wording import short

BARS_DRAWN, POINTS_DRAWN, CLASSES_DRAWN = 160, 800, 20


def predicted_against_true(points: RegressionPoints, target: str, level: float) -> Figure:
    """Predicted value and interval against what happened; rows outside their interval stand out."""
    figure, (axes,) = canvas(4.2)
    true, mean, lower, upper = (np.array(v) for v in (points.true, points.mean, points.lower, points.upper))
    kept = evenly_spaced(len(true), POINTS_DRAWN)
    barred = evenly_spaced(len(true), BARS_DRAWN)
    missed = (true < lower) | (true > upper)
    drawn = np.concatenate([true[kept], mean[kept], lower[barred], upper[barred]])
    drawn = drawn[np.isfinite(drawn)]
    low, high = float(np.min(drawn)), float(np.max(drawn))
    axes.plot(
        [low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="predicted = true"
    )
    for inside, colour, label in ((True, FIRST, "inside"), (False, SECOND, "outside")):
        bars = barred[missed[barred] != inside]
        dots = kept[missed[kept] != inside]
        axes.vlines(true[bars], lower[bars], upper[bars], color=colour, alpha=0.35, linewidth=1)
        marker = "o" if inside else "D"
        axes.plot(
            true[dots],
            mean[dots],
            marker,
            color=colour,
            markersize=3.4,
            alpha=0.85,
            label=f"{label} {100 * level:g}\u202f%",
        )
    axes.set(xlabel=f"true {short(target, 30)}", ylabel=f"predicted {short(target, 30)}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)
    few_ticks(axes)
    return figure


def confusion(counts: tuple[tuple[int, ...], ...], classes: tuple[str, ...]) -> Figure:
    """How many rows of each class were taken for which; the colour is the share within the true class."""
    table = np.array(counts)
    order = np.sort(np.argsort(-table.sum(axis=1), kind="stable")[:CLASSES_DRAWN])
    table = table[np.ix_(order, order)]
    names = [short(classes[i], 14) for i in order]
    size = len(names)
    figure, (axes,) = canvas(4.6 if size > 8 else 3.8 if size > 3 else 3.2)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    font = 9.5 if size <= 8 else 8 if size <= 12 else 6
    for i in range(size):
        for j in range(size):
            colour = FIRST if i == j else SECOND
            # opacity, not a colour scale, so that the cell fits a light and a dark page
            axes.add_patch(
                Rectangle((j, i), 1, 1, facecolor=colour, alpha=0.06 + 0.84 * share[i, j], edgecolor="none")
            )
            text = PAPER if share[i, j] > 0.5 else INK if table[i, j] else MUTED
            axes.text(j + 0.5, i + 0.5, f"{table[i, j]}", ha="center", va="center", color=text, fontsize=font)
    for k in range(size + 1):
        axes.plot([k, k], [0, size], color=PAPER, linewidth=1.5)
        axes.plot([0, size], [k, k], color=PAPER, linewidth=1.5)
    axes.set(xlim=(0, size), ylim=(size, 0), xlabel="predicted class", ylabel="true class")
    turned = max(len(name) for name in names) * size > 42
    axes.set_xticks(
        np.arange(size) + 0.5, names, rotation=45 if turned else 0, ha="right" if turned else "center"
    )
    axes.set_yticks(np.arange(size) + 0.5, names)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def coverage(table: Coverage, rows: int) -> Figure:
    """Observed against nominal coverage, with the band that chance alone explains."""
    figure, (axes,) = canvas(3.6)
    grid = np.linspace(0, 1, 101)
    chance = 2 * np.sqrt(grid * (1 - grid) / rows)
    axes.fill_between(
        grid,
        np.clip(grid - chance, 0, 1),
        np.clip(grid + chance, 0, 1),
        color=GRID,
        linewidth=0,
        label="chance, 2 s.e.",
    )
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(table.level, table.before, "s--", color=SECOND, label="before", markersize=4)
    axes.plot(table.level, table.after, "o-", color=FIRST, label="after (conformal)")
    axes.set(
        xlabel="nominal level of the interval", ylabel="share of rows inside", xlim=(0, 1), ylim=(0, 1.02)
    )
    percent(axes, "xy")
    axes.legend(loc="upper left")
    return figure


def reliability(table: Reliability) -> Figure:
    """Accuracy against confidence before and after the temperature, and how many rows have which confidence."""
    figure, (axes, counts) = canvas(4.4, rows=2, sharex=True, height_ratios=(3.2, 1))
    edges = [b for part in (table.before, table.after) for b in part]
    least = min((b.lower for b in edges), default=0.0)
    axes.plot(
        [least, 1], [least, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="confidence = accuracy"
    )
    for bins, colour, line, label in (
        (table.before, SECOND, "s--", f"before (ECE {table.error_before:.3f})"),
        (table.after, FIRST, "o-", f"after (ECE {table.error_after:.3f})"),
    ):
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        errors = [share_error(round(b.accuracy * b.count), b.count) for b in bins]
        axes.errorbar(x, y, errors, fmt=line, color=colour, elinewidth=1, label=label, markersize=4)
    axes.set(ylabel="accuracy", ylim=(-0.03, 1.05))
    percent(axes, "y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for b in table.after:
        counts.bar((b.lower + b.upper) / 2, b.count, width=0.085, color=FIRST, alpha=0.75)
    counts.set(xlabel="confidence in the predicted class", ylabel="rows", xlim=(least - 0.02, 1.02))
    counts.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    percent(counts, "x")
    return figure


def error_against_spread(table: ErrorBySpread, ylabel: str, share: bool) -> Figure:
    """Error found beside the error foreseen, in groups of rows from the most to the least certain.

    Args:
        table: the groups.
        ylabel: the error, with unit.
        share: whether it is a share of rows, shown as percent.
    """
    figure, (axes,) = canvas(3.6)
    place = np.arange(1, len(table.bins) + 1)
    found = np.array([b.observed for b in table.bins])
    error = 2 * np.array([b.standard_error for b in table.bins])
    axes.bar(place, found, width=0.72, color=FIRST, alpha=0.35, label="found")
    # a share or a root mean square is not below 0, nor is its bar's end
    axes.errorbar(
        place,
        found,
        [np.minimum(error, found), error],
        fmt="none",
        color=FIRST,
        elinewidth=1.3,
        label="± 2 s.e.",
    )
    foreseen = [b.expected for b in table.bins]
    axes.plot(place, foreseen, "D-", color=SECOND, linewidth=1, markersize=4.5, label="foreseen")
    few_ticks(axes)
    axes.set_xticks(place)
    axes.set_xlim(0.3, len(place) + 0.7)
    axes.set(xlabel="groups of rows, most certain → least certain", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    if share:
        percent(axes, "y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def members(curve: SpreadByMembers, unit: str) -> Figure:
    """Mean spread against the size of the committee, with what one committee of that size can be off."""
    figure, (axes,) = canvas(3.2)
    x, y, error = (np.array(v) for v in (curve.members, curve.spread, curve.monte_carlo_error))
    axes.axhline(y[-1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.fill_between(
        x, y - error, y + error, color=FIRST, alpha=0.16, linewidth=0, label="± Monte Carlo error"
    )
    axes.plot(x, y, "o-", color=FIRST, label=f"mean {curve.quantity}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(m) for m in x])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="members asked", ylabel=f"mean spread [{short(unit, 30)}]")
    low, high = (
        min(0.9 * float(y[-1]), float((y - error).min())),
        max(1.1 * float(y[-1]), float((y + error).max())),
    )
    axes.set_ylim(low, high if high > low else low + 1)  # without dropout all members are one
    axes.legend(loc="lower right")
    return figure


def models(comparison: Comparison, measures: tuple[str, ...], labels: dict[str, str]) -> Figure:
    """Measures of every model that looks at its rows, with standard errors, side by side."""
    shown = [model for model in comparison.models if not model.constant]
    names = [short(model.name, 22) for model in shown]
    figure, panels = canvas(0.9 + 0.32 * len(names), columns=len(measures), sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        found = [next(s for s in model.scores if s.name == measure) for model in shown]
        for place, score in enumerate(found):
            colour = FIRST if place == 0 else INK
            axes.errorbar(
                score.value, place, xerr=score.standard_error, fmt="o", color=colour, elinewidth=1.4
            )
        axes.axvline(found[0].value, color=FIRST, linewidth=0.8, alpha=0.6, linestyle=(0, (2, 2)))
        axes.set(xlabel=labels[measure])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if measure == "accuracy":
            percent(axes, "x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def few_ticks(axes: Axes) -> None:
    """Five ticks or so, and 1e6 beside the axis instead of seven digits at each."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        formatter = axis.get_major_formatter()
        if isinstance(formatter, ScalarFormatter):
            formatter.set_powerlimits((-4, 5))


def percent(axes: Axes, which: str) -> None:
    """Shares written as percent."""
    for axis in which:
        (axes.xaxis if axis == "x" else axes.yaxis).set_major_formatter(
            lambda share, _: f"{100 * share:.4g}\u202f%"
        )
