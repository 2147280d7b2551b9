"""The table as one picture: how many times faster ours is, with intervals and targets, as an SVG that stands alone."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dropkit.bench.record import Bench, Result
from dropkit.report.drawing import FIRST, INK, MUTED, SECOND, canvas, drawing_style, to_svg

NAME = "bench"
# A page brings colours of its own; a file has to bring these.
COLOURS = (
    "<style>svg { --ink: #1b1f24; --muted: #6a737d; --grid: #e4e7eb; --card: #ffffff; --first: #2563a8; "
    "--second: #b3541e; --third: #4c7a34; background: #ffffff } "
    "@media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --muted: #9aa4ae; --grid: #2f363d; "
    "--card: #16191d; --first: #6fb1f5; --second: #f0965a; --third: #9ccc7a; background: #16191d } }</style>"
)


def target_ratio(result: Result) -> float | None:
    """The target as peer time / ours; None where it is not one of time alone."""
    if result.measure == "times faster":
        return result.target
    return 1 / result.target if result.measure == "of its time" else None


def draw(bench: Bench) -> Figure:
    """One line for each timed result, on a logarithmic axis; inside `drawing_style`."""
    timed = [(result, result.comparison) for result in bench.results if result.comparison is not None]
    figure, (axes,) = canvas(0.9 + 0.19 * max(len(timed), 1))
    for y, (result, times) in enumerate(timed):
        ratio, colour = times.ratio, FIRST if result.reached else SECOND
        label = "reached" if result.reached else "not reached"
        axes.plot([ratio.low, ratio.high], [y, y], color=colour, solid_capstyle="butt")
        axes.plot(ratio.middle, y, "o" if result.quiet else "x", color=colour, label=label)
        if (target := target_ratio(result)) is not None:
            axes.plot(target, y, "|", color=INK, markersize=9, label="target")
    axes.axvline(1, color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    names = [f"{result.name}, {result.threads} thr" for result, _ in timed]
    axes.set_yticks(range(len(timed)), names)
    axes.set_ylim(max(len(timed), 1) - 0.5, -0.5)
    axes.set_xlabel("time of the peer / time of dropkit")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(
            unique.values(), unique.keys(), loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(unique)
        )
    return figure


def figure_svg(bench: Bench) -> str:
    """The picture as the text of an SVG file."""
    with drawing_style(NAME):
        inner = to_svg(draw(bench), NAME, "How many times faster dropkit is than each peer, and the targets.")
    opening, _, rest = inner.partition(">")
    return f'{opening} xmlns="http://www.w3.org/2000/svg">{COLOURS}{rest}\n'
