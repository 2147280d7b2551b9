"""Perceptrons for the experiments: all rates and seeds of a setting are one batch of networks.

Weights, order of rows and (where asked) the training rows are a seed's own. Masks depend on row, step and site, and
not on the seed: two seeds rarely meet the same row in the same step, so their noise is as good as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dropkit.claims.claim import Measured
from dropkit.training import Fold, NetworkSpec, Plan, Trained, train_stack
from dropkit.training.network import Likelihood
from dropkit.training.program import forward, member_noise, site_rates

CHUNK = 1 << 22  # floats of the widest layer held at once


@dataclass(frozen=True, slots=True)
class Networks:
    """Trained perceptrons, one for each rate and seed.

    Attributes:
        rates: (R,) chances to drop a hidden unit.
        seeds: (S,).
        trained: R rows of S networks.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    trained: tuple[tuple[Trained, ...], ...]

    def network(self, rate: int, seed: int) -> nn.Sequential:
        """The torch module of the rate and the seed at these positions, in eval mode."""
        return self.trained[rate][seed].network()

    def outputs(self, x: NDArray[np.float32], member: int | None = None, rate: float | None = None) -> Tensor:
        """(R, S, N, outputs): logits, or standardised mean and log variance.

        Args:
            x: (N, D) rows.
            member: of the committee; None for the plain networks.
            rate: at which the members drop, where not at the rate each was trained with.
        """
        flat = [one for row in self.trained for one in row]
        first = flat[0].spec
        parameters = [
            torch.stack([(one.weights[i][0].T if part == 0 else one.weights[i][1][None]) for one in flat])
            for i in range(len(first.widths) - 1)
            for part in (0, 1)
        ]
        noise = None
        if member is not None:
            rates = site_rates([one.spec for one in flat])
            rates = rates if rate is None else [rates[0], *[torch.full_like(r, rate) for r in rates[1:]]]
            noise = [
                member_noise(r, width, seed=0, member=member, site=site)
                for r, width, site in zip(rates, first.widths, first.sites, strict=False)
            ]
        rows = max(1, CHUNK // (len(flat) * max(first.widths[1:])))
        found = []
        with torch.no_grad():
            for start in range(0, len(x), rows):
                part = torch.from_numpy(x[start : start + rows]).expand(len(flat), -1, -1)
                found.append(forward(parameters, part, first.likelihood, noise))
        whole = torch.cat(found, dim=1)
        return whole.reshape(len(self.rates), len(self.seeds), *whole.shape[1:])


def train(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    *,
    hidden: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    rows: int | None = None,
    input_rate: float | None = None,
    batch: int = 128,
    learning_rate: float = 0.001,
    weight_decay: float = 0.0,
    evaluate_every: int = 1,
    validation: NDArray[np.int64] | None = None,
    likelihood: Likelihood = "categorical",
) -> Networks:
    """Train len(rates) x len(seeds) perceptrons at once by Adam, without early stopping: the last weights count.

    Args:
        x: (N, D) float32; y: (N,) class indices, or numbers for a Gaussian.
        hidden: widths.
        rates: chances to drop a hidden unit.
        seeds: of weights, order of rows, and of which rows are taken.
        epochs: passes over the rows, for all the same.
        rows: training rows that each seed draws for itself; None: all but `validation`.
        input_rate: chance to drop an input where the hidden rate is not 0; None: none is dropped.
        batch, learning_rate, weight_decay, evaluate_every: as in `dropkit.training.Plan`.
        validation: rows that curves follow and nothing learns from.
        likelihood: "categorical" or "gaussian".
    """
    held = np.empty(0, np.int64) if validation is None else validation
    free = np.setdiff1d(np.arange(len(x)), held)
    folds = []
    for seed in seeds:
        drawn = np.random.default_rng([seed, 77]).permutation(free)[:rows]
        folds.append(Fold(np.sort(drawn), held, stream=seed))
    outputs = 2 if likelihood == "gaussian" else int(np.max(y)) + 1
    specs = [
        NetworkSpec(
            x.shape[1], tuple(hidden), outputs, rate, (input_rate or 0.0) if rate else 0.0, likelihood
        )
        for rate in rates
        for _ in seeds
    ]
    plan = Plan(
        max_epochs=epochs, batch=batch, learning_rate=learning_rate, patience=1 << 30,
        evaluate_every=evaluate_every, average=0, members=0, keep="last",
    )  # fmt: skip
    found = train_stack(
        x,
        y,
        specs,
        [weight_decay] * len(specs),
        folds,
        list(range(len(seeds))) * len(rates),
        plan=plan,
        seed=0,
    ).trained
    grid = tuple(found[i : i + len(seeds)] for i in range(0, len(found), len(seeds)))
    return Networks(tuple(rates), tuple(seeds), grid)


def over_seeds(
    values: Tensor | NDArray[np.floating] | Sequence[float], predicted: float | None = None
) -> Measured:
    """The mean over seeds with its standard error and degrees of freedom."""
    each = torch.as_tensor(values, dtype=torch.float64)
    error = float(each.std()) / len(each) ** 0.5
    return Measured(float(each.mean()), error, predicted, degrees=len(each) - 1)
