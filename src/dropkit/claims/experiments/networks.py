"""Perceptrons for the experiments: all rates and seeds of a setting are one batch of networks.

Weights, order of rows and (where asked) the training rows are a seed's own. Masks depend on row, step and site, and
not on the seed: two seeds rarely meet the same row in the same step, so their noise is as good as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dropkit.claims.claim import Measured, Series, critical
from dropkit.errors import OptionError
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

    @property
    def train_losses(self) -> Tensor:
        """(R, S) float64: loss on (at most 2 048 of) the training rows at the end, masks off, nats a row."""
        return torch.tensor([[one.curve.train[-1] for one in row] for row in self.trained]).double()

    @property
    def parameters(self) -> list[Tensor]:
        """For each layer weights (R S, in, out) and biases (R S, 1, out)."""
        flat = [one for row in self.trained for one in row]
        return [
            torch.stack([(one.weights[i][0].T if part == 0 else one.weights[i][1][None]) for one in flat])
            for i in range(len(flat[0].weights))
            for part in (0, 1)
        ]

    def outputs(
        self,
        x: NDArray[np.float32],
        member: int | None = None,
        rate: float | None = None,
        *,
        scaled: bool = True,
    ) -> Tensor:
        """(R, S, N, outputs): logits, or standardised mean and log variance.

        Args:
            x: (N, D) rows.
            member: of the committee; None for the plain networks.
            rate: at which the members drop, where not at the rate each was trained with.
            scaled: whether what a member keeps is divided by 1 - p; False only takes units away.
        """
        flat = [one for row in self.trained for one in row]
        first, parameters = flat[0].spec, self.parameters
        noise = None
        if member is not None:
            rates = site_rates([one.spec for one in flat])
            rates = rates if rate is None else [rates[0], *[torch.full_like(r, rate) for r in rates[1:]]]
            noise = [
                member_noise(r, width, seed=0, member=member, site=site)
                for r, width, site in zip(rates, first.widths, first.sites, strict=False)
            ]
            if not scaled:
                noise = [(one != 0).to(one) for one in noise]
        rows = max(1, CHUNK // (len(flat) * max(first.widths[1:])))
        found = []
        with torch.no_grad():
            for start in range(0, len(x), rows):
                part = torch.from_numpy(x[start : start + rows]).expand(len(flat), -1, -1)
                found.append(forward(parameters, part, first.likelihood, noise))
        whole = torch.cat(found, dim=1)
        return whole.reshape(len(self.rates), len(self.seeds), *whole.shape[1:])

    def last_hidden(self, x: NDArray[np.float32]) -> Tensor:
        """(R, S, N, U): the units that the output layer reads, nothing dropped."""
        parameters = self.parameters[:-2]
        h = torch.from_numpy(x).expand(len(self.rates) * len(self.seeds), -1, -1)
        with torch.no_grad():
            for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
                h = torch.relu(torch.baddbmm(bias, h, weight))
        return h.reshape(len(self.rates), len(self.seeds), *h.shape[1:])


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
    until: Sequence[int] | None = None,
    average: int = 0,
    folds: Sequence[Fold] | None = None,
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
        until: for each network (all seeds of the first rate, then of the next) the epoch that it ends at.
        average: steps over which the weights are averaged, which does what a falling learning rate would; 0: none.
        folds: rows to learn from, and a stream of weights and order, for each entry of `seeds`; None: a seed draws
            its rows.

    Raises:
        OptionError: folds and seeds differ in number.
    """
    folds = drawn_folds(len(x), seeds, rows, validation) if folds is None else folds
    if len(folds) != len(seeds):
        raise OptionError(f"{len(folds)} folds and {len(seeds)} seeds were given; each seed has one fold.")
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
        evaluate_every=evaluate_every, average=average, members=0, keep="last",
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
        epochs=until,
    ).trained
    grid = tuple(found[i : i + len(seeds)] for i in range(0, len(found), len(seeds)))
    return Networks(tuple(rates), tuple(seeds), grid)


def drawn_folds(
    length: int, seeds: Sequence[int], rows: int | None = None, validation: NDArray[np.int64] | None = None
) -> list[Fold]:
    """For each seed the training rows that it draws.

    Args:
        length: N, rows there are.
        seeds: of the draws; each is also the stream of its fold.
        rows: how many each draws, all where there are fewer; None: all but `validation`.
        validation: rows that nobody learns from.
    """
    held = np.empty(0, np.int64) if validation is None else validation
    free = np.setdiff1d(np.arange(length), held)
    draws = [np.sort(np.random.default_rng([seed, 77]).permutation(free)[:rows]) for seed in seeds]
    return [Fold(drawn, held, stream=seed) for drawn, seed in zip(draws, seeds, strict=True)]


def cross_entropy(outputs: Tensor, y: NDArray[np.integer]) -> Tensor:
    """(*networks, N, C) logits and (N,) classes -> (*networks) mean test loss, nats a row, float64."""
    return class_loss(outputs.log_softmax(dim=-1), y)


def class_loss(log_probabilities: Tensor, y: NDArray[np.integer]) -> Tensor:
    """(*networks, N, C) log probabilities and (N,) classes -> (*networks) mean loss, nats a row, float64."""
    picked = torch.as_tensor(y, dtype=torch.int64).expand(log_probabilities.shape[:-1])[..., None]
    return -log_probabilities.gather(-1, picked)[..., 0].double().mean(dim=-1)


def error_percent(outputs: Tensor, y: NDArray[np.integer]) -> Tensor:
    """(*networks, N, C) scores and (N,) classes -> (*networks) rows put into a wrong class, percent, float64."""
    wrong = outputs.argmax(dim=-1) != torch.as_tensor(y, dtype=torch.int64)
    return 100 * wrong.double().mean(dim=-1)


def over_seeds(
    values: Tensor | NDArray[np.floating] | Sequence[float], predicted: float | None = None
) -> Measured:
    """The mean over seeds with its standard error and degrees of freedom."""
    each = torch.as_tensor(values, dtype=torch.float64)
    error = float(each.std()) / len(each) ** 0.5
    return Measured(float(each.mean()), error, predicted, degrees=len(each) - 1)


def line(
    name: str, x: Sequence[float], values: Tensor, style: Literal["measured", "points", "bars"] = "measured"
) -> Series:
    """(X, S) values at X places as means over S seeds with 95 % intervals."""
    wide = values.double()
    half = critical(wide.shape[1] - 1) * wide.std(dim=1) / wide.shape[1] ** 0.5
    return Series(name, tuple(x), tuple(wide.mean(dim=1).tolist()), tuple(half.tolist()), style)
