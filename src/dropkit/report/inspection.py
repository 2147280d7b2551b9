"""An inspection as one self-contained HTML page: what to change, site by site, what each instrument said."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from dropkit.measure.advice import CLEAR, MODEL_RULES, SITE_RULES, learned_something
from dropkit.measure.inspected import Inspection, SiteInspection
from dropkit.measure.inspection_text import summary, verdict
from dropkit.measure.site_figures import Estimate
from dropkit.report.blocks import Card, Plot, Section, Table
from dropkit.report.drawing import drawing_style, to_svg
from dropkit.report.figures_inspection import drawn_sites, sites_figure
from dropkit.report.shell import set_page
from dropkit.report.wording import count, cut, file_name, measured, number, percent, quoted

MISSING = "–"
MOST_ROWS = 40  # sites in the table


@dataclass(frozen=True, slots=True)
class InspectionPage:
    """What the shell sets: see `dropkit.report.shell.set_page`."""

    title: str
    kicker: str
    headline: str
    subline: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    footer: str


def to_html(inspection: Inspection, *, source: str = "", command: str = "") -> str:
    """The whole page. Equal arguments give equal text.

    Args:
        inspection: the record.
        source: name of the model or table, for the line above the headline.
        command: the line that makes the page again.
    """
    page = page_of(inspection, source=source, command=command)
    drawn = {}
    for section in page.sections:
        if section.plot is not None:
            with drawing_style(section.plot.name):
                drawn[section.plot.name] = to_svg(
                    sites_figure(inspection), section.plot.name, section.plot.label
                )
    template = (files(__package__) / "template.html").read_text(encoding="utf-8")
    return set_page(template, "inspection", page, drawn)


def page_of(inspection: Inspection, *, source: str = "", command: str = "") -> InspectionPage:
    """Turn the record into a page; parts it does not have are left out."""
    from dropkit import __version__

    name = file_name(source) if source else "the model"
    sections = (
        changes(inspection),
        sites(inspection),
        units(inspection),
        instruments(inspection),
        skipped(inspection),
        limits(),
        again(inspection, command),
    )
    acting = [site for site in inspection.sites if site.rate != 0]
    return InspectionPage(
        title=f"Inspection of {name}",
        kicker=f"{name} · {count(len(acting), 'dropout site')} · {count(inspection.rows, 'row')}",
        headline=headline(inspection),
        subline=summary(inspection),
        cards=cards(inspection),
        sections=tuple(section for section in sections if section is not None),
        footer=f"dropkit {__version__} · seed {inspection.seed}",
    )


def headline(inspection: Inspection) -> str:
    """How much there is to change, and where to begin."""
    found = inspection.findings
    if not found:
        return "Dropout does this model no harm that these rows can show: nothing to change."
    place = f"site {quoted(found[0].site)}" if found[0].site else "the model as a whole"
    if len(found) == 1:
        return f"One thing to change, at {place}: {found[0].rule}."
    return f"{len(found)} things to change, beginning at {place}: {found[0].rule}."


def cards(inspection: Inspection) -> tuple[Card, ...]:
    """The whole model at a glance."""
    figures = inspection.figures
    found = len(inspection.findings)
    shown = [
        Card(
            "To change",
            f"{found}" if found else "nothing",
            f"figures beyond their limits by {CLEAR:g} standard errors, and faults in the model's structure",
            "bad" if found else "good",
        )
    ]
    if figures.penalty is not None:
        note = f"on top of {number(figures.plain)} ({figures.loss})"
        if figures.gain is not None and figures.gain.value > 0:
            share = figures.penalty.value / figures.gain.value
            note += f": {percent(max(share, 0.0), 1)} of what was learned"
        shown.append(Card("Masks add to the loss", _text(figures.penalty), note))
    if figures.gain is not None:
        shown.append(
            Card(
                "Learned",
                _text(figures.gain),
                f"better than one answer for all rows, which has {number(figures.constant or 0.0)}",
                "good" if learned_something(figures) else "fair",
            )
        )
    if figures.gradient is not None:
        shown.append(
            Card(
                "Gradient noise",
                f"× {_text(figures.gradient)}",
                f"variance of a gradient of {figures.batch} rows, against the one without masks",
            )
        )
    if figures.gap is not None:
        shown.append(Card("Gap to new rows", _text(figures.gap), "loss on new rows minus loss on these"))
    return tuple(shown)


def changes(inspection: Inspection) -> Section:
    """The findings, in sentences and with their sources."""
    here = tuple(
        f"{place}. {quoted(finding.site) if finding.site else 'The model'}: {finding.message}"
        for place, finding in enumerate(inspection.findings, 1)
    )
    rows = tuple(
        (
            cut(finding.site) or "the model",
            finding.rule,
            "structure" if finding.weight is None else f"{number(finding.weight, 2)} × limit",
            finding.source,
        )
        for finding in inspection.findings
    )
    return Section(
        "changes",
        "What to change",
        here or (verdict(inspection),),
        reading="A figure counts only where it is beyond its limit by three standard errors, so that chance gives no "
        "advice. What the structure of the model shows needs no figure.",
        tables=(
            Table(
                "The same with how far beyond the limit each surely is, and who says so.",
                ("where", "rule", "surely at least", "source"),
                rows,
                (False, False, True, False),
                folded=True,
            ),
        )
        if rows
        else (),
    )


def sites(inspection: Inspection) -> Section | None:
    """Every site with its figures."""
    if not inspection.sites:
        return None
    shown = inspection.sites[:MOST_ROWS]
    drawn = drawn_sites(inspection)
    label = "Noise over signal at the layer, of the prediction, cost and gradient noise of each site."
    left = (
        f" (the first {MOST_ROWS} of {len(inspection.sites)})" if len(shown) < len(inspection.sites) else ""
    )
    return Section(
        "sites",
        "Site by site",
        ("Each site was measured with the masks of all others switched off.",),
        reading="Noise over signal: the variance that masks give, over the variance between rows; at the layer for "
        "each unit alone, at the prediction after all that is behind has averaged over units. Cost: what the masks add "
        "to the loss, as a share of what the model has learned. Gradient: what they add to the variance of a "
        "minibatch's gradient. The dashed line is the limit that a rule asks for; some rules ask for two.",
        plot=Plot(
            "sites",
            label,
            f"Ratios without unit, ± one standard error, logarithmic; {count(inspection.rows, 'row')}, "
            f"{inspection.members} members, seed {inspection.seed}.",
        )
        if drawn
        else None,
        tables=(
            Table(
                f"Figures of each site{left}, ± one standard error; {MISSING} where there is none.",
                (
                    "site", "what", "p", "noise / signal", "of the prediction", "share of spread", "adds to the loss",
                    "by formula", "gradient", "bias", "BatchNorm sees",
                ),
                tuple(site_row(site) for site in shown),
                (False, False, *(True,) * 9),
            ),
        ),
    )  # fmt: skip


def site_row(site: SiteInspection) -> tuple[str, ...]:
    """One site as texts."""
    sees = MISSING if site.shift is None else percent(1 / site.shift.value)
    return (
        cut(site.site) or "(the model)",
        site.what,
        MISSING if site.rate is None else f"{site.rate:.4g}",
        _text(site.noise),
        _text(site.reach),
        MISSING if site.share is None else percent(site.share.value),
        _text(site.penalty),
        MISSING if site.predicted is None else number(site.predicted),
        _text(site.gradient),
        MISSING if site.bias is None else percent(site.bias),
        sees,
    )


def units(inspection: Inspection) -> Section | None:
    """Which units and features matter to each site."""
    rows = tuple(
        (
            cut(site.site),
            cut(", ".join(site.loud), 120) or MISSING,
            site.dearest or MISSING,
            _text(site.cost),
            MISSING if site.correlation is None else number(site.correlation, 2),
        )
        for site in inspection.sites[:MOST_ROWS]
        if site.loud or site.dearest
    )
    if not rows:
        return None
    return Section(
        "units",
        "Who pays, and who is missed",
        (),
        reading="Loud: features that pay more than three times the mean of their site, most first. Dearest: the one "
        "unit whose loss costs most. Units that are alike lean on each other: cheap to lose alone, dear together.",
        tables=(
            Table(
                "Units of each site; cost is the rise of the loss.",
                ("site", "loud", "dearest unit", "its cost", "mean correlation"),
                rows,
                (False, False, False, True, True),
            ),
        ),
    )


def instruments(inspection: Inspection) -> Section:
    """What each instrument says of the model as a whole."""
    rows = tuple((r.instrument, r.text, f"{r.rows}") for r in inspection.readings)
    return Section(
        "instruments",
        "What the instruments say",
        ("Of the model as a whole, with all masks acting.",),
        tables=(
            Table(
                "dropkit.measure, in words.", ("instrument", "finding", "rows"), rows, (False, False, True)
            ),
        ),
    )


def skipped(inspection: Inspection) -> Section | None:
    """What could not be measured, and why."""
    if not inspection.skipped:
        return None
    rows = tuple((s.instrument, s.why) for s in inspection.skipped)
    return Section(
        "skipped",
        "Not measured",
        (),
        tables=(Table("Why not.", ("instrument", "reason"), rows, (False, False)),),
    )


def limits() -> Section:
    """Every rule with its limit and its reason."""
    rows = tuple(
        (rule.name, number(rule.limit, 2), rule.reason, rule.source) for rule in (*SITE_RULES, *MODEL_RULES)
    )
    return Section(
        "limits",
        "When a figure counts as a fault",
        ("Every rule that was asked, and why its limit stands where it does.",),
        tables=(
            Table(
                "Rules of the inspection.",
                ("rule", "limit", "reason", "source"),
                rows,
                (False, True, False, False),
                folded=True,
            ),
        ),
    )


def again(inspection: Inspection, command: str) -> Section:
    """How to have the page again."""
    text = f"{count(inspection.rows, 'row')}, {inspection.members} members, seed {inspection.seed}."
    return Section("again", "The same again", (text,), code=command)


def _text(figure: Estimate | None) -> str:
    return MISSING if figure is None else measured(figure.value, figure.error)
