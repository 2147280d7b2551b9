"""The state of a stack of networks: all that a resumed run needs, in one record.

What is not here follows from it. The order of the rows is a function of seed and epoch, a mask one of seed, site,
step and row id, and a fold's division is given anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.training.network import NetworkSpec
from dropkit.training.program import initial_weights, site_rates
from dropkit.training.records import Fold, Plan

RUNNING = -1  # in `diverged`: the loss is a number


@dataclass(slots=True)
class StackState:
    """K networks in training, and how far they are. Position i in the program is network `live[i]` of the caller's.

    Attributes:
        specs, decays, fold_of, plan: what was asked for; never changed.
        live: the networks still in the program.
        parameters, averages: (L, in, out) and (L, 1, out) of the L live ones.
        optimizer: Adam, over `parameters`.
        waited: (L,) looks without a better validation loss; beyond the plan's patience a network has stopped.
        best: (K, weights) the weights to end with. One buffer: a better network is one copy.
        lowest: (K,) lowest validation loss so far.
        diverged: (K,) the step whose loss was no finite number any more, or RUNNING.
        curves: for each network (epoch, training loss, validation loss) of every look.
        step: optimizer steps done.
        closed: epochs whose end has been looked at; -1: not even the fresh networks.
        operations: floating-point operations of the steps done.
        over: there is nothing left to do.
        fold, decay, rates, noisy: of the live networks: (L,) their fold and weight decay; for each site (L,) chances to
            drop, float64, and whether there is any. They follow from `live`.
    """

    specs: Sequence[NetworkSpec]
    decays: Tensor
    fold_of: Tensor
    plan: Plan
    live: list[int]
    parameters: list[Tensor]
    averages: list[Tensor]
    optimizer: torch.optim.Optimizer
    waited: NDArray[np.int64]
    best: Tensor
    lowest: NDArray[np.float64]
    diverged: NDArray[np.int64]
    curves: list[list[tuple[int, float, float]]]
    step: int = 0
    closed: int = -1
    operations: int = 0
    over: bool = False
    fold: Tensor = field(init=False)
    decay: Tensor = field(init=False)
    rates: list[Tensor] = field(init=False)
    noisy: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.fold, self.decay = self.fold_of[self.live], self.decays[self.live]
        self.rates = site_rates([self.specs[k] for k in self.live])
        self.noisy = [bool(r.any()) for r in self.rates]

    @classmethod
    def fresh(
        cls,
        specs: Sequence[NetworkSpec],
        decays: Sequence[float],
        folds: Sequence[Fold],
        fold_of: Sequence[int],
        plan: Plan,
        seed: int,
    ) -> StackState:
        """K networks before their first step."""
        count = len(specs)
        parameters = initial_weights(specs[0].widths, [folds[f].stream for f in fold_of], seed)
        return cls(
            specs, torch.tensor(decays), torch.tensor(fold_of), plan, list(range(count)), parameters,
            averages=[p.detach().clone() for p in parameters] if plan.average else [],
            optimizer=make_optimizer(parameters, plan),
            waited=np.zeros(count, np.int64),
            best=torch.cat([p.detach().reshape(count, -1) for p in parameters], dim=1),
            lowest=np.full(count, np.inf),
            diverged=np.full(count, RUNNING),
            curves=[[] for _ in range(count)],
        )  # fmt: skip

    @property
    def shown(self) -> list[Tensor]:
        """The weights that are looked at and kept."""
        return self.averages or self.parameters

    @property
    def running(self) -> list[int]:
        """Positions of the networks that have not stopped."""
        return [i for i in range(len(self.live)) if self.waited[i] <= self.plan.patience]

    def step_operations(self, batch: int) -> int:
        """Floating-point operations of the matrix products of a step: forward, and twice that backward."""
        return 6 * batch * sum(weight.numel() for weight in self.parameters[::2])

    def keep(self, positions: list[int]) -> None:
        """The weights of now are the best so far of these."""
        ids = torch.tensor([self.live[i] for i in positions], dtype=torch.int64)
        weights = [p.detach().reshape(len(p), -1)[positions] for p in self.shown]
        self.best.index_copy_(0, ids, torch.cat(weights, dim=1))

    def stop_diverged(self, finite: Tensor) -> None:
        """Stop the networks whose loss, in the step just done, is no finite number.

        Args:
            finite: (L,) bool.
        """
        for i in torch.nonzero(~finite).flatten().tolist():
            if self.waited[i] <= self.plan.patience:
                self.waited[i] = self.plan.patience + 1
                self.diverged[self.live[i]] = self.step
        self.over = not self.running

    def compact(self, running: list[int]) -> None:
        """Go on without the networks that have stopped; the optimizer's moments move along."""
        moments = [
            {key: value[running].contiguous() if value.ndim else value for key, value in own.items()}
            for own in self._moments()
        ]
        self._replace(
            [self.live[i] for i in running],
            [p.detach()[running].contiguous() for p in self.parameters],
            [a[running].contiguous() for a in self.averages],
            moments,
            self.waited[running],
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data with tensors."""
        return {
            "live": self.live, "parameters": self.parameters, "averages": self.averages,
            "moments": self._moments(), "waited": self.waited, "best": self.best, "lowest": self.lowest,
            "diverged": self.diverged, "curves": self.curves, "step": self.step, "closed": self.closed,
            "operations": self.operations, "over": self.over,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take up a state of the same networks."""
        self._replace(
            state["live"], state["parameters"], state["averages"], state["moments"], state["waited"]
        )
        self.best, self.lowest, self.diverged = state["best"], state["lowest"], state["diverged"]
        self.curves, self.step, self.closed = state["curves"], state["step"], state["closed"]
        self.operations, self.over = state["operations"], state["over"]

    def _moments(self) -> list[dict[str, Tensor]]:
        return [dict(self.optimizer.state.get(p, {})) for p in self.parameters]

    def _replace(
        self,
        live: list[int],
        parameters: list[Tensor],
        averages: list[Tensor],
        moments: Sequence[Mapping[str, Tensor]],
        waited: NDArray[np.int64],
    ) -> None:
        optimizer = make_optimizer(parameters, self.plan)
        for parameter, own in zip(parameters, moments, strict=True):
            if own:
                optimizer.state[parameter] = dict(own)
        self.live, self.parameters, self.averages = live, parameters, averages
        self.optimizer, self.waited = optimizer, waited
        self.__post_init__()


def make_optimizer(parameters: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    """Adam over the stacked weights; weight decay is each network's own, and stands in the step."""
    for p in parameters:
        p.requires_grad_()
    return torch.optim.Adam(parameters, lr=plan.learning_rate, fused=True)
