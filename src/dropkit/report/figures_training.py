"""The figures about how the model came to be: the rate's trade-off and the learning curves."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dropkit.report.drawing import FIRST, INK, MUTED, SECOND, THIRD, canvas
from dropkit.report.making import best_at_each_rate
from dropkit.report.record import LearningCurves, Search


def trade_off(search: Search) -> Figure:
    """Validation loss, generalisation gap and epochs against the rate; the line joins the best trial at each rate."""
    figure, panels = canvas(5.6, rows=3, sharex=True, height_ratios=(1.35, 1, 1))
    line = best_at_each_rate(search)
    rates = [trial.rate for trial in line]
    chosen = search.trials[search.chosen]
    values = [
        ("validation loss\n[nats per row]", lambda t: t.validation_loss, FIRST),
        ("gap\n[nats per row]", lambda t: t.gap, SECOND),
        ("epochs until\nconverged", lambda t: t.epochs, THIRD),
    ]
    for axes, (label, value, colour) in zip(panels, values, strict=True):
        if len(search.trials) > len(line):
            x, y = [t.rate for t in search.trials], [value(t) for t in search.trials]
            axes.plot(x, y, ".", color=MUTED, alpha=0.45, markersize=4, label="other candidates")
        axes.plot(rates, [value(t) for t in line], "o-", color=colour, label="best at this rate")
        axes.plot(
            chosen.rate,
            value(chosen),
            "o",
            color=INK,
            markersize=9,
            fillstyle="none",
            markeredgewidth=1.4,
            label="chosen",
        )
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=colour == THIRD))
        keep_in_view(axes, [value(t) for t in line])
    panels[0].errorbar(
        rates,
        [t.validation_loss for t in line],
        [t.standard_error for t in line],
        fmt="none",
        color=FIRST,
        elinewidth=1,
        alpha=0.6,
    )
    keep_in_view(
        panels[0],
        [
            v
            for t in line
            for v in (t.validation_loss - t.standard_error, t.validation_loss + t.standard_error)
        ],
    )
    panels[1].axhline(0, color=MUTED, linewidth=0.8)
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("rate p, the chance to drop a hidden unit")
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0)
    figure.align_ylabels(panels)
    return figure


def keep_in_view(axes: Axes, values: list[float]) -> None:
    """Limit the axis to the line; a candidate that failed must not flatten the rest."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = 0.12 * (high - low) or max(abs(high) * 0.1, 0.1)
    axes.set_ylim(low - room, high + room)


def learning(curves: LearningCurves) -> Figure:
    """Training and validation loss by epoch; the space between them is the generalisation gap."""
    figure, (axes,) = canvas(3.5)
    epoch, training, validation = (
        np.array(v, dtype=float) for v in (curves.epoch, curves.training, curves.validation)
    )
    axes.fill_between(
        epoch, training, validation, color=SECOND, alpha=0.16, linewidth=0, label="generalisation gap"
    )
    axes.plot(epoch, validation, color=FIRST, label="validation")
    axes.plot(epoch, training, color=SECOND, linestyle=(0, (5, 2)), label="training")
    axes.axvline(curves.best_epoch, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    at_best = validation[int(np.argmin(np.abs(epoch - curves.best_epoch)))]
    axes.plot(
        curves.best_epoch, at_best, "o", color=INK, fillstyle="none", markersize=8, label="weights kept"
    )
    # the first epochs are far above all others; what matters is the rest
    late = np.concatenate([training[len(epoch) // 20 :], validation[len(epoch) // 20 :]])
    late = late[np.isfinite(late)] if np.isfinite(late).any() else np.zeros(1)
    low, high = float(late.min()), float(np.quantile(late, 0.98))
    axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.12 * (high - low or 1))
    axes.set(xlabel="epoch", ylabel="negative log-likelihood\n[nats per row]")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
