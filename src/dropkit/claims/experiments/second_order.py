"""The second-order form of the penalty, measured where it is not exact: logistic regression, and hidden layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import dropkit.nn as dnn
from dropkit.claims.claim import Measured, Setting
from dropkit.claims.data import images
from dropkit.claims.experiments.linear import linear_network, standardised_table, wide
from dropkit.claims.experiments.networks import Networks, train
from dropkit.masks import masks
from dropkit.measure import penalty
from dropkit.measure.penalty import Penalty

TRAINED = 0.5  # rate that networks are trained with
FITTED_UNDER = 50  # masks of each row, whose mean loss stands for that over all of them


def penalty_figure(found: Penalty) -> Measured:
    """The measured penalty beside its prediction."""
    assert found.predicted is not None
    error = 0.0 if found.predicted_error is None else float(found.predicted_error)
    return Measured(
        float(found.measured), float(found.standard_error), float(found.predicted), predicted_error=error
    )


def over_prediction(figure: Measured) -> Measured:
    """A figure over its prediction, which is then 1."""
    unit = figure.predicted
    assert unit
    return Measured(
        figure.value / unit, figure.standard_error / unit, 1.0, figure.degrees, figure.predicted_error / unit
    )


def logistic_penalty(rate: float, *, under_masks: bool, members: int, seed: int) -> Measured:
    """The penalty of a logistic regression on a table: is the target above its median?

    Args:
        rate: p of the masks on the inputs.
        under_masks: whether the weights were fitted under masks of this rate, or without.
        members: masks drawn for each row.
        seed: of the masks.
    """
    from sklearn.linear_model import LogisticRegression

    _, x, target = standardised_table("concrete")
    y = target > np.median(target)
    if under_masks:
        with masks(seed=seed, step=1):
            seen = dnn.Dropout(rate)(wide(np.tile(x, (FITTED_UNDER, 1)))).numpy()
        fitted = LogisticRegression(C=1e6, max_iter=1000).fit(seen, np.tile(y, FITTED_UNDER))
    else:
        fitted = LogisticRegression(max_iter=1000).fit(x, y)
    model = linear_network(wide(fitted.coef_[0]), rate, torch.tensor(fitted.intercept_[0]))
    return penalty_figure(penalty(model, wide(x), torch.from_numpy(y), members=members, seed=seed))


def pixel_penalty(rate: float, rows: int, *, members: int, seed: int) -> Measured:
    """The same of a logistic regression on many features: is a digit even? Fitted on `rows` images, asked of 300."""
    from sklearn.linear_model import LogisticRegression

    data = images("mnist")
    drawn = np.random.default_rng(seed).permutation(len(data.x_train))[:rows]
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(data.x_train[drawn], data.y_train[drawn] % 2)
    model = linear_network(wide(fitted.coef_[0]), rate, torch.tensor(float(fitted.intercept_[0])))
    x, y = wide(data.x_test[:300]), torch.from_numpy(data.y_test[:300] % 2 == 1)
    return penalty_figure(penalty(model, x, y, members=members, seed=seed))


def image_networks(setting: Setting, rows: int, hidden: int, epochs: int) -> Networks:
    """Networks of one hidden layer that learned to tell images apart with dropout of hidden units, one a seed."""
    data = images("mnist")
    seeds = range(setting.seed, setting.seed + setting.seeds)
    return train(
        data.x_train, data.y_train, hidden=(hidden,), rates=(TRAINED,), seeds=seeds, epochs=epochs, rows=rows
    )


def set_rate(network: nn.Module, rate: float) -> None:
    """Give another rate to each dropout of a network that drops."""
    for layer in network.modules():
        if isinstance(layer, dnn.Dropout) and layer.p:
            layer.p = rate


def hidden_penalties(nets: Networks, rate: float, *, members: int) -> list[Measured]:
    """The penalty of the hidden layer of each network at a rate, on 300 test images, over its second order."""
    data = images("mnist")
    x, y = wide(data.x_test[:300]), torch.from_numpy(data.y_test[:300])
    found = []
    for s, seed in enumerate(nets.seeds):
        network = nets.network(0, s).double()
        set_rate(network, rate)
        found.append(over_prediction(penalty_figure(penalty(network, x, y, members=members, seed=seed))))
    return found
