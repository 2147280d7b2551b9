"""The figure of an inspection: what each site's masks do, beside the limits above which there is advice."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dropkit.measure.advice import HEARD, SITE_RULES
from dropkit.measure.inspected import Inspection, SiteInspection
from dropkit.measure.inspection_text import shown_sites
from dropkit.measure.site_figures import Estimate
from dropkit.report.drawing import FIRST, MUTED, SECOND, THIRD, canvas
from dropkit.report.wording import short

LIMITS = {rule.name: rule.limit for rule in SITE_RULES}
# What is drawn of a site: axis label, figure, limit, colour.
PANELS: tuple[tuple[str, Callable[[SiteInspection], Estimate | None], float, str], ...] = (
    ("noise / signal\nat the layer", lambda site: site.noise, LIMITS["noise"], FIRST),
    ("noise / signal\nof the prediction", lambda site: site.reach, HEARD, FIRST),
    ("cost / what\nwas learned", lambda site: site.undone, LIMITS["penalty"], SECOND),
    ("gradient noise\n/ plain", lambda site: site.gradient, LIMITS["gradient noise"], THIRD),
)
MOST_TICKS = 4
DECADES = 1e-6  # of a panel's largest value; smaller ones are as good as nothing


def drawn_sites(inspection: Inspection) -> tuple[SiteInspection, ...]:
    """Sites with anything to draw; of many, those with the largest share of the spread."""
    return tuple(site for site in shown_sites(inspection.sites) if any(f(site) for _, f, _, _ in PANELS))


def sites_figure(inspection: Inspection) -> Figure:
    """Two rows of two panels; in each a point with its error bar for every site, and the limit as a dashed line."""
    sites = drawn_sites(inspection)
    figure, panels = canvas(2.4 + 0.5 * len(sites), rows=2, columns=2, sharey=True)
    for axes, (label, figure_of, limit, colour) in zip(panels, PANELS, strict=True):
        _panel(axes, label, [figure_of(site) for site in sites], limit, colour)
    for axes in (panels[0], panels[2]):
        axes.set_yticks(range(len(sites)), [short(site.site or "(the model)", 14) for site in sites])
        axes.set_ylim(len(sites) - 0.5, -0.5)
    return figure


def _panel(axes: Axes, label: str, values: list[Estimate | None], limit: float, colour: str) -> None:
    known = [(place, value) for place, value in enumerate(values) if value is not None and value.value > 0]
    top = max([value.value for _, value in known] + [limit])
    seen = [(place, value) for place, value in known if value.value > DECADES * top]
    axes.set_xscale("log")
    axes.axvline(limit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for place, value in seen:
        low = min(value.error, 0.9 * value.value)  # a bar down to 0 has no place on this axis
        axes.errorbar(
            value.value,
            place,
            xerr=[[low], [value.error]],
            fmt="o",
            color=colour,
            elinewidth=1.4,
            markersize=5,
        )
    ends = [0.99 * limit, 1.01 * limit, *(value.value + value.error for _, value in seen)]
    ends += [value.value - min(value.error, 0.9 * value.value) for _, value in seen]
    low_power, high_power = math.floor(math.log10(min(ends))), math.ceil(math.log10(max(ends)))
    high_power += high_power == low_power
    step = math.ceil((high_power - low_power) / (MOST_TICKS - 1))
    ticks = [10.0**power for power in range(high_power, low_power - 1, -step)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(10.0**low_power, 10.0**high_power)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
