"""Dropout on the inputs of a linear model is an adaptive L2 penalty; to second order it is one elsewhere too."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.claim import Chart, Claim, Findings, Measured, Rule, Series, Setting
from dropkit.claims.data import images
from dropkit.claims.experiments.draws import measured_series
from dropkit.claims.experiments.linear import (
    descend,
    dropout_weights,
    linear_network,
    standardised_table,
    wide,
)
from dropkit.claims.experiments.networks import over_seeds
from dropkit.claims.experiments.second_order import (
    TRAINED,
    hidden_penalties,
    image_networks,
    logistic_penalty,
    over_prediction,
    penalty_figure,
    pixel_penalty,
)
from dropkit.measure import penalty

RATE = 0.3
SHIFT = 2.0  # standard deviations by which a feature is moved off its mean
LOUDER = 3.0  # times a feature is multiplied
LOGISTIC_RATES = (0.1, 0.2, 0.3)
ASKED = 0.1  # rate at which the hidden layer of a trained network is measured
REPETITIONS = 16


def experiment(
    setting: Setting,
    members: int | None = None,
    steps: int | None = None,
    rows: int = 2000,
    hidden: int = 32,
    epochs: int | None = None,
) -> Findings:
    """The penalty of a linear model, where descent with masks ends, logistic regression, and a hidden layer.

    Args:
        setting: seeds and length.
        members: masks a row; None: 400, in the long form 4 000.
        steps: of the descents; None: 4 000, in the long form 40 000.
        rows: training rows of the networks.
        hidden: their width.
        epochs: of their training; None: 20, in the long form 60.
    """
    count = members or (4000 if setting.full else 400)
    walk = steps or (40_000 if setting.full else 4000)
    name, x, y = standardised_table("concrete")
    design, targets = wide(x), wide(y)
    plain, closed = dropout_weights(design, targets, 0.0), dropout_weights(design, targets, RATE)
    reached = descend(x, y, RATE, repetitions=REPETITIONS, seed=setting.seed, steps=walk)
    logistic = {
        masked: [
            logistic_penalty(rate, under_masks=masked, members=count, seed=setting.seed)
            for rate in LOGISTIC_RATES
        ]
        for masked in (False, True)
    }
    pixels = pixel_penalty(RATE, rows, members=count // 4, seed=setting.seed)
    nets = image_networks(setting, rows, hidden, epochs or (60 if setting.full else 20))
    layers = {rate: hidden_penalties(nets, rate, members=count // 8) for rate in (ASKED, TRAINED)}
    figures = {
        "linear": penalty_figure(
            penalty(linear_network(plain, RATE), design, targets, members=count, seed=setting.seed)
        ),
        "reached": over_seeds(along(reached, plain, closed), predicted=1.0),
        **_loud(x, y, walk, setting.seed),
        **{f"logistic {rate:g}": one for rate, one in zip(LOGISTIC_RATES, logistic[False], strict=True)},
        **{f"with masks {rate:g}": one for rate, one in zip(LOGISTIC_RATES, logistic[True], strict=True)},
        "pixels": over_prediction(pixels),
        "hidden": over_seeds([one.value for one in layers[ASKED]], predicted=1.0),
        "hidden trained": over_seeds([one.value for one in layers[TRAINED]], predicted=1.0),
    }
    return Findings(
        figures=figures,
        charts=(_weights_chart(name, plain, closed, reached), _order_chart(name, logistic)),
        data=(
            f"{name}, {len(x)} rows (logistic: is the target above its median?); {images('mnist').name}, {rows} "
            "rows drawn for each seed, 300 test rows measured"
        ),
        setup=(
            f"{count} masks a row; {REPETITIONS} descents of {walk:,} steps of 64 rows, averaged; "
            f"{setting.seeds} networks with {hidden} hidden units trained with p = {TRAINED:g}."
        ),
        remarks=(
            "The article's sentence is on the linear model with squared error; the rules on logistic regression "
            "and on hidden layers judge how far its second-order form may be carried.",
            "Second order is an expansion in how far one dropped feature moves the logit, and not in the rate: "
            "where single features decide, part of the penalty is left out at every rate.",
            "What makes a feature pay is its mean square, and the unit it is measured in changes nothing: made "
            f"{LOUDER:g} times louder, a centred feature has a weight as many times smaller, with a penalty or "
            "without. Ridge lets loud features go free; against ridge, dropout is the stricter with them.",
            f"Moved {SHIFT:g} standard deviations off its mean a feature says the same, has five times the mean "
            "square, and loses far more of its weight.",
        ),
    )


def along(reached: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """(R,) how far each of (R, D) weights went from the one to the other: 0 at `start`, 1 at `end`."""
    way = end - start
    return (reached - start) @ way / (way @ way)


def _loud(x: NDArray[np.float64], y: NDArray[np.float64], steps: int, seed: int) -> dict[str, Measured]:
    """What happens to the weight of each feature in turn when it is moved off its mean, or made louder.

    The weight over its weight before; the mean over features, by the closed form. By descent: the feature with the
    largest weight, moved off its mean.
    """
    design, targets = wide(x), wide(y)
    before, plain_ridge = dropout_weights(design, targets, RATE, bias=True), _ridge(design, targets)
    moved, louder, against = [], [], []
    for j in range(design.shape[1]):
        shifted, loud = design.clone(), design.clone()
        shifted[:, j] += SHIFT
        loud[:, j] *= LOUDER
        moved.append(float(dropout_weights(shifted, targets, RATE, bias=True)[j] / before[j]))
        louder.append(float(LOUDER * dropout_weights(loud, targets, RATE, bias=True)[j] / before[j]))
        against.append(float(plain_ridge[j] / (LOUDER * _ridge(loud, targets)[j])))
    top = int(before.abs().argmax())
    x_moved = x.copy()
    x_moved[:, top] += SHIFT
    end = dropout_weights(wide(x_moved), targets, RATE, bias=True)[top]
    reached = descend(x_moved, y, RATE, repetitions=REPETITIONS, seed=seed, steps=steps, bias=True)
    return {
        "moved": over_seeds(moved),
        "moved reached": over_seeds(reached[:, top] / before[top], predicted=float(end / before[top])),
        "louder": Measured(float(np.mean(louder)), 0.0, 1.0),
        "against ridge": over_seeds(against),
    }


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Ridge with the mean of dropout's penalties, on centred columns."""
    gram = x.T @ x
    strength = RATE / (1 - RATE) * gram.diagonal().mean()
    return torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=x.dtype), x.T @ y)


