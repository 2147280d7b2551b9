"""The variance of predictions against the rate: p q under classic masks, p/q under inverted ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import dropkit.nn as dnn
from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.data import table
from dropkit.claims.experiments.draws import BOUND, beside_law, difference, measured_series, variance_figure
from dropkit.claims.experiments.linear import (
    descend,
    dropout_weights,
    linear_network,
    standardised_table,
    wide,
)
from dropkit.claims.experiments.networks import over_seeds, train
from dropkit.functional import dropout
from dropkit.masks import masks
from dropkit.measure import variance_law
from dropkit.measure.variance_law import VarianceLaw

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
NETWORK_RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
FIXED = 0.1  # the rate of the networks whose weights stay as they are
COPIES = 4
COPIES_RATES = (0.5, 0.8)  # the second is K / (K + 1), where K copies have their peak
REPETITIONS = 8


def experiment(
    setting: Setting,
    draws: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    members: int | None = None,
    hidden: int = 50,
) -> Findings:
    """One linear unit under both scales, one feature trained anew at each rate, and networks trained at each rate.

    Args:
        setting: seeds and length.
        draws: masks of the unit; None: 200 000, in the long form 2 000 000.
        steps: of the descents; None: 3 000, in the long form 30 000.
        epochs: of the networks; None: 100, in the long form 400.
        members: of a committee; None: 64, in the long form 512.
        hidden: width of the networks.
    """
    count = draws or (2_000_000 if setting.full else 200_000)
    name, x, y = standardised_table("concrete")
    weights = dropout_weights(wide(x), wide(y), 0.0)
    parts = weights * wide(x[0])
    classic = {
        rate: _classic(parts, rate, count, setting.seed + i) for i, rate in enumerate((0.0, *RATES, 1.0))
    }
    inverted = _inverted(x, y, weights, count // 800, setting.seed)
    assert inverted.predicted is not None
    walk = steps or (30_000 if setting.full else 3000)
    single = {rate: _trained(x[:, 0], 1, rate, walk, setting.seed) for rate in RATES}
    copies = {rate: _trained(x[:, 0], COPIES, rate, walk, setting.seed) for rate in (*RATES, *COPIES_RATES)}
    own, fixed = _networks(
        setting, hidden, epochs or (400 if setting.full else 100), members or (512 if setting.full else 64)
    )
    middle, low, high = (own[NETWORK_RATES.index(rate)] for rate in (0.5, 0.05, 0.95))
    figures = {
        **{f"classic {rate:g}": classic[rate] for rate in (0.3, 0.7)},
        "before": difference(classic[0.5], classic[0.3]),
        "behind": difference(classic[0.5], classic[0.7]),
        "ends": Measured(max(classic[0.0].value, classic[1.0].value), 0.0),
        **{f"inverted {rate:g}": _at(inverted, rate) for rate in (0.3, 0.9)},
        "no peak": difference(_at(inverted, 0.9), _at(inverted, 0.5)),
        **{f"trained {rate:g}": single[rate] for rate in RATES},
        **{f"copies {rate:g}": copies[rate] for rate in COPIES_RATES},
        "rises": over_seeds(middle - low),
        "falls": over_seeds(middle - high),
        "peak": over_seeds([NETWORK_RATES[int(i)] for i in own.argmax(dim=0)]),
    }
    return Findings(
        figures=figures,
        charts=(
            _unit_chart(classic, inverted, parts),
            _trained_chart(single, {rate: copies[rate] for rate in sorted(copies)}),
            _network_chart(own, fixed, name, setting.seeds),
        ),
        data=f"{name}, {len(x)} rows, standardised; networks: the first of its splits",
        setup=(
            f"{count:,} masks of one unit with {x.shape[1]} inputs; {REPETITIONS} descents of {walk:,} steps for "
            f"each rate on one feature without noise; networks {x.shape[1]}-{hidden}-2 by Adam, {setting.seeds} "
            f"seeds, {members or (512 if setting.full else 64)} members."
        ),
        remarks=(
            "With inverted masks and weights as they are, the spread grows without bound: raising p at "
            "test time says more noise, not more uncertainty.",
            f"Redundancy moves the peak: {COPIES} copies of a feature have it at p = {COPIES}/{COPIES + 1}, so a "
            "wide network need not be most uncertain at 1/2.",
        ),
    )


def _classic(parts: Tensor, rate: float, draws: int, seed: int) -> Measured:
    """Variance of sum_j w_j x_j m_j over masks without a scale, beside p q sum_j (w_j x_j)^2."""
    layer = dnn.ClassicDropout(rate)
    with masks(seed=seed):
        sums = layer(parts.expand(draws, -1)).sum(dim=1)
    return variance_figure(sums, rate * (1 - rate) * float(parts.square().sum()))


def _inverted(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: Tensor, members: int, seed: int
) -> VarianceLaw:
    rows, targets = wide(x[:200]), wide(y[:200])
    return variance_law(
        linear_network(weights, 0.5), rows, targets, rates=RATES, members=max(members, 20), seed=seed
    )


def _at(found: VarianceLaw, rate: float) -> Measured:
    i = found.rates.index(rate)
    assert found.predicted is not None
    return Measured(float(found.measured[i]), float(found.standard_error[i]), float(found.predicted[i]))


def _trained(feature: NDArray[np.float64], copies: int, rate: float, steps: int, seed: int) -> Measured:
    """Variance of the prediction over inverted masks after descent at this rate, copies of one feature, target itself.

    The optimum is w = 1 / (K + p/q) for each copy; with s = K w the variance is s (1 - s), which is p q for K = 1.
    """
    x = np.repeat(feature[:, None], copies, axis=1)
    # The larger the noise of the inputs, the smaller the steps that stay on the way.
    size = 0.01 * min(1.0, 2 * (1 - rate))
    reached = descend(x, feature, rate, repetitions=REPETITIONS, seed=seed, steps=steps, step_size=size)
    rows = wide(x)
    found = []
    for i, weights in enumerate(reached):
        drawn = []
        for member in range(100):
            # Each descent is asked under masks of its own, or their common chance would not show in the error.
            with masks(seed=seed + 1 + i, member=member, samples=torch.arange(len(rows))):
                drawn.append(dropout(rows * weights, rate, site="inputs").sum(dim=1))
        found.append(torch.stack(drawn).var(dim=0).mean())
    s = copies / (copies + rate / (1 - rate))
    return over_seeds(torch.stack(found), predicted=s * (1 - s))


def _networks(setting: Setting, hidden: int, epochs: int, members: int) -> tuple[Tensor, Tensor]:
    """(R, S) variance of the mean over members, average over test rows, target's variance 1: networks trained at each
    rate and asked at it; and networks trained at `FIXED` asked at each rate.
    """
    train_rows, test_rows = table("concrete").splits[0]
    _, columns, y = standardised_table("concrete")
    x = columns.astype(np.float32)
    seeds = tuple(range(setting.seed, setting.seed + setting.seeds))
    nets = train(
        x[train_rows], y[train_rows], hidden=(hidden,), rates=NETWORK_RATES, seeds=seeds, epochs=epochs,
        likelihood="gaussian",
    )  # fmt: skip
    own = torch.stack([nets.outputs(x[test_rows], member=k)[..., 0].double() for k in range(members)])
    fixed = []
    start = NETWORK_RATES.index(FIXED)
    for rate in NETWORK_RATES:
        asked = [
            nets.outputs(x[test_rows], member=k, rate=rate)[start, ..., 0].double() for k in range(members)
        ]
        fixed.append(torch.stack(asked).var(dim=0).mean(dim=-1))
    return own.var(dim=0).mean(dim=-1), torch.stack(fixed)


def _unit_chart(classic: dict[float, Measured], inverted: VarianceLaw, parts: Tensor) -> Chart:
    unit = float(parts.square().sum()) / inverted.spread  # both curves in units of the classic unit's S
    inside, scaled = {rate: classic[rate] for rate in RATES}, {}
    for rate in inverted.rates:
        one = _at(inverted, rate)
        scaled[rate] = Measured(unit * one.value, unit * one.standard_error, unit * (one.predicted or 0.0))
    return Chart(
        "unit",
        "Variance of a linear unit over masks at fixed weights; bars are two standard errors.",
        "rate p", "variance",
        (*beside_law("classic masks", inside, "p q S"), *beside_law("inverted masks", scaled, "p/q S")),
        y_log=True,
    )  # fmt: skip


def _trained_chart(single: dict[float, Measured], copies: dict[float, Measured]) -> Chart:
    return Chart(
        "trained",
        f"Variance under inverted masks of a linear model trained anew at each rate, {REPETITIONS} descents; "
        "bars are two standard errors.",
        "rate p", "variance, target's variance 1",
        (
            *beside_law("one feature", single, "p q"),
            *beside_law(f"{COPIES} copies", copies, "s (1 - s)"),
        ),
    )  # fmt: skip


def _network_chart(own: Tensor, fixed: Tensor, name: str, seeds: int) -> Chart:
    base = float(fixed[NETWORK_RATES.index(FIXED)].mean())
    laws = {"p q": lambda p: p * (1 - p), "p/q": lambda p: p / (1 - p)}
    predicted = [
        Series(f"{said}, through p = {FIXED:g}", NETWORK_RATES,
               tuple(base * law(p) / law(FIXED) for p in NETWORK_RATES), style="predicted")
        for said, law in laws.items()
    ]  # fmt: skip
    curves = {"trained at each rate": own, f"trained at p = {FIXED:g}, asked at each rate": fixed}
    measured = [
        measured_series(said, NETWORK_RATES, [over_seeds(row) for row in found], "measured")
        for said, found in curves.items()
    ]
    return Chart(
        "networks",
        f"Variance of the committee's mean on test rows of {name}, {seeds} seeds; bars are two standard errors.",
        "rate p", "variance, target's variance 1", (*predicted, *measured), y_log=True,
    )  # fmt: skip


CLAIM = Claim(
    name="variance_law",
    title="The variance of predictions goes like p (1 - p)",
    article=(
        "The variance of predictions over masks is proportional to p (1 - p): the uncertainty is highest at p = "
        "1/2 and none at 0 and 1."
    ),
    prediction=(
        "Classic masks at fixed weights: p q S with S = sum (w_j a_j)². Inverted: p/q S, without bound. "
        "Inverted and trained anew at each rate, one feature: p q again; K copies: s (1 - s) with s = K / (K + "
        "p/q), highest at K/(K+1)."
    ),
    condition=(
        "Masks without a scale, or weights trained anew at each rate and units that are not redundant. With "
        "inverted masks at fixed weights it is p/(1 - p)."
    ),
    rules=(
        *(
            Rule(f"classic {rate:g}", f"linear unit, classic masks, p = {rate:g}: variance", "equal", tolerance=BOUND)
            for rate in (0.3, 0.7)
        ),
        Rule("before", "the same at p = 0.5 minus at 0.3", "above"),
        Rule("behind", "the same at p = 0.5 minus at 0.7", "above"),
        Rule("ends", "the same at p = 0 and 1, the larger", "below", bound=1e-20),
        *(
            Rule(f"inverted {rate:g}", f"fixed weights, inverted masks, p = {rate:g}", "equal", tolerance=BOUND)
            for rate in (0.3, 0.9)
        ),
        Rule("no peak", "the same at p = 0.9 minus at 0.5", "above"),
        *(
            Rule(f"trained {rate:g}", f"one feature trained anew, inverted masks, p = {rate:g}", "equal", relative=0.02)
            for rate in RATES
        ),
        *(
            Rule(f"copies {rate:g}", f"{COPIES} copies of it, p = {rate:g}", "equal", relative=0.02)
            for rate in COPIES_RATES
        ),
        Rule("rises", "networks trained at each rate: variance at p = 0.5 minus at 0.05", "above"),
        Rule("falls", "networks trained at each rate: variance at p = 0.5 minus at 0.95", "above"),
        Rule("peak", "rate with the largest variance, of nine from 0.05 to 0.95", "shown"),
    ),
    experiment=experiment,
    seconds=14.0,
)  # fmt: skip
