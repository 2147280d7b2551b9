"""Inverted dropout keeps the mean: E[m a / q] = a and Var[m a / q] = a^2 p / q, whatever is masked together."""

from __future__ import annotations

import torch

import dropkit.nn as dnn
from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.masks import masks

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


def experiment(setting: Setting) -> Findings:
    """Mean and variance over masks of one activation, and what eval() changes."""
    draws = 2_000_000 if setting.full else 200_000
    value = 1.7
    x = torch.full((draws, 1), value, dtype=torch.float64)
    means, variances, worst = [], [], 0.0
    for i, rate in enumerate(RATES):
        layer = dnn.Dropout(rate)
        with masks(seed=setting.seed, step=i):
            y = layer(x).squeeze(1)
        means.append(y.mean().item())
        variances.append(y.var().item())
        worst = max(worst, float((layer.eval()(x) - x).abs().max()))
    law = [value**2 * p / (1 - p) for p in RATES]
    at = RATES.index(0.5)
    errors = [(v / draws) ** 0.5 for v in law]
    fourth = [value**4 * (p * (1 - p) ** 4 + (1 - p) * p**4) / (1 - p) ** 4 for p in RATES]
    spread = [((f - v**2) / draws) ** 0.5 for f, v in zip(fourth, law, strict=True)]
    return Findings(
        figures={
            "mean": Measured(means[at], errors[at], value),
            "variance": Measured(variances[at], spread[at], law[at]),
            "eval": Measured(worst, 0.0, 0.0),
        },
        charts=(
            Chart(
                "variance", "Variance of a dropped activation over masks; bars are two standard errors.", "rate p",
                "variance", (Series("a² p / q", RATES, tuple(law), style="predicted"),
                Series("measured", RATES, tuple(variances), tuple(2 * s for s in spread))), y_log=True,
            ),
        ),
        data="none: one activation of 1.7",
        setup=f"{draws:,} masks for each rate.",
    )  # fmt: skip


CLAIM = Claim(
    name="inverted",
    title="Inverted dropout keeps the mean",
    article="Kept activations are scaled up in training, so that the network is used as it is at test time.",
    prediction="E[m a / q] = a, Var[m a / q] = a² p / q; eval() is the identity.",
    condition="",
    rules=(
        Rule("mean", "mean of an activation of 1.7 over masks, p = 0.5", "equal"),
        Rule("variance", "its variance over masks, p = 0.5", "equal"),
        Rule("eval", "largest change that eval() makes", "equal"),
    ),
    experiment=experiment,
)
