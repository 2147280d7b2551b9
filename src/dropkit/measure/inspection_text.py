"""An inspection as lines for a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from dropkit.measure.advice import CLEAR, percent, said
from dropkit.measure.inspected import SiteInspection
from dropkit.measure.site_figures import Estimate

if TYPE_CHECKING:
    from dropkit.measure.inspected import Inspection

WIDTH = 100
MOST_SITES = 12  # of more, those with the largest share of the spread are shown


def to_text(inspection: Inspection) -> str:
    """What to do first, then site by site, then what was not measured."""
    lines = textwrap.wrap(summary(inspection), WIDTH)
    lines += ["", *_findings(inspection), ""]
    shown = shown_sites(inspection.sites)
    for site in shown:
        lines += _site(site)
    if len(shown) < len(inspection.sites):
        lines += [f"{len(inspection.sites) - len(shown)} more sites stand in the JSON.", ""]
    for reading in inspection.readings:
        start = f"{reading.instrument}: "
        lines += textwrap.wrap(start + reading.text, WIDTH, subsequent_indent="  ")
    for skipped in inspection.skipped:
        start = f"{skipped.instrument}: not measured: {skipped.why}"
        lines += textwrap.wrap(start, WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def summary(inspection: Inspection) -> str:
    """How many sites, on how many rows, and what the model has learned."""
    figures, acting = inspection.figures, [site for site in inspection.sites if site.rate != 0]
    count = f"{len(acting)} dropout site{'' if len(acting) == 1 else 's'}"
    text = f"{count} on {inspection.rows} rows. The {figures.loss} is {figures.plain:.4g} without masks"
    if figures.penalty is not None:
        text += f" and {figures.plain + figures.penalty.value:.4g} under them"
    if figures.constant is not None:
        text += f"; the best answer that is the same for all rows has {figures.constant:.4g}"
    return text + "."


def verdict(inspection: Inspection) -> str:
    """What there is to do, in one sentence."""
    count = len(inspection.findings)
    if count:
        return "One thing to change:" if count == 1 else f"{count} things to change, the weightiest first:"
    return f"Nothing to change: no figure is beyond its limit by {CLEAR:g} standard errors."


def _findings(inspection: Inspection) -> list[str]:
    lines = [verdict(inspection)]
    for number, finding in enumerate(inspection.findings, 1):
        place = f"{finding.site!r}: " if finding.site else "the model: "
        start = f"{number:>2}. "
        lines += textwrap.wrap(
            f"{start}{place}{finding.message} [{finding.rule}]", WIDTH, subsequent_indent=" " * len(start)
        )
    return lines


def shown_sites(sites: tuple[SiteInspection, ...]) -> tuple[SiteInspection, ...]:
    """All sites, or of many those with the largest share of the spread, in the order of the pass."""
    if len(sites) <= MOST_SITES:
        return sites
    ranked = sorted(sites, key=lambda site: -(site.share.value if site.share else -1.0))
    kept = {id(site) for site in ranked[:MOST_SITES]}
    return tuple(site for site in sites if id(site) in kept)


def _site(site: SiteInspection) -> list[str]:
    rate = "" if site.rate is None else f", p = {site.rate:.4g}"
    width = "" if site.width is None else f", {site.width} mask values a row"
    lines = [
        f"{site.site or '(the model)'} ({site.what}{rate}{width}{', ' + site.where if site.where else ''})"
    ]
    if site.rate == 0:
        return [*lines, "  silent: the rate is 0", ""]
    rows = site_rows(site)
    if not rows:
        return [*lines, "  no figures, see below", ""]
    room = max(len(label) for label, _ in rows)
    return [*lines, *(f"  {label:<{room}}  {value}" for label, value in rows), ""]


def site_rows(site: SiteInspection) -> list[tuple[str, str]]:
    """The figures of one site as pairs of what it is and its value; those that are not there are left out."""
    rows: list[tuple[str, str]] = []
    if site.noise is not None:
        rows.append(("noise over signal, at the layer", _known(site.noise)))
    if site.reach is not None:
        rows.append(("noise over signal, of the prediction", _known(site.reach)))
    if site.share is not None:
        rows.append(("share of the prediction's spread", _percent(site.share)))
    if site.penalty is not None:
        formula = "" if site.predicted is None else f" (predicted {said(site.predicted)})"
        learned = "" if site.undone is None else f", {percent(site.undone.value)} of what was learned"
        rows.append(("adds to the loss", f"{_known(site.penalty)}{formula}{learned}"))
    if site.gradient is not None:
        rows.append(("adds to the gradient's variance", f"{_known(site.gradient)} times the plain one"))
    if site.bias is not None:
        rows.append(("moves the mean gradient by", f"{percent(site.bias)} of its length"))
    if site.shift is not None:
        rows.append(
            ("variance in evaluation", f"{_percent(_inverse(site.shift))} at BatchNorm {site.norm!r}")
        )
    if site.cost is not None:
        rows.append(("dearest unit to lose", f"{site.dearest}: {_known(site.cost)}"))
    if site.correlation is not None:
        rows.append(("mean correlation of units", said(site.correlation)))
    if site.loud:
        rows.append(("loud features", ", ".join(site.loud)))
    if site.tied:
        rows.append(("mask", "one for all rows"))
    return rows


def _inverse(figure: Estimate) -> Estimate:
    return Estimate(1.0, 0.0) / figure


def _known(figure: Estimate) -> str:
    return f"{figure.value:.3g} ± {figure.error:.2g}"


def _percent(figure: Estimate) -> str:
    return f"{100 * figure.value:.3g} ± {100 * figure.error:.2g} %"
