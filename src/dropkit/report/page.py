"""The page as plain data: what is said, in which order, beside which figure. Text and HTML are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dropkit.evaluation import RegressionEvaluation
from dropkit.report import making, quality, verdicts
from dropkit.report.blocks import Card, Section
from dropkit.report.record import FitReport
from dropkit.report.wording import count, file_name


@dataclass(frozen=True, slots=True)
class Page:
    """A report, ready to be set.

    Attributes:
        title: of the document.
        kicker: the line above the headline: file, rows, task.
        headline: what was learned and how good it is, in one sentence.
        subline: how sure, and against what.
        cards: the verdicts.
        sections: in the order a practitioner asks.
        footer: version and seed.
        task: for what depends on it.
    """

    title: str
    kicker: str
    headline: str
    subline: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    footer: str
    task: Literal["regression", "classification"]


def page_of(report: FitReport) -> Page:
    """Turn a record into a page; parts the record does not have are left out."""
    data, model = report.data, report.model
    sections = (
        quality.comparison(report),
        quality.predictions(report),
        quality.calibration(report),
        quality.error_against_spread(report),
        quality.least_certain(report),
        making.search(report),
        making.learning(report),
        making.members(report),
        making.data(report),
        making.reproduce(report),
    )
    return Page(
        title=f"{data.target} from {file_name(data.source)}",
        kicker=f"{file_name(data.source)} · {count(data.rows, 'row')} · {data.task}",
        headline=verdicts.headline(report),
        subline=verdicts.subline(report),
        cards=verdicts.cards(report),
        sections=tuple(section for section in sections if section is not None),
        footer=" · ".join(
            [f"{name} {version}" for name, version in model.versions[:1]] + [f"seed {model.seed}"]
        ),
        task="regression" if isinstance(report.held_out, RegressionEvaluation) else "classification",
    )
