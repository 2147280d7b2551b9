"""Test likelihoods on a UCI table: plain networks, weight scaling and averages of members, split by split.

The published splits and way of choosing are kept: the last 20 % of a split's training rows choose the rate and the
number of epochs, the network is trained again on all of them, and only then meets the test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.claims.data import Table
from dropkit.committee import Committee
from dropkit.training import Fold, NetworkSpec, Plan, Trained, committee_nll, gaussian_nll, train_stack

RATES = (0.005, 0.01, 0.05, 0.1)  # the published grid, for inputs and hidden units alike
HIDDEN = (50,)  # one layer, as published
VALIDATION_SHARE = 0.2
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # of committees, on the way to all members
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """One table, split by split.

    Attributes:
        name: of the table.
        plain: (S,) negative log-likelihood of networks trained without dropout, nats a row.
        scaled: (S,) of networks trained with dropout, without masks.
        average: (S,) of the average of their members.
        growth: {T: (S,)}, of the average of the first T members.
        rates: (S,) chosen for dropout.
        published: (S,) of the published Monte Carlo dropout; empty where there is none.
    """

    name: str
    plain: Floats
    scaled: Floats
    average: Floats
    growth: dict[int, Floats]
    rates: tuple[float, ...]
    published: Floats


def score(data: Table, splits: int, *, epochs: int, members: int, seed: int) -> Scores:
    """Choose on validation rows, train again on all training rows, and score on the test rows of each split."""
    divided = data.splits[:splits]
    rows = [train for train, _ in divided]
    plan = _plan(epochs, min(map(len, rows)))
    plain, dropped = chosen(data, rows, plan, seed)
    x, again = trained_again(data, rows, [*plain, *dropped], plan, seed)
    losses: dict[str, list[float]] = {"plain": [], "scaled": []}
    growth: dict[int, list[float]] = {t: [] for t in (*(t for t in SIZES if t < members), members)}
    for f, (_, test) in enumerate(divided):
        own, target = torch.from_numpy(x[test + f * len(data.x)]), torch.from_numpy(data.y[test])
        losses["plain"].append(plain_loss(again[f], own, target))
        losses["scaled"].append(plain_loss(again[len(rows) + f], own, target))
        # A committee of its own for each split: equal masks would make the splits' errors alike.
        each = member_losses(again[len(rows) + f], own, target, members, seed=100 * seed + f)
        for t, found in growth.items():
            found.append(float(committee_nll(each[:t]).mean()))
    return Scores(
        data.name, np.array(losses["plain"]), np.array(losses["scaled"]), np.array(growth[members]),
        {t: np.array(found) for t, found in growth.items()}, tuple(one.spec.rate for one in dropped),
        -data.published["test_ll"][: len(rows)] if data.published else np.empty(0),
    )  # fmt: skip


def chosen(
    data: Table, rows: Sequence[NDArray[np.int64]], plan: Plan, seed: int
) -> tuple[list[Trained], list[Trained]]:
    """For each split the network without dropout, and the one whose rate is best on validation rows.

    Args:
        data: the table.
        rows: for each split its training rows; the last 20 % in their order validate.
        plan: of all networks.
        seed: of weights, order and masks.
    """
    cuts = [round(len(train) * (1 - VALIDATION_SHARE)) for train in rows]
    shortened = [train[:cut] for train, cut in zip(rows, cuts, strict=True)]
    validation = [train[cut:] for train, cut in zip(rows, cuts, strict=True)]
    n, splits = len(data.x), range(len(rows))
    grid = [(rate, f) for rate in (0.0, *RATES) for f in splits]
    found = train_stack(
        _standardised(data.x, shortened), np.tile(data.y, len(rows)),
        [NetworkSpec(data.x.shape[1], HIDDEN, 2, rate, rate, "gaussian") for rate, _ in grid], [0.0] * len(grid),
        [Fold(shortened[f] + f * n, validation[f] + f * n, f) for f in splits], [f for _, f in grid],
        plan=plan, seed=seed,
    ).trained  # fmt: skip
    plain = list(found[: len(rows)])
    candidates = [found[f + len(rows) :: len(rows)] for f in splits]
    return plain, [min(own, key=lambda one: one.committee_loss) for own in candidates]


def trained_again(
    data: Table, rows: Sequence[NDArray[np.int64]], networks: Sequence[Trained], plan: Plan, seed: int
) -> tuple[NDArray[np.float32], tuple[Trained, ...]]:
    """The same networks on all training rows, each for as many epochs as its best one.

    Args:
        data: the table.
        rows: for each split its training rows.
        networks: those of all splits, one or several times over.
        plan, seed: as in `chosen`.

    Returns:
        Features, row i of split f in place f * N + i, and the networks.
    """
    x, n = _standardised(data.x, rows), len(data.x)
    ends = [max(1, one.curve.best_epoch) for one in networks]
    found = train_stack(
        x, np.tile(data.y, len(rows)), [one.spec for one in networks], [0.0] * len(networks),
        [Fold(own + f * n, np.empty(0, np.int64), f) for f, own in enumerate(rows)],
        [k % len(rows) for k in range(len(networks))],
        plan=replace(plan, max_epochs=max(ends), evaluate_every=max(ends)), seed=seed, epochs=ends,
    )  # fmt: skip
    return x, found.trained


def plain_loss(trained: Trained, x: Tensor, y: Tensor) -> float:
    """Mean negative log-likelihood of rows without masks, nats, for y in its own unit."""
    with torch.no_grad():
        return float(gaussian_nll(trained.network()(x).double(), y).mean())


def member_losses(trained: Trained, x: Tensor, y: Tensor, members: int, seed: int) -> Tensor:
    """(T, B) negative log-likelihoods of the rows under each member."""
    # At the lowest rates few members may all be whole networks: no mistake here.
    committee = Committee(
        trained.network(), members=members, seed=seed, likelihood="gaussian", allow=("no spread",)
    )
    prediction = committee.predict(x)
    mean, variance = prediction.samples.double(), prediction.noise.double()
    return gaussian_nll(torch.stack((mean, variance.log()), dim=-1), y)


def _plan(epochs: int, rows: int) -> Plan:
    if rows < 2000:
        return Plan(max_epochs=epochs, batch=32, patience=50, members=32, curve_rows=256)
    return Plan(max_epochs=min(epochs, 100), batch=128, patience=25, members=32, curve_rows=256)


def _standardised(x: Floats, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """(S * N, D): for each split a copy, centred and scaled by its own rows."""
    copies = []
    for own in rows:
        spread = x[own].std(axis=0)
        copies.append((x - x[own].mean(axis=0)) / np.where(spread > 0, spread, 1.0))
    return np.concatenate(copies).astype(np.float32)
