"""Linear models under dropout: their closed form, their descent, and the module around their weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dropkit.nn as dnn
from dropkit.claims.data import table
from dropkit.errors import OptionError
from dropkit.functional import dropout
from dropkit.masks import masks

SHARE = 0.25  # of the steps, after which the average begins


def descend(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    rate: float,
    *,
    repetitions: int,
    seed: int,
    steps: int = 4000,
    batch: int = 64,
    step_size: float = 0.01,
    bias: bool = False,
) -> Tensor:
    """Weights of linear models trained by stochastic gradient descent with dropout on the inputs, squared error.

    w_t+1 = w_t - step_size grad mean over the batch of (y - w . (m x / q) - b)^2

    and the result is the mean of w_t over the last three quarters of the steps. The mean of w_t over rows and masks
    follows plain descent on the mean loss, so that only the start of the path is a bias, and it decays exponentially.

    Args:
        x: (N, D), columns whose mean square is about 1.
        y: (N,).
        rate: p, chance to drop an input.
        repetitions: R, models with rows and masks of their own; all start at zero.
        seed: of rows and masks.
        steps, batch, step_size: of the descent.
        bias: whether each model has a number b that no mask touches.

    Returns:
        (R, D) float64, without the bias.

    Raises:
        OptionError: the descent did not stay finite; the step is too large for these columns.
    """
    rows, targets = wide(x), wide(y)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(repetitions, x.shape[1], dtype=torch.float64)
    free = torch.zeros(repetitions, dtype=torch.float64)
    total = torch.zeros_like(weights)
    begin = int(SHARE * steps)
    for step in range(steps):
        drawn = torch.randint(len(rows), (repetitions * batch,), generator=generator)
        with masks(seed=seed, step=step):
            noisy = dropout(rows[drawn], rate, site="inputs").view(repetitions, batch, -1)
        residual = (noisy @ weights.unsqueeze(2)).squeeze(2) + free[:, None] - targets[drawn].view(-1, batch)
        weights -= 2 * step_size / batch * (residual.unsqueeze(1) @ noisy).squeeze(1)
        if bias:
            free -= 2 * step_size * residual.mean(dim=1)
        if step >= begin:
            total += weights
    found = total / (steps - begin)
    if not bool(torch.isfinite(found).all()):
        raise OptionError(
            f"step_size={step_size} was given; the descent left all bounds. Give a smaller one."
        )
    return found


def dropout_weights(x: Tensor, y: Tensor, rate: float, bias: bool = False) -> Tensor:
    """The weights at which the mean loss of `descend` is least.

    w = (Xc'Xc + p/(1-p) diag(X'X))^-1 Xc'yc

    where c takes column means off for a model with a bias. The penalty keeps the mean *square*, as the mask falls on
    the inputs as they are.

    Args:
        x: (N, D) float64; y: (N,).
        rate: p, in [0, 1).
        bias: whether the model has one.

    Returns:
        (D,).

    Source: Srivastava et al. 2014, JMLR 15, section 9.1, with inverted scaling.
    """
    centred, targets = (x - x.mean(dim=0), y - y.mean()) if bias else (x, y)
    penalty = rate / (1 - rate) * torch.diag(x.square().sum(dim=0))
    return torch.linalg.solve(centred.T @ centred + penalty, centred.T @ targets)


def linear_network(weights: Tensor, rate: float, bias: Tensor | None = None) -> nn.Sequential:
    """Dropout of the inputs, then a linear layer: (B, D) -> (B, 1), float64.

    Args:
        weights: (D,).
        rate: p.
        bias: (), or None.
    """
    layer = nn.Linear(len(weights), 1, bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weights[None])
        if bias is not None:
            layer.bias.copy_(bias)
    network = nn.Sequential(dnn.Dropout(rate), layer)
    dnn.name_sites(network)
    return network


def wide(x: NDArray[np.floating]) -> Tensor:
    """A float64 copy in torch's own memory: the last digit of a product of matrices depends on where they begin, and
    numpy's memory begins anywhere.
    """
    return torch.tensor(x, dtype=torch.float64)


def standardised_table(name: str) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """Name, x (N, D) and y (N,) of a table, each column of mean 0 and variance 1."""
    known = table(name)
    return known.name, standardised(known.x), standardised(known.y[:, None])[:, 0]


def standardised(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Columns of mean 0 and variance 1; one that does not vary is left out."""
    x = np.asarray(x, np.float64)
    x = x[:, x.std(axis=0) > 0]
    return (x - x.mean(axis=0)) / x.std(axis=0)
