"""Many networks of one shape, trained at once as one batched program.

The weights of K networks are stacked, (K, in, out), and a step is one batched matrix product a layer, one fused
optimizer call for all of them. Rates, weight decay, rows and the end of training are each network's own. The masks
of a network depend on seed, site, step and row id alone, so two networks that see the same rows share their random
bits (and a higher rate drops a superset), and a network trained in a stack is the network trained alone.

Cost of a step: 3 * 2 * K * B * sum(in * out) floating-point operations (forward, and twice that backward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.training.losses import LOSSES
from dropkit.training.network import NetworkSpec
from dropkit.training.program import (
    forward,
    initial_weights,
    member_noise,
    site_draw,
    site_rates,
    training_noise,
)
from dropkit.training.records import Curve, Fold, Plan, Progress, Rows, StackResult, Trained
from dropkit.training.rows import Looks, Table, epoch_rows

ONE_THREAD = 50_000_000  # operations of a step below which waking a second thread costs more than it saves


@dataclass(slots=True)
class _State:
    """The networks still in the program. Position i is network `live[i]` of the caller's."""

    live: list[int]
    parameters: list[Tensor]
    averages: list[Tensor]
    optimizer: torch.optim.Optimizer
    fold: Tensor
    rates: list[Tensor]  # (K,) for each site
    noisy: list[bool]  # whether any network drops at the site
    decay: Tensor
    waited: NDArray[np.int64]


def train_stack(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    specs: Sequence[NetworkSpec],
    weight_decays: Sequence[float],
    folds: Sequence[Fold],
    fold_of: Sequence[int],
    *,
    plan: Plan,
    seed: int,
    epochs: Sequence[int] | None = None,
    progress: Callable[[Progress], None] | None = None,
    stage: str = "fit",
) -> StackResult:
    """Train K networks of one shape at once; each ends with the weights of its best epoch.

    An epoch is floor(n / batch) steps over a fresh order of the fold's rows (n: the smallest fold's), so the few rows
    left over differ from epoch to epoch. Adam with decoupled weight decay; weights only, biases are free.

    Args:
        x: (N, D) float32, encoded; may be a numpy.memmap, of which one batch of rows is read at a time.
        y: (N,) float, or int64 class indices.
        specs: K shapes that agree in all but their rates.
        weight_decays: K shares of the weights taken away each step, times the learning rate.
        folds: the ways of dividing the rows.
        fold_of: for each network the number of its fold.
        plan: how long and how fast.
        seed: 64 bits, all that chance depends on.
        epochs: for each network the epoch it ends at, at most `plan.max_epochs`.
        progress: called after each look.
        stage: handed on to `progress`.

    Returns:
        The networks in the order of `specs`.
    """
    count, first = len(specs), specs[0]
    table = Table(x, y, first.likelihood, folds)
    looks = Looks(table, folds, plan.curve_rows)
    batch = min(plan.batch, min(len(f.train) for f in folds))
    steps = min(len(f.train) for f in folds) // batch
    limits = [plan.max_epochs] * count if epochs is None else [min(e, plan.max_epochs) for e in epochs]

    streams = [folds[f].stream for f in fold_of]
    initial = initial_weights(first.widths, streams, seed)
    rates = site_rates(specs)
    state = _State(
        live=list(range(count)),
        parameters=initial,
        averages=[],
        optimizer=_optimizer(initial, plan),
        fold=torch.tensor(fold_of),
        rates=rates,
        noisy=[bool(r.any()) for r in rates],
        decay=torch.tensor(weight_decays),
        waited=np.zeros(count, np.int64),
    )
    if plan.average:
        state.averages = [p.detach().clone() for p in state.parameters]
    # Best weights lie in one buffer: a better network is one copy, which an interrupt cannot cut in two.
    best = torch.cat([p.detach().reshape(count, -1) for p in state.parameters], dim=1)
    lowest = np.full(count, np.inf)
    curves: list[list[tuple[int, float, float]]] = [[] for _ in range(count)]
    operations, interrupted, step = 0, False, 0

    def look(epoch: int) -> None:
        """Follow the curves, keep better weights, count patience."""
        shown = state.averages or state.parameters
        train, validation = (losses.double().numpy() for losses in looks.both(shown, state.fold))
        better = []
        for i, k in enumerate(state.live):
            if state.waited[i] > plan.patience:  # stopped, and not yet compacted away
                continue
            validates = looks.lengths[fold_of[k]] > 0
            loss = float(validation[i]) if validates else float("nan")
            curves[k].append((epoch, float(train[i]), loss))
            improves = not validates or loss < lowest[k]
            if improves or plan.keep == "last":
                better.append(i)
            if improves:
                state.waited[i] = 0
                lowest[k] = loss
            else:
                state.waited[i] += 1
            if epoch >= limits[k]:
                state.waited[i] = plan.patience + 1
        ids = torch.tensor([state.live[i] for i in better], dtype=torch.int64)
        best.index_copy_(0, ids, torch.cat([p.detach().reshape(len(p), -1)[better] for p in shown], dim=1))

    keys = [site_draw(site, seed=seed).tensors()[0][None] for site in first.sites]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads if _operations(state, batch) > ONE_THREAD else 1)
        look(0)
        for epoch in range(1, plan.max_epochs + 1):
            order = epoch_rows(folds, steps, batch, seed, epoch)
            for i in range(steps):
                _step(state, table, order[:, i], keys, plan, step)
                operations += _operations(state, batch)
                step += 1
            if epoch % plan.evaluate_every == 0 or epoch == plan.max_epochs or epoch in limits:
                look(epoch)
                running = [i for i in range(len(state.live)) if state.waited[i] <= plan.patience]
                if progress is not None:
                    best_loss = float(np.nanmin(lowest)) if np.isfinite(lowest).any() else float("nan")
                    progress(Progress(stage, epoch, plan.max_epochs, len(running), count, best_loss))
                if not running:
                    break
                if len(running) <= 0.75 * len(state.live):
                    state = _compact(state, running, plan)
                    torch.set_num_threads(threads if _operations(state, batch) > ONE_THREAD else 1)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        torch.set_num_threads(threads)

    trained = _finish(best, specs, fold_of, curves, looks, table, plan, seed)
    return StackResult(trained, operations, interrupted)


