"""Many networks of one shape, trained at once as one batched program.

The weights of K networks are stacked, (K, in, out), and a step is one batched matrix product a layer, one fused
optimizer call for all of them. Rates, weight decay, rows and the end of training are each network's own. The masks
of a network depend on seed, site, step and row id alone, so two networks that see the same rows share their random
bits (and a higher rate drops a superset), and a network trained in a stack is the network trained alone.

Cost of a step: 3 * 2 * K * B * sum(in * out) floating-point operations (forward, and twice that backward).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.errors import CheckpointError, DropkitWarning, OutputError
from dropkit.training.checkpoint import Checkpoints
from dropkit.training.interrupt import Interrupts
from dropkit.training.losses import LOSSES
from dropkit.training.network import NetworkSpec
from dropkit.training.program import forward, member_noise, site_draw, site_rates, training_noise
from dropkit.training.records import Curve, Fold, Plan, Progress, Rows, StackResult, Team, Trained
from dropkit.training.rows import Looks, Table, epoch_rows
from dropkit.training.state import RUNNING, StackState

ONE_THREAD = 50_000_000  # operations of a step below which waking a second thread costs more than it saves
# Between two checkpoints, where nobody says how many steps: some half a minute of one core. Operations are counted, and
# for each step what calling it costs, not seconds: a run saves at the same steps whatever else the machine does.
CHECKPOINT_WORK, STEP_WORK = 1_000_000_000_000, 40_000_000


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
    team: Team | None = None,
    checkpoints: Checkpoints | None = None,
) -> StackResult:
    """Train K networks of one shape at once; each ends with the weights of its best epoch.

    An epoch is floor(n / batch) steps over a fresh order of the fold's rows (n: the smallest fold's), so the few rows
    left over differ from epoch to epoch. Adam with decoupled weight decay; weights only, biases are free. A network
    whose loss is no finite number any more stops there, and ends with the best weights until then.

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
        team: workers that train these networks together, each on a slice of every batch; all get the same result,
            that of one worker up to the order in which the rows' gradients are summed.
        checkpoints: where the state is saved, and where this training goes on from if something lies there. The result
            is that of a training nobody stopped, bit for bit. The first worker of a team writes.

    Returns:
        The networks in the order of `specs`.

    Raises:
        CheckpointError: what lies there is of other networks, or damaged.
    """
    first = specs[0]
    table = Table(x, y, first.likelihood, folds)
    looks = Looks(table, folds, plan.curve_rows)
    batch = min(plan.batch, min(len(f.train) for f in folds))
    steps = min(len(f.train) for f in folds) // batch
    limits = [min(e, plan.max_epochs) for e in epochs or [plan.max_epochs] * len(specs)]
    state = StackState.fresh(specs, weight_decays, folds, fold_of, plan, seed)
    if checkpoints is not None:
        checkpoints = checkpoints.including(
            networks=_digest(specs, weight_decays, folds, fold_of, plan, seed, limits)
        )
        _resume(state, checkpoints, team)
    keys = [site_draw(site, seed=seed).tensors()[0][None] for site in first.sites]
    order: tuple[int, Rows] | None = None
    saved, whole, interrupted = (state.step, state.operations), True, False

    def save(*, last: bool) -> None:
        """Bring the state to disk, unless it lies there. A disk that is full costs no training before its end."""
        nonlocal saved
        if checkpoints is not None and whole and saved[0] != state.step and (team is None or not team.rank):
            try:
                checkpoints.save(state.step, networks=state)
            except OutputError as error:
                if last:
                    raise
                message = f"No checkpoint at step {state.step}; the training goes on: {error}"
                warnings.warn(message, DropkitWarning, stacklevel=2)
        saved = state.step, state.operations

    threads = torch.get_num_threads()
    try:
        with Interrupts() as interrupts:
            while not state.over:
                if checkpoints is not None and checkpoints.ended:  # by the workers of another process
                    raise KeyboardInterrupt
                wanted = threads if state.step_operations(batch) > ONE_THREAD else 1
                if torch.get_num_threads() != wanted:
                    torch.set_num_threads(wanted)
                epoch, i = divmod(state.step, steps)
                whole, event = False, None
                if i == 0 and state.closed < epoch:
                    due = epoch % plan.evaluate_every == 0 or epoch == plan.max_epochs or epoch in limits
                    if epoch == 0 or due:
                        event = _close(state, epoch, looks, limits, team, stage)
                    state.closed = epoch
                else:
                    if order is None or order[0] != epoch:
                        order = epoch, epoch_rows(folds, steps, batch, seed, epoch + 1)
                    train_step(state, table, order[1][:, i], keys, team)
                whole = True
                if event is not None and progress is not None and epoch:
                    progress(event)
                interrupts.answer()
                done = state.operations - saved[1] + STEP_WORK * (state.step - saved[0])
                if checkpoints is not None and (
                    checkpoints.due(state.step) if checkpoints.every else done >= CHECKPOINT_WORK
                ):
                    save(last=False)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        torch.set_num_threads(threads)
    save(last=True)

    trained = _finish(state, looks, table, seed)
    return StackResult(trained, state.operations, interrupted)


def _close(
    state: StackState, epoch: int, looks: Looks, limits: Sequence[int], team: Team | None, stage: str
) -> Progress:
    """The end of an epoch: follow the curves, keep better weights, count patience, let go who has stopped."""
    plan = state.plan
    seen = looks.both(state.shown, state.fold)
    if team is not None:  # the first worker's word, so that all stop alike whatever their processors round
        for losses in seen if team.rank else ():
            losses.zero_()
        team.sum_(seen)
    train, validation = (losses.double().numpy() for losses in seen)
    better = []
    for i, k in enumerate(state.live):
        if state.waited[i] > plan.patience:  # stopped, and not yet compacted away
            continue
        validates = looks.lengths[int(state.fold[i])] > 0
        loss = float(validation[i]) if validates else float("nan")
        state.curves[k].append((epoch, float(train[i]), loss))
        improves = not validates or loss < state.lowest[k]
        if improves or plan.keep == "last":
            better.append(i)
        if improves:
            state.waited[i] = 0
            state.lowest[k] = loss
        else:
            state.waited[i] += 1
        if epoch >= limits[k]:
            state.waited[i] = plan.patience + 1
    state.keep(better)
    running = state.running
    if epoch or not plan.max_epochs:
        state.over = epoch == plan.max_epochs or not running
    if epoch and not state.over and len(running) <= 0.75 * len(state.live):
        state.compact(running)
    return _progress(state, epoch, len(running), stage)


def _progress(state: StackState, epoch: int, live: int, stage: str) -> Progress:
    """What a caller is told after a look."""
    ahead = int(np.argmin(state.lowest))  # the first one where nothing validates
    best = float(state.lowest[ahead]) if np.isfinite(state.lowest[ahead]) else float("nan")
    spec, (_, train, validation) = state.specs[ahead], state.curves[ahead][-1]
    return Progress(
        stage, epoch, state.plan.max_epochs, live, len(state.specs), best, state.step, spec.hidden, spec.rate,
        spec.input_rate, train, validation,
    )  # fmt: skip


def train_step(
    state: StackState, table: Table, rows: Rows, keys: Sequence[Tensor], team: Team | None
) -> None:
    """One optimizer step of all live networks on row numbers (F, B)."""
    plan, step, batch = state.plan, state.step, rows.shape[1]
    if team is not None:
        rows = rows[:, team.rank * batch // team.size : (team.rank + 1) * batch // team.size]
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
    losses = LOSSES[table.likelihood](outputs, y).sum(dim=1) / batch
    total = losses.sum()
    for parameter in state.parameters:
        parameter.grad = None
    total.backward()
    if team is not None:
        losses = losses.detach().clone()
        team.sum_([*(p.grad for p in state.parameters if p.grad is not None), losses])
        total = losses.sum()
    with torch.no_grad():
        weights = state.parameters[::2]
        torch._foreach_mul_(weights, [1 - plan.learning_rate * state.decay[:, None, None]] * len(weights))
        state.optimizer.step()
        if state.averages:
            torch._foreach_lerp_(state.averages, state.parameters, max(1 / (step + 1), 1 / plan.average))
    state.step += 1
    state.operations += state.step_operations(batch)
    if not math.isfinite(total.item()):
        state.stop_diverged(losses.detach().isfinite())


def _resume(state: StackState, checkpoints: Checkpoints, team: Team | None) -> None:
    """Go on from the last good checkpoint; the workers of a team from the same one."""
    step = checkpoints.restore(networks=state)
    if team is None:
        return
    steps = torch.zeros(team.size, dtype=torch.float64)
    steps[team.rank] = step
    team.sum_([steps])
    if (steps != step).any():
        raise CheckpointError(
            f"the workers found checkpoints of steps {', '.join(f'{s:.0f}' for s in steps)} in {checkpoints.folder}. "
            "Give a folder that all of them see."
        )


def _digest(
    specs: Sequence[NetworkSpec], decays: Sequence[float], folds: Sequence[Fold], *rest: object
) -> str:
    """What tells these networks, and the rows they learn from, from any others."""
    digest = hashlib.sha256(repr((list(specs), list(decays), *rest)).encode())
    for fold in folds:
        for rows in (fold.train, fold.validation):
            digest.update(len(rows).to_bytes(8, "little") + np.ascontiguousarray(rows, "<i8").tobytes())
        digest.update(str(fold.stream).encode())
    return digest.hexdigest()


def _finish(state: StackState, looks: Looks, table: Table, seed: int) -> tuple[Trained, ...]:
    """Cut the buffer of best weights into networks and ask each one's committee about the validation rows."""
    specs, plan, fold = state.specs, state.plan, state.fold_of
    widths, count = specs[0].widths, len(specs)
    shapes = [s for before, after in pairwise(widths) for s in ((before, after), (1, after))]
    pieces = state.best.split([a * b for a, b in shapes], dim=1)
    parameters = [piece.reshape(count, *shape) for piece, shape in zip(pieces, shapes, strict=True)]
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
            (tuple(c) for c in zip(*state.curves[k], strict=True))
            if state.curves[k]
            else ((0,), (np.nan,), (np.nan,))
        )
        f, step = int(fold[k]), int(state.diverged[k])
        own = row_loss[k, : looks.lengths[f]].clone()
        curve = Curve(epochs, train, validation)
        trained.append(
            Trained(
                spec, weights, float(table.location[f]), float(table.scale[f]), curve, own,
                diverged=None if step == RUNNING else step,
            )
        )  # fmt: skip
    return tuple(trained)
