"""Each place of a model where chance enters, with all that is known of it: from the pass, the instruments, the scan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from dropkit.conversion.records import Scan
from dropkit.conversion.records import Site as Scanned
from dropkit.measure.coadaptation import Coadaptation, SiteAblation
from dropkit.measure.curvature import EXACT_WIDTH
from dropkit.measure.inspected import SiteInspection
from dropkit.measure.noise import Site
from dropkit.measure.penalty import Penalty, SitePenalty
from dropkit.measure.site_figures import Estimate, NoiseFigures
from dropkit.measure.subject import Subject

MOST_LOUD = 5  # features named of one site
NOTHING = NoiseFigures(
    noise=None, offset=None, reach=None, share=None, cost=None, gradient=None, bias=None, norm=None
)


def inspect_sites(
    subject: Subject,
    seen: Scan,
    noise: tuple[NoiseFigures, ...],
    cost: Penalty | None,
    units: Coadaptation | None,
    gain: Estimate | None,
    columns: Sequence[str] | None,
) -> tuple[SiteInspection, ...]:
    """Put together what is known of each site; those that did not act in the pass come last.

    Args:
        subject: what was measured.
        seen: what the scan found.
        noise: figures of each acting site, or none at all.
        cost, units: of the instruments; None where they could not run.
        gain: how much better the model is than a constant answer.
        columns: names of the columns of x.
    """
    acting = () if subject.noise is None else subject.noise.sites
    scanned = {site.name: site for site in reversed(seen.sites)}
    with torch.no_grad():
        read = () if subject.noise is None else subject.noise.inputs(subject.x)
    narrow = [i for i, site in enumerate(acting) if site.width <= EXACT_WIDTH]
    ablations = dict(zip(narrow, units.sites, strict=True)) if units is not None else {}
    calls: Counter[str] = Counter()
    reached: set[str] = set()
    found = []
    for i, site in enumerate(acting):
        calls[site.name] += 1
        call = site.name.partition(":")[2]
        place = _place(site.name, scanned)
        reached.add(place.name if place else site.name)
        figures = noise[i] if noise else NOTHING
        reads_x = read[i].shape == subject.x.shape and torch.equal(read[i], subject.x)
        payer = cost.sites[i] if cost is not None and cost.sites else None
        loud, loudest = _loud(payer)
        dearest, unit_cost, correlation = _dearest(ablations.get(i))
        found.append(
            SiteInspection(
                site=_label(site, calls[site.name]),
                what=place.what if place else call,
                where=place.where if place else "",
                mode=place.mode if place else "eval",
                rate=site.rate,
                width=site.width,
                noise=figures.noise,
                offset=figures.offset,
                reach=figures.reach,
                share=figures.share,
                penalty=figures.cost,
                predicted=None if payer is None or payer.predicted is None else float(payer.predicted),
                undone=_undone(figures.cost, gain),
                loud=tuple(_unit(j, site, columns, reads_x) for j in loud),
                loudest=loudest,
                gradient=figures.gradient,
                bias=figures.bias,
                norm=figures.norm.name if figures.norm else "",
                shift=Estimate(1.0, 0.0) / figures.norm.ratio if figures.norm else None,
                dearest="" if dearest is None else _unit(dearest, site, columns, reads_x),
                cost=unit_cost,
                correlation=correlation,
                tied=site.tied,
                reads_x=reads_x,
            )
        )
    found += [
        SiteInspection(site=s.name, what=s.what, where=s.where, mode=s.mode, rate=s.rate)
        for s in seen.sites
        # a layer whose rate the module above hands to a function is that function's site
        if s.name not in reached and s.name.rpartition(".")[0] not in reached - {""}
    ]
    return tuple(found)


def _place(name: str, scanned: dict[str, Scanned]) -> Scanned | None:
    """What the scan knows of a draw: of its layer, or of the layer around it."""
    above = name.partition(":")[0]
    while above and above not in scanned:
        above = above.rpartition(".")[0]
    return scanned.get(above)


def _label(site: Site, call: int) -> str:
    """Its name, and which call where a layer is called again in one pass."""
    name = site.name.removeprefix(":")  # a function that the model itself calls
    return f"{name}, call {call}" if call > 1 else name


def _unit(place: int, site: Site, columns: Sequence[str] | None, reads_x: bool) -> str:
    """The column of a feature of x, else where in the mask a unit is."""
    if columns is not None and reads_x and len(columns) == site.width:
        return columns[place]
    return f"unit {place}"


def _undone(cost: Estimate | None, gain: Estimate | None) -> Estimate | None:
    """Share of what was learned that the masks take back."""
    return cost / gain if cost is not None and gain is not None and gain.value > 0 else None


def _loud(site: SitePenalty | None) -> tuple[tuple[int, ...], float | None]:
    """Loud features, and the share of the first of them."""
    if site is None or site.features is None or not site.loud:
        return (), None
    positive = site.features.flatten().clamp(min=0)
    return site.loud[:MOST_LOUD], float(positive.max() / positive.sum())


def _dearest(site: SiteAblation | None) -> tuple[int | None, Estimate | None, float | None]:
    """The unit whose loss costs most, what it costs, and how much alike units are."""
    if site is None:
        return None, None, None
    unit = int(site.measured.argmax())
    cost = Estimate(float(site.measured[unit]), float(site.standard_error[unit]))
    return unit, cost, None if site.correlation != site.correlation else site.correlation