def _weights_chart(name: str, plain: Tensor, closed: Tensor, reached: Tensor) -> Chart:
    places = range(len(plain))
    known = [
        Series(said, tuple(map(float, places)), tuple(weights.tolist()), style="points")
        for said, weights in (("least squares", plain), ("closed form", closed))
    ]
    return Chart(
        "weights",
        f"Weights of a linear model on {name} (columns standardised): least squares, the closed form with p = "
        f"{RATE:g}, and gradient descent with masks; bars are two standard errors over {REPETITIONS} runs.",
        "feature", "weight", (*known, measured_series("reached", places, [over_seeds(one) for one in reached.T])),
    )  # fmt: skip


def _order_chart(name: str, logistic: dict[bool, list[Measured]]) -> Chart:
    said = {False: "weights fitted without dropout", True: "weights fitted under masks"}
    return Chart(
        "second-order",
        f"Penalty over its second-order prediction, logistic regression on {name}; bars are two standard errors.",
        "rate p", "measured / predicted",
        tuple(
            measured_series(said[masked], LOGISTIC_RATES, [over_prediction(one) for one in found], "measured")
            for masked, found in logistic.items()
        ),
        level=1.0, level_name="second order",
    )  # fmt: skip


CLAIM = Claim(
    name="penalty",
    title="Dropout is an adaptive L2 penalty",
    article=(
        "On the inputs of a linear model with squared error dropout adds an L2 penalty whose strength for each "
        "weight is the mean square of its feature: loud features are shrunk more."
    ),
    prediction=(
        "E loss = loss + (p/q) sum_j w_j² mean(x_j²), and descent ends at (X'X + (p/q) diag(X'X))^-1 X'y; "
        "logistic regression and hidden layers to second order, 1/2 (p/q) sum_j d²L/de_j² (Wager et al., 2013; "
        "Wei et al., 2020)."
    ),
    condition=(
        "Squared error of a linear model. Loud means a large mean square, not a large variance: a centred "
        "feature keeps its share of the prediction in any unit, one far off its mean loses it. Elsewhere: "
        "features that matter little each."
    ),
    rules=(
        Rule("linear", "squared error that masks add to least squares", "equal"),
        Rule("reached", "how far descent with masks goes from least squares (0) to the closed form (1)", "equal",
             relative=0.01),
        Rule("moved", "weight of a feature moved 2 sd off its mean, over its weight before", "below", bound=1.0),
        Rule("moved reached", "the same for the largest weight, by descent, against the closed form", "equal",
             relative=0.02),
        Rule("louder", "share of the prediction of a feature made 3 times louder, over its share before", "equal"),
        Rule("against ridge", "ridge: share before over share after it is made 3 times louder", "below", bound=1.0),
        *(
            Rule(f"logistic {rate:g}", f"cross-entropy that masks add to logistic regression, p = {rate:g}", "equal",
                 relative=0.05)
            for rate in LOGISTIC_RATES
        ),
        *(
            Rule(f"with masks {rate:g}", f"the same at weights fitted under masks, p = {rate:g}", "shown")
            for rate in LOGISTIC_RATES
        ),
        Rule("pixels", "784 pixels, is the digit even, p = 0.3: added loss over its second order", "shown"),
        Rule("hidden", "hidden layer of a network, p = 0.1: added loss over its second order", "equal", relative=0.1),
        Rule("hidden trained", "the same at the p = 0.5 of its training", "shown"),
    ),
    experiment=experiment,
    seconds=13.0,
)  # fmt: skip
