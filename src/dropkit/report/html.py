"""The report as one self-contained HTML file: nothing is fetched, and everything from the user's table is escaped."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from matplotlib.figure import Figure

from dropkit.errors import OptionError
from dropkit.evaluation import ClassificationEvaluation, RegressionEvaluation
from dropkit.report import figures, figures_training
from dropkit.report.drawing import drawing_style, to_svg
from dropkit.report.page import page_of
from dropkit.report.quality import labels
from dropkit.report.record import FitReport
from dropkit.report.shell import set_page
from dropkit.report.verdicts import MAIN
from dropkit.report.wording import printable, short


def to_html(report: FitReport) -> str:
    """The whole page. The same record gives the same text.

    It carries a policy of its own: no address may be contacted, and no script runs but the page's, by its hash.
    """
    page = page_of(report)
    drawn = {
        s.plot.name: draw(s.plot.name, report, s.plot.label) for s in page.sections if s.plot is not None
    }
    template = (files(__package__) / "template.html").read_text(encoding="utf-8")
    return set_page(template, "fit report", page, drawn)


def draw(name: str, report: FitReport, label: str) -> str:
    """One figure of the page as SVG.

    Args:
        name: as a section's plot is called.
        report: the record.
        label: the figure in words.

    Raises:
        OptionError: the record has no such figure.
    """
    makers = plots(report)
    if name not in makers:
        raise OptionError(f"{name!r} was given; the figures of this report are {sorted(makers)}.")
    with drawing_style(name):
        return to_svg(makers[name](), name, label)


def plots(report: FitReport) -> dict[str, Callable[[], Figure]]:
    """Every figure this record can show, by name."""
    held, target = report.held_out, printable(report.data.target)
    found: dict[str, Callable[[], Figure]] = {}
    if isinstance(held, RegressionEvaluation):
        found["predicted"] = lambda: figures.predicted_against_true(held.points, target, held.level)
        found["coverage"] = lambda: figures.coverage(held.coverage, held.rows)
        error = f"root mean squared error [{short(target)}]"
    else:
        assert isinstance(held, ClassificationEvaluation)
        found["confusion"] = lambda: figures.confusion(held.confusion, held.classes)
        found["reliability"] = lambda: figures.reliability(held.reliability)
        error = "share of wrong rows"
    share = report.data.task == "classification"
    found["error-spread"] = lambda: figures.error_against_spread(held.spread, error, share=share)
    if (comparison := report.comparison) is not None:
        found["models"] = lambda: figures.models(comparison, MAIN[report.data.task], labels(report))
    if (search := report.search) is not None:
        found["trade-off"] = lambda: figures_training.trade_off(search)
    if (curves := report.curves) is not None:
        found["learning"] = lambda: figures_training.learning(curves)
    if (members := report.members) is not None and members.spread[-1] > 0:
        unit = target if members.quantity == "standard deviation" else "nats"
        found["members"] = lambda: figures.members(members, unit)
    return found
