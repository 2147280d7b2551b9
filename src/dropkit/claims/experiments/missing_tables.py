"""Tables with holes for the experiments: what a network is given, and how it was prepared for holes.

A way of preparing is a set of training rows: the rows as they are, or `COPIES` copies of them with fresh holes by a
mechanism. Columns are standardised and a hole is filled by 0, their mean; where asked, columns of 0 and 1 say where
the holes are. All ways see each row equally often.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.data import Table
from dropkit.claims.experiments import networks
from dropkit.fields.missing import Mechanism, MissingInputs
from dropkit.training import Fold

COPIES, HIDDEN = 10, (64, 64)


@dataclass(frozen=True, slots=True)
class Way:
    """How a network is prepared.

    Attributes:
        mechanism: by which training rows lose cells; None: they are complete.
        indicators: whether the network is told where holes are.
        imputed: whether holes, of training and of test rows, are filled from the other columns (scikit-learn's
            IterativeImputer, which learns from training rows with holes), in place of the mean.
    """

    mechanism: Mechanism | None
    indicators: bool = False
    imputed: bool = False


def standardised(table: Table) -> tuple[Tensor, NDArray[np.float64]]:
    """Columns and target with mean 0 and standard deviation 1 over all rows; constant columns are left out."""
    spread = table.x.std(0)
    x = (table.x - table.x.mean(0))[:, spread > 0] / spread[spread > 0]
    return torch.from_numpy(x), (table.y - table.y.mean()) / table.y.std()


def test_errors(
    x: Tensor,
    y: NDArray[np.float64],
    splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    way: Way,
    holes: Mapping[str, Tensor],
    *,
    epochs: int,
) -> dict[str, Tensor]:
    """Root mean squared errors on the test rows, in standard deviations of the target.

    Args:
        x: (N, D) complete rows; y: (N,), both standardised.
        splits: S pairs of training and test rows; one network is trained for each, all as one batch.
        way: of preparing.
        holes: {name: (N, D) rows with NaN}, what the networks are tested on.
        epochs: passes over the copies.

    Returns:
        {name: (S,) errors}.
    """
    copies = [x if way.mechanism is None else way.mechanism.remove(x, seed=1 + i) for i in range(COPIES)]
    reader = MissingInputs(indicators=way.indicators)
    fill = _imputer(copies[0], splits) if way.imputed else lambda rows: rows
    rows = reader(fill(torch.cat(copies))).float().numpy()
    offsets = len(x) * np.arange(COPIES)[:, None]
    folds = [
        Fold((train + offsets).reshape(-1), np.empty(0, np.int64), i) for i, (train, _) in enumerate(splits)
    ]
    least = min(len(fold.train) for fold in folds)  # a stack's folds are of one size
    folds = [Fold(fold.train[:least], fold.validation, fold.stream) for fold in folds]
    trained = networks.train(
        rows, np.tile(y, COPIES), hidden=HIDDEN, rates=(0.0,), seeds=range(len(splits)), folds=folds,
        epochs=epochs, batch=256, learning_rate=0.003, average=200, likelihood="gaussian",
    )  # fmt: skip
    found = {}
    for name, spoiled in holes.items():
        outputs = trained.outputs(reader(fill(spoiled)).float().numpy())[0, :, :, 0]
        errors = []
        for i, (_, test) in enumerate(splits):
            one = trained.trained[0][i]
            mean = one.location + one.scale * outputs[i, test].double().numpy()
            errors.append(float(np.sqrt(np.mean((mean - y[test]) ** 2))))
        found[name] = torch.tensor(errors, dtype=torch.float64)
    return found


def _imputer(
    x: Tensor, splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> Callable[[Tensor], Tensor]:
    """Fill holes; learned from rows that no split tests on or, where there are few, from the first split."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401  (makes the import below possible)
    from sklearn.impute import IterativeImputer

    tested = np.unique(np.concatenate([test for _, test in splits]))
    learn = np.setdiff1d(np.arange(len(x)), tested)
    learn = learn if len(learn) > 10 * x.shape[1] else splits[0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten rounds are what was asked
        imputer = IterativeImputer(max_iter=10, random_state=0).fit(x[learn].numpy())
    return lambda rows: torch.from_numpy(imputer.transform(rows.numpy()))