def _operations(state: _State, batch: int) -> int:
    """Floating-point operations of the matrix products of a step: forward, and twice that backward."""
    return 6 * batch * sum(weight.numel() for weight in state.parameters[::2])


def _optimizer(parameters: list[Tensor], plan: Plan) -> torch.optim.Optimizer:
    for p in parameters:
        p.requires_grad_()
    return torch.optim.Adam(parameters, lr=plan.learning_rate, fused=True)


def _compact(state: _State, running: list[int], plan: Plan) -> _State:
    """The same program without the networks that have stopped; the optimizer's moments move along."""
    rates = [r[running] for r in state.rates]
    parameters = [p.detach()[running].contiguous() for p in state.parameters]
    optimizer = _optimizer(parameters, plan)
    for new, old in zip(parameters, state.parameters, strict=True):
        optimizer.state[new] = {
            key: value[running].contiguous() if value.ndim else value
            for key, value in state.optimizer.state[old].items()
        }
    return _State(
        [state.live[i] for i in running],
        parameters,
        [a[running].contiguous() for a in state.averages],
        optimizer,
        state.fold[running],
        rates,
        [bool(r.any()) for r in rates],
        state.decay[running],
        state.waited[running],
    )


def _step(state: _State, table: Table, rows: Rows, keys: Sequence[Tensor], plan: Plan, step: int) -> None:
    """One optimizer step of all live networks on row numbers (F, B)."""
    x, y = table.take(rows)
    ids = torch.from_numpy(rows)
    if len(ids) > 1:
        ids, x, y = ids[state.fold], x[state.fold], y[state.fold]
    else:
        x = x.expand(len(state.live), *x.shape[1:])
    widths = [p.shape[1] for p in state.parameters[::2]]
    noise = [
        training_noise(rates, ids, width, key=key, step=step) if noisy else None
        for key, rates, noisy, width in zip(keys, state.rates, state.noisy, widths, strict=True)
    ]
    outputs = forward(state.parameters, x, table.likelihood, noise)
    # Networks share nothing, so the gradient of the sum is each one's own.
    loss = LOSSES[table.likelihood](outputs, y).mean(dim=1).sum()
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    with torch.no_grad():
        for weight in state.parameters[::2]:
            weight.mul_(1 - plan.learning_rate * state.decay[:, None, None])
        state.optimizer.step()
        if state.averages:
            torch._foreach_lerp_(state.averages, state.parameters, max(1 / (step + 1), 1 / plan.average))


def _finish(
    best: Tensor,
    specs: Sequence[NetworkSpec],
    fold_of: Sequence[int],
    curves: Sequence[list[tuple[int, float, float]]],
    looks: Looks,
    table: Table,
    plan: Plan,
    seed: int,
) -> tuple[Trained, ...]:
    """Cut the buffer of best weights into networks and ask each one's committee about the validation rows."""
    widths, count = specs[0].widths, len(specs)
    shapes = [s for before, after in pairwise(widths) for s in ((before, after), (1, after))]
    pieces = best.split([a * b for a, b in shapes], dim=1)
    parameters = [piece.reshape(count, *shape) for piece, shape in zip(pieces, shapes, strict=True)]
    fold = torch.tensor(fold_of)
    row_loss = torch.zeros(count, 0)
    if looks.validation and plan.members:
        sites = specs[0].sites
        rates = site_rates(specs)
        noise = [
            [
                member_noise(rates[i], widths[i], seed=seed, member=m, site=site)
                for i, site in enumerate(sites)
            ]
            for m in range(plan.members)
        ]
        row_loss = looks.losses(parameters, fold, looks.validation, noise)
    trained = []
    for k, spec in enumerate(specs):
        weights = tuple(
            (parameters[i][k].T.contiguous().clone(), parameters[i + 1][k, 0].clone())
            for i in range(0, len(parameters), 2)
        )
        epochs, train, validation = (
            (tuple(c) for c in zip(*curves[k], strict=True)) if curves[k] else ((0,), (np.nan,), (np.nan,))
        )
        own = row_loss[k, : looks.lengths[fold_of[k]]].clone()
        location, scale = float(table.location[fold_of[k]]), float(table.scale[fold_of[k]])
        trained.append(Trained(spec, weights, location, scale, Curve(epochs, train, validation), own))
    return tuple(trained)
