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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dropkit.masks import ops
from dropkit.masks.address import Draw, draw, masks
from dropkit.training.losses import LOSSES, bound_log_variance, committee_nll
from dropkit.training.network import NetworkSpec, build_network

Rows = NDArray[np.int64]
INITIAL_WEIGHTS, ROW_ORDER = 1, 2  # purposes: streams of random numbers that never meet
ONE_THREAD = 50_000_000  # operations of a step below which waking a second thread costs more than it saves
CACHE = 1 << 21  # floats of one layer's activations worth holding at once (8 MiB)
_NO_MEMBER = torch.zeros(1, dtype=torch.int64)


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
        learning_rate: of Adam, at its highest.
        patience: evaluations without a better validation loss after which a network stops.
        evaluate_every: epochs between evaluations.
        average: steps over which the weights are averaged (0: not at all).
        decay_to: the learning rate's last value as a share of the highest, reached along a cosine.
        members: size of the committee whose validation loss candidates are compared by.
        curve_rows: training rows, at most, on which the training loss is followed.
    """

    max_epochs: int = 100
    batch: int = 32
    learning_rate: float = 0.01
    patience: int = 15
    evaluate_every: int = 1
    average: int = 100
    decay_to: float = 1.0
    members: int = 16
    curve_rows: int = 2048


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
    """

    spec: NetworkSpec
    weights: tuple[tuple[Tensor, Tensor], ...]
    location: float
    scale: float
    curve: Curve
    row_loss: Tensor

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
    """

    stage: str
    epoch: int
    max_epochs: int
    live: int
    networks: int
    best: float


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


def training_noise(rates: Tensor, rows: Tensor, width: int, *, key: Tensor, step: int) -> Tensor:
    """What K networks multiply the units of a site by in a training step: 0 or 1 / (1 - p).

    The noise is made once a step and multiplied in, rather than asked for again in the backward pass: here many
    small networks share one call, and the call costs more than the memory.

    Args:
        rates: (K,) chances to drop, float64.
        rows: (K, B) int64 row ids, or (1, B) where all networks see the same rows: then the bits are made once.
        width: units of the site.
        key: (1,) the site's key, see `site_draw`.
        step: the rest of the address.

    Returns:
        (K, B, width); a row keeps its mask in whichever network, stack and batch it is.
    """
    return ops.dropout(torch.ones(1, rows.shape[1], width), key, _NO_MEMBER, rates, rows, step, 0, ())


def site_draw(site: str, *, seed: int, member: int | None = None) -> Draw:
    """The address of a site, as the layer of that name has it."""
    with masks(seed=seed, member=member):
        return draw(name=site)


def member_noise(rates: Tensor, width: int, *, seed: int, member: int, site: str) -> Tensor:
    """What thinned network `member` multiplies its units by, for each of K rates: (K, 1, width)."""
    where = site_draw(site, seed=seed, member=member)
    return ops.dropout(torch.ones(1, 1, width), where.key[None], where.member[None], rates, None, 0, 0, (0,))


def _forward(
    parameters: Sequence[Tensor], x: Tensor, likelihood: str, noise: Sequence[Tensor | None] | None = None
) -> Tensor:
    """(K, B, D) -> (K, B, outputs); site i is multiplied by noise[i], where there is one."""
    last = len(parameters) // 2 - 1
    h = x
    for i in range(last + 1):
        factor = None if noise is None else noise[i]
        h = h if factor is None else h * factor
        h = torch.baddbmm(parameters[2 * i + 1], h, parameters[2 * i])
        h = torch.relu(h) if i < last else h
    if likelihood == "gaussian":
        h = torch.stack((h[..., 0], bound_log_variance(h[..., 1])), dim=-1)
    return h


def _initial(widths: Sequence[int], streams: Sequence[int], seed: int) -> list[Tensor]:
    """Stacked fresh weights (He's normal law, output layer a tenth of it) and zero biases."""
    distinct: dict[int, list[Tensor]] = {}
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    for stream in dict.fromkeys(streams):
        generator = np.random.default_rng([seed, INITIAL_WEIGHTS, stream])
        distinct[stream] = []
        for i, (before, after) in enumerate(pairs):
            size = (2 / before) ** 0.5 if i < len(pairs) - 1 else 0.1 / before**0.5
            values = generator.standard_normal((before, after), dtype=np.float32) * np.float32(size)
            distinct[stream] += [torch.from_numpy(values), torch.zeros(1, after)]
    return [torch.stack([distinct[stream][i] for stream in streams]) for i in range(2 * len(pairs))]


class _Table:
    """Rows by number: standardised targets, and features that may lie on disk."""

    def __init__(self, x: NDArray[np.float32], y: NDArray[np.generic], likelihood: str, folds: Sequence[Fold]) -> None:
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
        y = self.y[rows]
        if self.likelihood == "gaussian":
            y = ((y - self.location[:, None]) / self.scale[:, None]).astype(np.float32)
        return x, torch.from_numpy(np.ascontiguousarray(y))


class _Looks:
    """The rows that every look of an evaluation goes over: validation rows, then some of the training rows."""

    def __init__(self, table: _Table, folds: Sequence[Fold], curve_rows: int) -> None:
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
        self, parameters: Sequence[Tensor], fold: Tensor, until: int | None = None,
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
                    found.append(loss(_forward(parameters, x, likelihood), y))
                    continue
                members = [loss(_forward(parameters, x, likelihood, member), y) for member in noise]
                found.append(committee_nll(torch.stack(members)))
            return torch.cat(found, dim=1) + self.unit[fold].unsqueeze(1)

    def both(self, parameters: Sequence[Tensor], fold: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) training and (K,) validation losses."""
        weighted = self.losses(parameters, fold) * self.weight[fold]
        return weighted[:, self.validation :].sum(1), weighted[:, : self.validation].sum(1)


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
    table = _Table(x, y, first.likelihood, folds)
    looks = _Looks(table, folds, plan.curve_rows)
    batch = min(plan.batch, min(len(f.train) for f in folds))
    steps = min(len(f.train) for f in folds) // batch
    limits = [plan.max_epochs] * count if epochs is None else [min(e, plan.max_epochs) for e in epochs]

    streams = [folds[f].stream for f in fold_of]
    initial = _initial(first.widths, streams, seed)
    rates = _site_rates(specs)
    state = _State(
        live=list(range(count)), parameters=initial, averages=[], optimizer=_optimizer(initial, plan),
        fold=torch.tensor(fold_of), rates=rates, noisy=[bool(r.any()) for r in rates], decay=torch.tensor(weight_decays), waited=np.zeros(count, np.int64),
    )
    if plan.average:
        state.averages = [p.detach().clone() for p in state.parameters]
    best = torch.cat([p.detach().reshape(count, -1) for p in state.parameters], dim=1)  # one buffer: one atomic copy
    lowest = np.full(count, np.inf)
    curves: list[list[tuple[int, float, float]]] = [[] for _ in range(count)]
    operations, interrupted, step = 0, False, 0

    def look(epoch: int) -> None:
        """Follow the curves, keep better weights, count patience."""
        shown = state.averages or state.parameters
        train, validation = (losses.double().numpy() for losses in looks.both(shown, state.fold))
        ended = [limits[k] <= epoch for k in state.live]
        counted = [len(curves[k]) == 0 or state.waited[i] <= plan.patience for i, k in enumerate(state.live)]
        better = [
            i for i, k in enumerate(state.live)
            if counted[i] and (validation[i] < lowest[k] or (looks.lengths[fold_of[k]] == 0 and epoch <= limits[k]))
        ]
        ids = torch.tensor([state.live[i] for i in better], dtype=torch.int64)
        flat = torch.cat([p.detach().reshape(len(state.live), -1) for p in shown], dim=1)
        best.index_copy_(0, ids, flat[better])
        for i, k in enumerate(state.live):
            if counted[i]:
                curves[k].append((epoch, float(train[i]), float(validation[i]) if looks.lengths[fold_of[k]] else np.nan))
            state.waited[i] = 0 if i in set(better) else state.waited[i] + 1
            if ended[i]:
                state.waited[i] = plan.patience + 1
            lowest[k] = min(lowest[k], validation[i]) if looks.lengths[fold_of[k]] else np.nan

    keys = [site_draw(site, seed=seed).key[None] for site in first.sites]
    small = 6 * count * batch * sum(p[0].numel() for p in state.parameters[::2]) < ONE_THREAD
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        look(0)
        for epoch in range(1, plan.max_epochs + 1):
            order = _epoch_rows(folds, steps, batch, seed, epoch)
            for i in range(steps):
                share = step / (steps * plan.max_epochs)
                rate = plan.learning_rate * (
                    plan.decay_to + (1 - plan.decay_to) * 0.5 * (1 + float(np.cos(np.pi * share)))
                )
                _step(state, table, order[:, i], keys, plan, step=step, rate=rate)
                operations += 6 * len(state.live) * batch * sum(p[0].numel() for p in state.parameters[::2])
                step += 1
            if epoch % plan.evaluate_every == 0 or epoch == plan.max_epochs or epoch in limits:
                look(epoch)
                running = [i for i in range(len(state.live)) if state.waited[i] <= plan.patience]
                if progress is not None:
                    finite = lowest[np.isfinite(lowest)]
                    progress(Progress(stage, epoch, plan.max_epochs, len(running), count,
                                      float(finite.min()) if finite.size else float("nan")))
                if not running:
                    break
                if len(running) <= 0.75 * len(state.live):
                    state = _compact(state, running, plan)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        torch.set_num_threads(threads)

    trained = _finish(best, specs, fold_of, curves, looks, table, plan, seed)
    return StackResult(trained, operations, interrupted)


def _site_rates(specs: Sequence[NetworkSpec]) -> list[Tensor]:
    """(K,) rates for each site, in the order of the pass."""
    hidden = torch.tensor([s.rate for s in specs], dtype=torch.float64)
    return [torch.tensor([s.input_rate for s in specs], dtype=torch.float64), *[hidden] * len(specs[0].hidden)]


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
            key: value[running].contiguous() if value.ndim else value for key, value in state.optimizer.state[old].items()
        }
    return _State(
        [state.live[i] for i in running], parameters, [a[running].contiguous() for a in state.averages],
        optimizer, state.fold[running], rates, [bool(r.any()) for r in rates], state.decay[running],
        state.waited[running],
    )


def _epoch_rows(folds: Sequence[Fold], steps: int, batch: int, seed: int, epoch: int) -> Rows:
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


def _step(
    state: _State, table: _Table, rows: Rows, keys: Sequence[Tensor], plan: Plan, *, step: int, rate: float
) -> None:
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
    outputs = _forward(state.parameters, x, table.likelihood, noise)
    loss = LOSSES[table.likelihood](outputs, y).mean(dim=1).sum()  # networks share nothing: a sum keeps them apart
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.param_groups[0]["lr"] = rate
    with torch.no_grad():
        for weight in state.parameters[::2]:
            weight.mul_(1 - rate * state.decay[:, None, None])
        state.optimizer.step()
        if state.averages:
            torch._foreach_lerp_(state.averages, state.parameters, max(1 / (step + 1), 1 / plan.average))


def _finish(
    best: Tensor, specs: Sequence[NetworkSpec], fold_of: Sequence[int], curves: Sequence[list[tuple[int, float, float]]],
    looks: _Looks, table: _Table, plan: Plan, seed: int,
) -> tuple[Trained, ...]:
    """Cut the buffer of best weights into networks and ask each one's committee about the validation rows."""
    widths, count = specs[0].widths, len(specs)
    shapes = [s for before, after in zip(widths[:-1], widths[1:], strict=True) for s in ((before, after), (1, after))]
    pieces = best.split([a * b for a, b in shapes], dim=1)
    parameters = [piece.reshape(count, *shape) for piece, shape in zip(pieces, shapes, strict=True)]
    fold = torch.tensor(fold_of)
    row_loss = torch.zeros(count, 0)
    if looks.validation and plan.members:
        sites = specs[0].sites
        rates = _site_rates(specs)
        noise = [
            [member_noise(rates[i], widths[i], seed=seed, member=m, site=site) for i, site in enumerate(sites)]
            for m in range(plan.members)
        ]
        row_loss = looks.losses(parameters, fold, looks.validation, noise)
    trained = []
    for k, spec in enumerate(specs):
        weights = tuple(
            (parameters[i][k].T.contiguous().clone(), parameters[i + 1][k, 0].clone()) for i in range(0, len(parameters), 2)
        )
        epochs, train, validation = (tuple(c) for c in zip(*curves[k], strict=True)) if curves[k] else ((0,), (np.nan,), (np.nan,))
        own = row_loss[k, : looks.lengths[fold_of[k]]].clone()
        location, scale = float(table.location[fold_of[k]]), float(table.scale[fold_of[k]])
        trained.append(Trained(spec, weights, location, scale, Curve(epochs, train, validation), own))
    return tuple(trained)
