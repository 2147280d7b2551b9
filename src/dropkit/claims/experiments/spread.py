"""What the spread of masks at a fixed rate is, and is not: its limit with data, and its shape between clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dropkit.nn as dnn
from dropkit.claims.experiments.networks import Networks, train
from dropkit.committee import Committee
from dropkit.measure.linear import ridge

FEATURES, NOISE = 8, 0.5  # of the linear model; standard deviation of its target's noise


@dataclass(frozen=True, slots=True)
class LinearSpread:
    """Variances of a linear model's prediction, mean over the same fresh rows; (sizes, S seeds) each but the limit.

    Attributes:
        sizes: numbers of training rows N.
        committee: over masks, measured.
        posterior: of the Bayesian linear model with a flat prior and known noise, s^2 x'(X'X)^-1 x.
        limit: (S,) p q sum_j w_j^2 x_j^2 of the true weights.
    """

    sizes: tuple[int, ...]
    committee: NDArray[np.float64]
    posterior: NDArray[np.float64]
    limit: NDArray[np.float64]


def linear_spread(
    seeds: Sequence[int],
    *,
    rate: float,
    sizes: Sequence[int] = (30, 100, 300, 1000, 3000, 10000),
    members: int = 1000,
) -> LinearSpread:
    """Spread of a linear model with dropout on its features, as rows are added.

    Training leads to w = (X'X + p/q diag(X'X))^-1 X'y, for independent features to q w0 as N grows, and its members'
    variance p/q sum_j w_j^2 x_j^2 to

        p q sum_j w0_j^2 x_j^2,

    whatever N; a posterior's falls as 1/N.

    Args:
        seeds: each draws its own weights, rows and masks.
        rate: chance to drop a feature.
        sizes: N, ascending.
        members: of each committee.
    """
    committee, posterior, limit = (
        np.zeros(shape) for shape in ((len(sizes), len(seeds)),) * 2 + ((len(seeds),),)
    )
    for s, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(FEATURES, 1, generator=generator, dtype=torch.float64)
        design = torch.randn(sizes[-1], FEATURES, generator=generator, dtype=torch.float64)
        y = design @ weights + NOISE * torch.randn(sizes[-1], 1, generator=generator, dtype=torch.float64)
        fresh = torch.randn(64, FEATURES, generator=generator, dtype=torch.float64)
        limit[s] = rate * (1 - rate) * float((fresh.square() @ weights.square()).mean())
        for i, size in enumerate(sizes):
            own = design[:size]
            fitted = ridge(own, y[:size], rate / (1 - rate))
            committee[i, s] = members_variance(fitted, fresh, rate, members, seed=len(sizes) * seed + i)
            solved = torch.linalg.solve(own.T @ own, fresh.T)
            posterior[i, s] = NOISE**2 * float((fresh.T * solved).sum(dim=0).mean())
    return LinearSpread(tuple(sizes), committee, posterior, limit)


def members_variance(weights: Tensor, x: Tensor, rate: float, members: int, seed: int) -> float:
    """Variance over members of x w with masks on x, mean over rows."""
    linear = nn.Linear(len(weights), 1, bias=False, dtype=weights.dtype)
    with torch.no_grad():
        linear.weight.copy_(weights.T)
    network = nn.Sequential(dnn.Dropout(rate), linear)
    return float(Committee(network, members=members, seed=seed).predict(x).epistemic.mean())


def between_clusters(
    seeds: Sequence[int], *, rate: float, epochs: int = 400, members: int = 200, networks: int = 5
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variance midway between two clusters of rows over the mean of that at them: masks, and ensembles.

    One hidden layer, f(x) = b + sum_k w_k m_k relu(a_k x + c_k) with masks m_k: Var f(x) = p/q sum_k w_k^2 relu(...)^2
    is a sum of convex functions of x, so that the ratio is at most 1, whatever the weights.

    Args:
        seeds: of weights and order of rows; the rows are one set.
        rate: chance to drop a hidden unit.
        epochs: of training.
        members: of each committee.
        networks: of each ensemble.

    Returns:
        (S,) of committees and (S,) of ensembles trained without dropout.

    Source: Foong et al. 2020, arXiv:1909.00719, theorem 2.
    """
    generator = np.random.default_rng([seeds[0], 5])
    x = np.concatenate([centre + 0.1 * generator.standard_normal(40) for centre in (-1.5, 1.5)])
    y = np.sin(2 * x) + 0.1 * generator.standard_normal(len(x))
    rows = x[:, None].astype(np.float32)
    at = np.array([[-1.5], [0.0], [1.5]], np.float32)

    def trained(own_rate: float, own: Sequence[int]) -> Networks:
        return train(
            rows, y, hidden=(50,), rates=(own_rate,), seeds=own, epochs=epochs, batch=20, learning_rate=0.01,
            likelihood="gaussian", evaluate_every=epochs,
        )  # fmt: skip

    dropped = trained(rate, seeds)
    masked = torch.stack([dropped.outputs(at, member=m)[0, :, :, 0] for m in range(members)])
    many = range(networks * seeds[0], networks * (seeds[0] + len(seeds)))
    plain = trained(0.0, many).outputs(at)[0, :, :, 0]
    each = plain.reshape(len(seeds), networks, len(at)).transpose(0, 1)
    return _ratio(masked), _ratio(each)


def _ratio(samples: Tensor) -> NDArray[np.float64]:
    """(M, S, 3) -> (S,): variance at the middle place over the mean of that at the outer two."""
    variance = samples.double().var(dim=0)
    return np.asarray(2 * variance[:, 1] / (variance[:, 0] + variance[:, 2]))
