"""Rows by number: batches in a fresh order for each epoch, and the rows that every evaluation looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.training.losses import LOSSES, committee_nll
from dropkit.training.program import forward
from dropkit.training.records import Fold, Rows

ROW_ORDER = 2  # purpose: a stream of random numbers that meets no other
CACHE = 1 << 21  # floats of one layer's activations worth holding at once (8 MiB)


class Table:
    """Rows by number: standardised targets, and features that may lie on disk."""

    def __init__(
        self, x: NDArray[np.float32], y: NDArray[np.generic], likelihood: str, folds: Sequence[Fold]
    ) -> None:
        self.x, self.y, self.likelihood = x, y, likelihood
        self.location, self.scale = np.zeros(len(folds)), np.ones(len(folds))
        if likelihood == "gaussian":
            for i, fold in enumerate(folds):
                target = np.asarray(y[fold.train], np.float64)
                self.location[i], spread = target.mean(), target.std()
                # Rounding leaves a constant target a spread of about 1e-16 of its size: that is no spread.
                self.scale[i] = spread if spread > 1e-9 * max(1.0, abs(self.location[i])) else 1.0

    def take(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Row numbers (F, B) -> x (F, B, D) float32 and y (F, B), standardised fold by fold for a Gaussian."""
        x = torch.from_numpy(np.ascontiguousarray(self.x[rows], np.float32))
        y: NDArray[Any] = self.y[rows]
        if self.likelihood == "gaussian":
            y = ((y - self.location[:, None]) / self.scale[:, None]).astype(np.float32)
        return x, torch.from_numpy(np.ascontiguousarray(y))


class Looks:
    """The rows that every look of an evaluation goes over: validation rows, then some of the training rows."""

    def __init__(self, table: Table, folds: Sequence[Fold], curve_rows: int) -> None:
        parts = [(f.validation, f.train[:: -(-len(f.train) // curve_rows)]) for f in folds]
        self.validation = max(len(v) for v, _ in parts)
        length = self.validation + max(len(t) for _, t in parts)
        rows = np.zeros((len(folds), length), np.int64)  # padded by row 0 at weight 0
        weight = np.zeros((len(folds), length), np.float32)
        for i, (validation, train) in enumerate(parts):
            for start, part in ((0, validation), (self.validation, train)):
                rows[i, start : start + len(part)] = part
                weight[i, start : start + len(part)] = 1 / max(len(part), 1)
        self.table, self.rows, self.weight = table, rows, torch.from_numpy(weight)
        self.lengths = [len(v) for v, _ in parts]
        self.unit = torch.from_numpy(np.log(table.scale)).float()

    def losses(
        self,
        parameters: Sequence[Tensor],
        fold: Tensor,
        until: int | None = None,
        noise: Sequence[Sequence[Tensor | None]] | None = None,
    ) -> Tensor:
        """(K, rows) losses, in the unit of y; of a committee where noise is given, (M members)(sites)."""
        loss, likelihood = LOSSES[self.table.likelihood], self.table.likelihood
        until = self.rows.shape[1] if until is None else until
        chunk = max(64, CACHE // max(1, len(fold) * max(p.shape[-1] for p in parameters)))
        found = []
        with torch.no_grad():
            for start in range(0, until, chunk):
                x, y = self.table.take(self.rows[:, start : min(start + chunk, until)])
                x, y = (x[fold], y[fold]) if len(x) > 1 else (x.expand(len(fold), *x.shape[1:]), y)
                if noise is None:
                    found.append(loss(forward(parameters, x, likelihood), y))
                    continue
                members = [loss(forward(parameters, x, likelihood, member), y) for member in noise]
                found.append(committee_nll(torch.stack(members)))
            return torch.cat(found, dim=1) + self.unit[fold].unsqueeze(1)

    def both(self, parameters: Sequence[Tensor], fold: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) training and (K,) validation losses."""
        weighted = self.losses(parameters, fold) * self.weight[fold]
        return weighted[:, self.validation :].sum(1), weighted[:, : self.validation].sum(1)


def epoch_rows(folds: Sequence[Fold], steps: int, batch: int, seed: int, epoch: int) -> Rows:
    """(F, steps, B) row numbers: a fresh order for each fold, ascending within a batch (kind to a file on disk)."""
    orders: dict[int, Rows] = {}
    found = []
    for fold in folds:
        generator = np.random.default_rng([seed, ROW_ORDER, fold.stream, epoch])
        order = orders.setdefault(fold.stream, generator.permutation(len(fold.train)))
        if len(order) != len(fold.train):  # folds of one stream and another length need an order of their own
            order = generator.permutation(len(fold.train))
        found.append(np.sort(fold.train[order[: steps * batch]].reshape(steps, batch), axis=1))
    return np.stack(found)
