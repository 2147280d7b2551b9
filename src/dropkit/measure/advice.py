"""When a figure is a fault, and what to do about it: every rule of the inspection, with its limit and its reason.

A rule speaks only where its figure is beyond the limit by three standard errors: about one figure in 700 that lies at
its limit is called beyond it by chance, and none that is well below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dropkit.measure.inspected import Finding, ModelFigures, SiteInspection
from dropkit.measure.site_figures import Estimate

CLEAR = 3.0  # standard errors


@dataclass(frozen=True, slots=True)
class SiteRule:
    """One way in which a site can be wrong.

    Attributes:
        name: short, for lists.
        figure: what is compared; None where it does not apply.
        limit: above it, the rule speaks.
        reason: why the limit stands there.
        message: what is said.
        source: who says so.
    """

    name: str
    figure: Callable[[SiteInspection, ModelFigures], Estimate | None]
    limit: float
    reason: str
    message: Callable[[SiteInspection, ModelFigures], str]
    source: str


@dataclass(frozen=True, slots=True)
class ModelRule:
    """One way in which the model as a whole can be wrong; the attributes are those of `SiteRule`."""

    name: str
    figure: Callable[[ModelFigures], Estimate | None]
    limit: float
    reason: str
    message: Callable[[ModelFigures], str]
    source: str


def beyond(figure: Estimate | None, limit: float) -> float | None:
    """How many times the limit a figure surely is; None where it is not surely above."""
    if figure is None or not figure.value - CLEAR * figure.error > limit:
        return None
    return (figure.value - CLEAR * figure.error) / limit


def learned_something(figures: ModelFigures) -> bool:
    """Whether the model is clearly better than a constant answer."""
    gain = figures.gain
    return gain is not None and gain.value > CLEAR * gain.error


def advise(sites: tuple[SiteInspection, ...], figures: ModelFigures) -> tuple[Finding, ...]:
    """All rules over all sites and the model; the weightiest finding first."""
    found = []
    for rule in SITE_RULES:
        for site in sites:
            weight = beyond(rule.figure(site, figures), rule.limit)
            if weight is not None:
                found.append(Finding(rule.name, site.site, weight, rule.message(site, figures), rule.source))
    for whole in MODEL_RULES:
        weight = beyond(whole.figure(figures), whole.limit)
        if weight is not None:
            found.append(Finding(whole.name, "", weight, whole.message(figures), whole.source))
    return tuple(sorted(found, key=lambda finding: -(finding.weight or 0.0)))


def said(figure: Estimate | float) -> str:
    """A figure to three digits."""
    return f"{figure.value if isinstance(figure, Estimate) else figure:.3g}"


def percent(share: float) -> str:
    """A share to three digits of percent."""
    return f"{100 * share:.3g} %"


# What reaches the prediction must be more than this share of what rows differ by, and what masks cost more than this
# share of what was learned, or the site does no harm.
HEARD = 0.1
FEWEST_FEATURES = 4  # of fewer, one pays half of the penalty by chance
# Mean square over variance from which a value's mean, and not its variation, is what the mask makes into noise. A
# centred unit has 1, one behind a ReLU 1.5, a column of ones in a table 2 where half of the rows have it.
FAR_FROM_CENTRED = 4.0


def _drowned(site: SiteInspection, figures: ModelFigures) -> Estimate | None:
    centred = site.offset is None or beyond(site.offset, FAR_FROM_CENTRED) is None
    return site.noise if centred and _heard(site, figures) else None


def _off_centre(site: SiteInspection, figures: ModelFigures) -> Estimate | None:
    far = beyond(site.offset, FAR_FROM_CENTRED) is not None
    return site.noise if far and _heard(site, figures) else None


def _heard(site: SiteInspection, figures: ModelFigures) -> bool:
    """Whether the noise gets as far as the prediction; hidden units of an untrained network have no signal yet."""
    formed = site.reads_x or learned_something(figures)
    return formed and beyond(site.reach, HEARD) is not None


def _undone(site: SiteInspection, figures: ModelFigures) -> Estimate | None:
    return site.undone if learned_something(figures) else None


def _noisy_steps(site: SiteInspection, figures: ModelFigures) -> Estimate | None:
    return site.gradient if _costs(site, figures) else None


def _costs(site: SiteInspection, figures: ModelFigures) -> bool:
    """Whether the masks clearly take back more than a tenth of what was learned."""
    return learned_something(figures) and beyond(site.undone, HEARD) is not None


def _loudest(site: SiteInspection, figures: ModelFigures) -> Estimate | None:
    if site.loudest is None or not site.reads_x or (site.width or 0) < FEWEST_FEATURES:
        return None
    if not _costs(site, figures):
        return None
    return Estimate(site.loudest, 0.0)


def _say_drowned(site: SiteInspection, figures: ModelFigures) -> str:
    assert site.noise is not None
    assert site.reach is not None
    assert site.rate is not None
    even = site.rate / (site.rate + (1 - site.rate) * site.noise.value)  # p/(1-p) divided by the figure
    behind = f", or move it behind BatchNorm {site.norm!r}" if site.norm else ""
    return (
        f"its noise is {said(site.noise)} times its signal, and gives the prediction {percent(site.reach.value)} of "
        f"the variance that rows differ by. Lower p{behind}: at p = {even:.2g} noise and signal would be equal."
    )


def _say_off_centre(site: SiteInspection, figures: ModelFigures) -> str:
    assert site.noise is not None
    assert site.offset is not None
    return (
        f"its noise is {said(site.noise)} times its signal because what it drops is far from centred: the mean square "
        f"is {said(site.offset)} times the variance, and dropping a large mean is noise that says nothing. Centre "
        "these values (standardise the columns, or put a norm before the dropout), or lower p."
    )


def _say_undone(site: SiteInspection, figures: ModelFigures) -> str:
    assert site.undone is not None
    assert site.penalty is not None
    assert figures.gain is not None
    return (
        f"its masks add {said(site.penalty)} to the loss: {percent(site.undone.value)} of the {said(figures.gain)} "
        "by which the model is better than one answer for all rows. Lower p, or widen the layer."
    )


def _say_loudest(site: SiteInspection, figures: ModelFigures) -> str:
    assert site.loudest is not None
    return (
        f"feature {site.loud[0]!r} alone pays {percent(site.loudest)} of its penalty. The price of a feature is its "
        "mean square times the square of its slope: standardise it, or leave it out of the mask."
    )


def _say_shift(site: SiteInspection, figures: ModelFigures) -> str:
    assert site.shift is not None
    return (
        f"in evaluation BatchNorm {site.norm!r} is given {percent(1 / site.shift.value)} of the variance that it has "
        f"in training, so that its outputs are too small by a factor of {said(site.shift.value**-0.5)}. Put the "
        "dropout behind the last BatchNorm, or lower p."
    )


def _say_gradient(site: SiteInspection, figures: ModelFigures) -> str:
    assert site.gradient is not None
    if site.tied:
        return (
            f"its mask is one for all rows, and adds {said(site.gradient)} times the plain variance to a gradient of "
            f"{figures.batch} rows. Larger batches do not help: give each row a mask of its own, or lower p."
        )
    return (
        f"it adds {said(site.gradient)} times the plain variance to the gradient of {figures.batch} rows. Batches "
        f"{said(1 + site.gradient.value)} times as large would make up for it; so would a lower p, at least towards "
        "the end of the training."
    )


SITE_RULES = (
    SiteRule(
        name="noise",
        figure=_drowned,
        limit=4.0,
        reason="at 4 the noise of a unit is twice as large as what it has to tell; p = 0.5 behind a ReLU gives 1.5",
        message=_say_drowned,
        source="variance p/(1-p) h^2 of inverted masks; Srivastava et al. 2014, JMLR 15",
    ),
    SiteRule(
        name="far from centred",
        figure=_off_centre,
        limit=4.0,
        reason="as for noise",
        message=_say_off_centre,
        source="Wager, Wang and Liang 2013, arXiv:1307.1493: the mean square pays",
    ),
    SiteRule(
        name="penalty",
        figure=_undone,
        limit=0.5,
        reason="above it the masks take back more than half of what was learned",
        message=_say_undone,
        source="Wei, Kakade and Ma 2020, arXiv:2002.12915 (the penalty); the limit is dropkit's",
    ),
    SiteRule(
        name="loud feature",
        figure=_loudest,
        limit=0.5,
        reason="one feature pays more than all others together, and the site costs a tenth of what was learned",
        message=_say_loudest,
        source="Wager, Wang and Liang 2013, arXiv:1307.1493",
    ),
    SiteRule(
        name="variance shift",
        figure=lambda site, figures: site.shift,
        limit=1.25,
        reason="outputs of the BatchNorm are then a tenth too small in evaluation",
        message=_say_shift,
        source="Li, Chen, Hu and Yang 2019, arXiv:1801.05134",
    ),
    SiteRule(
        name="gradient noise",
        figure=_noisy_steps,
        limit=9.0,
        reason="at 9 a step's chance is three times as large as without this site. It counts where the site also "
        "costs a tenth of what was learned: where rows are learned by heart, any noise is many times the plain one",
        message=_say_gradient,
        source="(s^2 + p mu^2) / (q B) and the linear model's; Wei, Kakade and Ma 2020, arXiv:2002.12915",
    ),
)


def _no_better(figures: ModelFigures) -> Estimate | None:
    """How many standard errors it is worse, in units of what is clear."""
    if figures.gain is None or not figures.gain.error > 0:
        return None
    return Estimate(-figures.gain.value / (CLEAR * figures.gain.error), 0.0)


def _gap(figures: ModelFigures) -> Estimate | None:
    if figures.gap is None or figures.gain is None or not learned_something(figures):
        return None
    return figures.gap / figures.gain


def _say_no_better(figures: ModelFigures) -> str:
    assert figures.constant is not None
    return (
        f"the {figures.loss} is {said(figures.plain)} where one answer for all rows would have "
        f"{said(figures.constant)}: the network has not learned these rows. Train it, or check that x and y are "
        "prepared as in training, before you read the rest."
    )


def _say_gap(figures: ModelFigures) -> str:
    assert figures.gap is not None
    assert figures.gain is not None
    return (
        f"new rows lose {said(figures.gap)} more than these: {percent(figures.gap.value / figures.gain.value)} of what "
        "was learned does not hold for them. Raise p where it costs little, or stop the training earlier."
    )


def _say_power(figures: ModelFigures) -> str:
    assert figures.power is not None
    return (
        f"masks blow the power of the first time step's signal up to {said(figures.power)} times what it is. Do not "
        "multiply the memory by a mask at every step: drop what enters its gates (dropkit.nn.LSTM with "
        "recurrent_dropout and locked=True)."
    )


MODEL_RULES = (
    ModelRule(
        name="nothing learned",
        figure=_no_better,
        limit=1.0,
        reason="clearly worse than an answer that does not look at the row",
        message=_say_no_better,
        source="the loss of the best constant",
    ),
    ModelRule(
        name="overfitting",
        figure=_gap,
        limit=0.2,
        reason="a fifth of what was learned is learned by heart",
        message=_say_gap,
        source="Srivastava et al. 2014, JMLR 15; the limit is dropkit's",
    ),
    ModelRule(
        name="memory",
        figure=lambda figures: figures.power,
        limit=10.0,
        reason="an order of magnitude",
        message=_say_power,
        source="Gal and Ghahramani 2016, arXiv:1512.05287; (1/q)^k from independent masks",
    ),
)
