"""The page of claims as plain data, and set: counts and table first, then a section for each claim."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from dropkit.claims.claim import Verdict
from dropkit.claims.record import Outcome, Results, Unfinished
from dropkit.claims.table import MARKS, measured, predicted, setting_in_words
from dropkit.report.blocks import Card, Plot, Tone
from dropkit.report.wording import count, listed

TONES: dict[Verdict, Tone] = {"holds": "good", "holds within": "fair", "does not hold here": "bad"}
MOST_NAMES = 8  # on a card; the table below has them all


@dataclass(frozen=True, slots=True)
class Badge:
    """A verdict as it is shown: with a mark, so that colour is not all that tells."""

    mark: str
    text: str
    tone: Tone


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One figure of a claim.

    Attributes:
        says: what is compared.
        predicted, measured: as texts.
        rule: what is asked of it.
        badge: its verdict; None where it is only shown.
        reason: how it misses, or how nearly it holds.
    """

    says: str
    predicted: str
    measured: str
    rule: str
    badge: Badge | None
    reason: str


@dataclass(frozen=True, slots=True)
class ClaimSection:
    """One claim.

    Attributes:
        name: for links.
        title: a few words.
        badge: its verdict, or that there is none.
        main: its row in the table.
        article, condition, prediction: as declared.
        line: why there is no verdict; "" where there is one.
        rows: its figures.
        plots: its charts.
        notes: pairs of a heading and sentences: data, setup, remarks, versions.
    """

    name: str
    title: str
    badge: Badge
    main: FigureRow
    article: str = ""
    condition: str = ""
    prediction: str = ""
    line: str = ""
    rows: tuple[FigureRow, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """The page, ready to be set; see `dropkit.report.shell.set_page`."""

    title: str
    kicker: str
    headline: str
    subline: str
    cards: tuple[Card, ...]
    sections: tuple[ClaimSection, ...]
    footer: str


def to_html(results: Results) -> str:
    """The whole page as one self-contained HTML file. The same record gives the same text."""
    from dropkit.claims.figures import draw
    from dropkit.report.shell import set_page

    drawn = {
        plot_name(outcome, i): draw(chart, plot_name(outcome, i))
        for outcome in results.outcomes
        for i, chart in enumerate(outcome.charts)
    }
    here = files(__package__)
    template, style = ((here / name).read_text(encoding="utf-8") for name in ("page.html", "page.css"))
    return set_page(template, "claims report", page_of(results), drawn, style)


def page_of(results: Results) -> Page:
    """Turn the results into a page."""
    sections = (*map(finished_section, results.outcomes), *map(unfinished_section, results.unfinished))
    versions = results.outcomes[0].versions if results.outcomes else ()
    return Page(
        title="The claims, predicted and measured",
        kicker=f"{count(len(sections), 'claim')} · {setting_in_words(results).replace(', ', ' · ')}",
        headline=headline(results),
        subline="What is said of dropout, each as an experiment: what a formula or the literature predicts, what was "
        "measured, and a verdict by a rule that was written down before the run.",
        cards=cards(results),
        sections=sections,
        footer=" · ".join(f"{name} {version}" for name, version in versions),
    )


def headline(results: Results) -> str:
    """How many hold, and which do not."""
    tried = len(results.outcomes)
    if not tried:
        return "No claim has been tried yet."
    fell = [one.title for one in results.outcomes if one.verdict == "does not hold here"]
    held = tried - len(fell)
    if not fell:
        return {1: "The claim holds here.", 2: "Both claims hold here."}.get(
            tried, f"All {tried} claims hold here."
        )
    if not held:
        return "The claim does not hold here." if tried == 1 else f"None of {tried} claims holds here."
    verbs = "holds" if held == 1 else "hold", "does" if len(fell) == 1 else "do"
    return f"{held} of {tried} claims {verbs[0]} here; {len(fell)} {verbs[1]} not."


def cards(results: Results) -> tuple[Card, ...]:
    """A card for each verdict, whether or not it was given, and for claims without one."""
    asked: tuple[tuple[str, Verdict], ...] = (
        ("hold", "holds"),
        ("hold within their margin", "holds within"),
        ("do not hold here", "does not hold here"),
    )
    found = []
    for label, verdict in asked:
        names = [one.name for one in results.outcomes if one.verdict == verdict]
        found.append(Card(label, str(len(names)), few(names), TONES[verdict] if names else "plain"))
    for status, label in (("failed", "failed to run"), ("not run", "not run, a package is missing")):
        names = [one.name for one in results.unfinished if one.status == status]
        if names:
            found.append(Card(label, str(len(names)), few(names), "plain"))
    return tuple(found)


def few(names: list[str]) -> str:
    """Names, cut off where they would fill the card."""
    shown = [name.replace("_", " ") for name in names]
    rest = len(shown) - MOST_NAMES
    return listed([*shown[:MOST_NAMES], f"{rest} more"] if rest > 0 else shown) or "none"


def finished_section(outcome: Outcome) -> ClaimSection:
    """A claim with its verdict."""
    rows = tuple(
        FigureRow(
            one.rule.says,
            predicted(one),
            measured(one),
            one.rule.in_words(),
            badge(one.verdict) if one.verdict else None,
            one.reason,
        )
        for one in outcome.figures
    )
    notes = (
        ("Data", (outcome.data,)),
        ("Setup", (outcome.setup.replace("`", ""),)),
        ("Remarks", outcome.remarks),
    )
    return ClaimSection(
        outcome.name, outcome.title, badge(outcome.verdict), rows[outcome.figures.index(outcome.deciding)],
        outcome.article, outcome.condition, outcome.prediction, "", rows,
        tuple(Plot(plot_name(outcome, i), c.caption, c.caption) for i, c in enumerate(outcome.charts)),
        tuple((head, said) for head, said in notes if any(said)),
    )  # fmt: skip


def unfinished_section(left: Unfinished) -> ClaimSection:
    """A claim without a verdict, and why."""
    nothing = FigureRow("", "", "", "", None, "")
    return ClaimSection(left.name, left.title, Badge("–", left.status, "plain"), nothing, line=left.line)


def badge(verdict: Verdict) -> Badge:
    """A verdict as it is shown."""
    return Badge(MARKS[verdict], verdict, TONES[verdict])


def plot_name(outcome: Outcome, place: int) -> str:
    """One name for each figure on the page."""
    return f"{outcome.name}-{outcome.charts[place].name}".replace("_", "-")
