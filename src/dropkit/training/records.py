"""Records of training: which rows, how long, what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.training.network import NetworkSpec, build_network

Rows = NDArray[np.int64]


class Team(Protocol):
    """Workers that train one model: each takes its part of every batch, and what they find is summed."""

    @property
    def rank(self) -> int:
        """Which worker this is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the workers, added in the order of their ranks: equal bits for all."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Which rows train and which validate.

    Attributes:
        train: row numbers to learn from.
        validation: row numbers to stop and to choose by; empty: train to the last epoch.
        stream: names the initial weights and the order of the rows; folds with one number share both.
    """

    train: Rows
    validation: Rows
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train. Budgets count epochs, never seconds, so that a seed says all.

    Attributes:
        max_epochs: passes over the training rows, at most.
        batch: rows of a step.
        learning_rate: of Adam, constant: averaged weights do what a falling rate would, and need no known end.
        patience: evaluations without a better validation loss after which a network stops.
        evaluate_every: epochs between evaluations.
        average: steps over which the weights are averaged (0: not at all).
        members: size of the committee whose validation loss candidates are compared by.
        curve_rows: training rows, at most, on which the training loss is followed.
        keep: "best": the weights of the lowest validation loss; "last": those of the last look.
    """

    max_epochs: int = 100
    batch: int = 32
    learning_rate: float = 0.01
    patience: int = 15
    evaluate_every: int = 1
    average: int = 100
    members: int = 16
    curve_rows: int = 2048
    keep: Literal["best", "last"] = "best"


@dataclass(frozen=True, slots=True)
class Curve:
    """One network's way. Losses are in nats a row, masks off, for y in its own unit.

    Attributes:
        epochs: epoch numbers at which the network was looked at; 0 is the fresh network.
        train: loss on (at most `curve_rows` of) the training rows.
        validation: loss on the validation rows; NaN where there are none.
    """

    epochs: tuple[int, ...]
    train: tuple[float, ...]
    validation: tuple[float, ...]

    @property
    def best(self) -> int:
        """Position of the lowest validation loss (of the last look, where nothing validates)."""
        finite = [i for i, loss in enumerate(self.validation) if np.isfinite(loss)]
        return min(finite, key=self.validation.__getitem__) if finite else len(self.epochs) - 1

    @property
    def best_epoch(self) -> int:
        """Epoch of the lowest validation loss."""
        return self.epochs[self.best]

    @property
    def gap(self) -> float:
        """Generalisation gap at the best epoch: validation loss minus training loss, nats."""
        return self.validation[self.best] - self.train[self.best]

    @property
    def epochs_to_converge(self) -> int:
        """First epoch with 95 % of the fall of the validation loss from the fresh network to the best epoch."""
        lowest = self.validation[self.best]
        enough = lowest + 0.05 * (self.validation[0] - lowest)
        reached = (epoch for epoch, loss in zip(self.epochs, self.validation, strict=True) if loss <= enough)
        return next(reached, self.best_epoch)


@dataclass(frozen=True, slots=True)
class Trained:
    """One network of a stack, at its best epoch.

    Attributes:
        spec: its shape and rates.
        weights: for each layer the (out, in) matrix and the (out,) bias, as torch.nn.Linear has them.
        location, scale: mean and standard deviation of the training target (0 and 1 for classes).
        curve: how it came there.
        row_loss: (V,) committee loss of each validation row, nats; empty without validation rows.
        diverged: the optimizer step, counted from 1, whose loss was no finite number, where it stopped; or None.
    """

    spec: NetworkSpec
    weights: tuple[tuple[Tensor, Tensor], ...]
    location: float
    scale: float
    curve: Curve
    row_loss: Tensor
    diverged: int | None = None

    @property
    def committee_loss(self) -> float:
        """Mean committee loss on the validation rows, nats: what candidates are compared by."""
        return float(self.row_loss.mean()) if self.row_loss.numel() else float("nan")

    def network(self) -> torch.nn.Sequential:
        """The torch module with these weights, in eval mode."""
        with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and thrown away below
            network = build_network(self.spec, self.location, self.scale)
        linears = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad():
            for layer, (weight, bias) in zip(linears, self.weights, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        return network.eval()


@dataclass(frozen=True, slots=True)
class Progress:
    """What a caller is told while networks train.

    Attributes:
        stage: "search" or "fit".
        epoch: epochs done; max_epochs: epochs at most.
        live: networks still training; networks: of how many.
        best: lowest validation loss so far, nats (NaN without validation rows).
        step: optimizer steps done.
        hidden: width of each hidden layer of these networks.
        rate: of the network with that loss; input_rate: its other one. Without validation rows, the first network's.
        train, validation: that network's losses when it was last looked at, nats.
    """

    stage: str
    epoch: int
    max_epochs: int
    live: int
    networks: int
    best: float
    step: int
    hidden: tuple[int, ...]
    rate: float
    input_rate: float
    train: float
    validation: float

    @property
    def gap(self) -> float:
        """Generalisation gap of that network, nats: validation loss minus training loss."""
        return self.validation - self.train


@dataclass(frozen=True, slots=True)
class StackResult:
    """All networks of a stack.

    Attributes:
        trained: in the order they were asked for.
        operations: floating-point operations of all training steps.
        interrupted: somebody stopped it; each network is the best it had been until then.
    """

    trained: tuple[Trained, ...]
    operations: int
    interrupted: bool
