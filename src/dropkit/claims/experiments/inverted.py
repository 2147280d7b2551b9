"""Inverted dropout keeps the mean: E[m a / q] = a and Var[m a / q] = a^2 p / q, whatever is masked together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

import dropkit.nn as dnn
from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Setting
from dropkit.claims.experiments.draws import BOUND, beside_law, mean_figure, measured_series, variance_figure
from dropkit.claims.experiments.kinds import KINDS, Draws, Kind
from dropkit.masks import masks

# No 1/2 among them, where the squared distance from the mean is the same for what falls and what stays: the measured
# variance would seem to have next to no error.
RATES = (0.1, 0.3, 0.6, 0.8, 0.9)
RATE = 0.3125  # of all kinds; a multiple of 2^-16, so that masks have this rate and no rounded one
VALUE = 1.7


def experiment(setting: Setting, draws: int | None = None, kinds: Sequence[Kind] = KINDS) -> Findings:
    """Mean and variance over masks: of one activation against the rate, and of every kind of dropout at one rate.

    Args:
        setting: seed and length.
        draws: masks for each kind; None: 40 000, in the long form 400 000.
        kinds: which are tried.
    """
    count = draws or (400_000 if setting.full else 40_000)
    curve = {rate: _one(rate, 5 * count, setting.seed + 1 + i) for i, rate in enumerate(RATES)}
    figures = {"variance at 0.9": curve[RATES[-1]]}
    found = [kind.draw(RATE, count, setting.seed + 1000 * (i + 1)) for i, kind in enumerate(kinds)]
    for kind, drawn in zip(kinds, found, strict=True):
        figures |= _figures(kind, drawn)
    figures["eval"] = Measured(max(drawn.quiet for drawn in found), 0.0)
    return Findings(
        figures=figures,
        charts=(_law_chart(curve), _kinds_chart(kinds, figures)),
        data="none: activations from 0.5 to 2; for the alpha kinds, SELU of normal numbers",
        setup=(
            f"{count:,} masks for each kind at p = {RATE:g}; BatchwiseDropout, one mask a pass, has a hundredth. "
            f"{5 * count:,} masks for each rate of the curve."
        ),
        remarks=(
            "A figure is the sum of a layer's outputs, so that its variance says which elements fall together, "
            "too.",
            "The alpha kinds keep mean 0 and variance 1 of a layer of SELUs, not each activation: over masks "
            "a single x goes to a q x with a = (q (1 + 3.09 p))^-1/2.",
            "Zoneout scales nothing: its evaluation is the mean, which is not the plain network.",
            "Not in the table as they do not promise it: DropBlock scaled by sample (it keeps the mean of a map of "
            "ones), DropKey, WordDropout, PatchDropout, Cutout and LayerDrop, which scale nothing.",
        ),
    )


def _one(rate: float, count: int, seed: int) -> Measured:
    with masks(seed=seed):
        y = dnn.Dropout(rate)(torch.full((count, 1), VALUE, dtype=torch.float64)).squeeze(1)
    return variance_figure(y, VALUE**2 * rate / (1 - rate))


def _figures(kind: Kind, drawn: Draws) -> dict[str, Measured]:
    return {
        f"mean {kind.name}": mean_figure(drawn.sums, drawn.mean, drawn.unit),
        f"variance {kind.name}": variance_figure(drawn.sums, drawn.variance, drawn.scale),
    }


def _law_chart(curve: Mapping[float, Measured]) -> Chart:
    return Chart(
        "variance",
        "Variance of a dropped activation of 1.7 over masks; bars are two standard errors.",
        "rate p", "variance", beside_law("measured", curve, "a² p / q"), y_log=True,
    )  # fmt: skip


def _kinds_chart(kinds: Sequence[Kind], figures: Mapping[str, Measured]) -> Chart:
    series = []
    for what in ("mean", "variance"):
        found = [_over_law(figures[f"{what} {kind.name}"]) for kind in kinds]
        series.append(measured_series(f"{what} / its law", range(len(kinds)), found))
    return Chart(
        "kinds",
        f"Mean and variance of the sum of outputs over their laws, for each kind of dropout at p = {RATE:g}; "
        "bars are two standard errors.",
        "kind", "measured / law", tuple(series), x_names=tuple(kind.name for kind in kinds), level=1.0,
        level_name="law",
    )  # fmt: skip


def _over_law(figure: Measured) -> Measured:
    """A figure over its prediction; where that is 0, the figure plus 1."""
    if not figure.predicted:
        return Measured(figure.value + 1, figure.standard_error)
    return Measured(figure.value / figure.predicted, figure.standard_error / figure.predicted)


def _rules(kinds: Sequence[Kind]) -> tuple[Rule, ...]:
    rules = [Rule("variance at 0.9", "variance of an activation of 1.7, p = 0.9", "equal", tolerance=BOUND)]
    said = {
        "Zoneout": ("mean over q new + p old", "variance, in (new - old)²"),
        "AlphaDropout": ("mean over rows and masks", "variance over rows and masks"),
        "FeatureAlphaDropout": ("mean over rows and masks", "variance over rows and masks"),
    }
    for kind in kinds:
        mean, variance = said.get(kind.name, ("mean over the plain output", "variance, in a²"))
        rules += [
            Rule(f"mean {kind.name}", f"{kind.name} ({kind.shares}): {mean}", "equal", tolerance=BOUND),
            Rule(f"variance {kind.name}", f"{kind.name}: {variance}, p = {RATE:g}", "equal", tolerance=BOUND),
        ]
    return (*rules, Rule("eval", "largest change that eval() makes, all kinds", "below", bound=1e-12))


CLAIM = Claim(
    name="inverted",
    title="Inverted dropout keeps the mean",
    article="Kept activations are scaled up in training, so that the network is used as it is at test time.",
    prediction=(
        "E[m a / q] = a, Var[m a / q] = a² p / q, for whatever falls together; eval() is the identity. Alpha "
        "dropout keeps mean 0 and variance 1 under SELU; zoneout has mean q new + p old and variance p q (new - "
        "old)²."
    ),
    condition=(
        "For what the mask multiplies. Behind the next nonlinear function the mean is no longer that of the "
        "plain network."
    ),
    rules=_rules(KINDS),
    experiment=experiment,
    seconds=3.0,
)


def claim_of(kinds: Sequence[Kind]) -> Claim:
    """The claim for some kinds alone."""
    return dataclasses.replace(
        CLAIM, rules=_rules(kinds), experiment=lambda setting: experiment(setting, kinds=kinds)
    )
