"""Correlated features share the credit: a group of copies under dropout, ridge, elastic net and lasso."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.experiments.draws import measured_series
from dropkit.claims.experiments.linear import (
    descend,
    dropout_weights,
    linear_network,
    standardised,
    standardised_table,
    wide,
)
from dropkit.claims.experiments.networks import over_seeds
from dropkit.measure import grouping
from dropkit.measure.grouping import Grouping

RATE = 0.5
COPIES = 4
NOISE = 0.1  # standard deviation of what each copy adds: a correlation of 0.99
NOISES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the chart
UNITS = (1.0, 2.0, 4.0, 8.0)
METHODS = ("dropout", "ridge", "elastic net", "lasso", "least squares")


@dataclass(frozen=True, slots=True)
class Group:
    """Weights of a group of copies.

    Attributes:
        uneven: {method: (largest - smallest) / mean absolute weight}; 0: shared evenly, COPIES: all on one.
        zeros: {method: weights that are 0}.
        bound: largest |b_i - b_j| over its bound (q/p) |y| sqrt(2 (1 - rho)), dropout, columns of length 1.
        descended: weights (COPIES,) where descent with masks ended, or None.
        closed: weights (COPIES,) of the closed form.
    """

    uneven: dict[str, float]
    zeros: dict[str, int]
    bound: float
    descended: Tensor | None
    closed: Tensor


def experiment(
    setting: Setting,
    repetitions: int | None = None,
    steps: int | None = None,
    noises: tuple[float, ...] = NOISES,
) -> Findings:
    """A feature of a real table in place of which stand copies with a little noise of their own.

    Args:
        setting: seeds and length.
        repetitions: groups for each seed, with noise of their own; None: 2, in the long form 8.
        steps: of the descents; None: 4 000, in the long form 20 000.
        noises: of the copies, one after another, in the chart.
    """
    name, x, y = standardised_table("concrete")
    count = setting.seeds * (repetitions or (8 if setting.full else 2))
    walk = steps or (20_000 if setting.full else 4000)
    groups = [_group(x, y, NOISE, setting.seed + i, walk) for i in range(count)]
    uneven = {way: torch.tensor([g.uneven[way] for g in groups], dtype=torch.float64) for way in METHODS}
    zeros = {way: torch.tensor([float(g.zeros[way]) for g in groups]) for way in METHODS}
    descended = torch.stack([g.descended for g in groups if g.descended is not None])
    closed = torch.stack([g.closed for g in groups])
    exact, scaled, ridge_scaled = _exact_copies(x, y)
    figures = {
        "against lasso": over_seeds(uneven["lasso"] - uneven["dropout"]),
        "against least squares": over_seeds(uneven["least squares"] - uneven["dropout"]),
        "bound": Measured(max(g.bound for g in groups), 0.0),
        "descended": over_seeds(descended.sum(dim=1) / closed.sum(dim=1), predicted=1.0),
        "spread": over_seeds(_spread(descended, closed), predicted=1.0),
        "kept": Measured(float(zeros["dropout"].max()), 0.0),
        "lasso zeros": over_seeds(zeros["lasso"]),
        "exact": Measured(exact, 0.0),
        "units": Measured(scaled, 0.0),
        "ridge units": Measured(ridge_scaled, 0.0),
        **{f"uneven {way}": over_seeds(uneven[way]) for way in METHODS},
    }
    return Findings(
        figures=figures,
        charts=(_weights_chart(x, y, setting.seed, name), _noise_chart(x, y, setting, name, noises)),
        data=f"{name}, {len(x)} rows, columns standardised",
        setup=(
            f"{COPIES} copies of the feature that correlates most with the target, each with normal noise of "
            f"{NOISE:g} (correlation 0.99), {count} draws of it; p = {RATE:g}. Lasso and elastic net: "
            f"scikit-learn, at a strength of p times that which sets all to 0. Descents with masks of {walk:,} "
            "steps of 64 rows."
        ),
        remarks=(
            "Even copies are shared evenly by ridge as well; dropout does so in whatever unit each copy is "
            "given, as its penalty is the mean square.",
            "With p going to 0, or copies whose noise is large, nothing is shared: dropout splits evenly where "
            "1 - rho is small against p/q.",
            "Between copies that are alike to the last digit every split costs the lasso the same; which one it "
            "takes is the solver's choice.",
        ),
    )


def _grouped(x: NDArray[np.float64], y: NDArray[np.float64], noise: float, seed: int) -> NDArray[np.float64]:
    """Copies of the feature that correlates most with the target, each with noise of its own, then the other features;
    all standardised.
    """
    top = int(np.abs(x.T @ y).argmax())
    generator = np.random.default_rng([seed, 9])
    copies = x[:, [top]] + noise * generator.standard_normal((len(x), COPIES))
    return standardised(np.concatenate((copies, np.delete(x, top, axis=1)), axis=1))


def _group(
    x: NDArray[np.float64], y: NDArray[np.float64], noise: float, seed: int, steps: int | None = None
) -> Group:
    design = _grouped(x, y, noise, seed)
    found = measured_grouping(design, y)
    assert found.predicted is not None
    ways = {
        "dropout": found.predicted, "ridge": found.ridge, "elastic net": found.elastic_net,
        "lasso": found.lasso, "least squares": found.least_squares,
    }  # fmt: skip
    inside = {way: weights[:COPIES] for way, weights in ways.items()}
    pairs = [pair for pair in found.pairs if pair.first < COPIES and pair.second < COPIES]
    ended = None
    if steps is not None:
        ended = descend(design, y, RATE, repetitions=4, seed=seed, steps=steps).mean(dim=0)[:COPIES]
    return Group(
        uneven={
            way: float((w.max() - w.min()) / w.abs().mean().clamp(min=1e-300)) for way, w in inside.items()
        },
        zeros={way: int((w == 0).sum()) for way, w in inside.items()},
        bound=max((pair.apart / pair.bound for pair in pairs), default=0.0),
        descended=ended,
        closed=found.predicted[:COPIES],
    )


def measured_grouping(design: NDArray[np.float64], y: NDArray[np.float64]) -> Grouping:
    """The instrument on a linear model without a bias; columns and targets are centred already."""
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    return grouping(linear_network(weights, RATE), wide(design), wide(y), threshold=0.0)


def _spread(descended: Tensor, closed: Tensor) -> Tensor:
    """(R,) slope of where descent ended on the closed form, within the group: 1 where each copy got its own share."""
    left, right = (part - part.mean(dim=1, keepdim=True) for part in (descended, closed))
    return (left * right).sum(dim=1) / right.square().sum(dim=1)


def _exact_copies(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """How uneven exact copies are shared under dropout; and contributions (weight times unit) of exact copies in
    different units, under dropout and under ridge of the same mean strength.
    """
    targets, alike = wide(y), wide(_grouped(x, y, 0.0, 0))
    units = torch.tensor((*UNITS, *[1.0] * (alike.shape[1] - COPIES)), dtype=torch.float64)
    same = dropout_weights(alike, targets, RATE)[:COPIES]
    gram = (alike * units).T @ (alike * units)
    ridge = torch.linalg.solve(
        gram + RATE / (1 - RATE) * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64),
        (alike * units).T @ targets,
    )
    scaled = dropout_weights(alike * units, targets, RATE)
    return _uneven(same), _uneven((scaled * units)[:COPIES]), _uneven((ridge * units)[:COPIES])


def _uneven(weights: Tensor) -> float:
    return float((weights.max() - weights.min()) / weights.abs().mean())


def _weights_chart(x: NDArray[np.float64], y: NDArray[np.float64], seed: int, name: str) -> Chart:
    found = measured_grouping(_grouped(x, y, NOISE, seed), y)
    assert found.predicted is not None
    ways = (found.predicted, found.ridge, found.elastic_net, found.lasso, found.least_squares)
    places = tuple(float(i) for i in range(COPIES))
    return Chart(
        "group",
        f"Weights of {COPIES} copies (correlation 0.99) of one feature of {name}, p = {RATE:g}, one draw of "
        "their noise.",
        "copy", "weight",
        tuple(
            Series(way, places, tuple(w[:COPIES].tolist()), style="bars")
            for way, w in zip(METHODS, ways, strict=True)
        ),
        x_names=tuple(f"copy {i + 1}" for i in range(COPIES)),
    )  # fmt: skip


def _noise_chart(
    x: NDArray[np.float64], y: NDArray[np.float64], setting: Setting, name: str, noises: tuple[float, ...]
) -> Chart:
    found: dict[str, list[Measured]] = {way: [] for way in METHODS}
    for noise in noises:
        groups = [_group(x, y, noise, setting.seed + s) for s in range(setting.seeds)]
        for way in METHODS:
            found[way].append(over_seeds([g.uneven[way] for g in groups]))
    apart = tuple(noise**2 / (1 + noise**2) for noise in noises)
    return Chart(
        "correlation",
        f"How unevenly {COPIES} copies share the credit, against 1 - correlation: (largest - smallest weight) / "
        f"mean absolute weight. {name}, p = {RATE:g}, {setting.seeds} draws; bars are two standard errors.",
        "1 - correlation of two copies", "unevenness",
        tuple(
            measured_series(way, apart, found[way], "measured")
            for way in METHODS
        ),
        x_log=True, y_log=True,
    )  # fmt: skip


CLAIM = Claim(
    name="grouping",
    title="Correlated features share the credit",
    article=(
        "Like ridge and unlike an L1 penalty, dropout shrinks the weights of correlated features together, in "
        "place of picking one of them."
    ),
    prediction=(
        "Weights (X'X + (p/q) diag(X'X))^-1 X'y, which on columns of length 1 differ by at most (q/p) |y| "
        "sqrt(2 (1 - rho)); copies get equal shares, in any units (compare Zou and Hastie, 2005, theorem 1)."
    ),
    condition="The correlation is high against the rate: 1 - rho small beside p/q. As p goes to 0 nothing is shared.",
    rules=(
        Rule("against lasso", "unevenness of 4 copies under lasso minus under dropout", "above"),
        Rule("against least squares", "unevenness under least squares minus under dropout", "above"),
        Rule("bound", "largest difference of two weights over its bound", "below", bound=1.0),
        Rule("descended", "descent with masks: sum of the group's weights over the closed form's", "equal",
             relative=0.01),
        Rule("spread", "descent with masks: differences within the group over the closed form's", "equal",
             relative=0.05),
        Rule("kept", "weights of the group that dropout sets to 0, at most", "below", bound=0.5),
        Rule("lasso zeros", "weights of the group that lasso sets to 0, of 4", "above"),
        Rule("exact", "unevenness of exact copies under dropout", "below", bound=1e-8),
        Rule("units", "the same in units of 1, 2, 4, 8: weight times unit", "below", bound=1e-8),
        Rule("ridge units", "the same under ridge", "shown"),
        *(Rule(f"uneven {way}", f"unevenness under {way} (0: even, 4: all on one)", "shown") for way in METHODS),
    ),
    experiment=experiment,
    seconds=9.0,
)  # fmt: skip
