"""From an encoded table to a trained network: divide the rows, choose how to train, train, keep the best epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dropkit.errors import DivergedError, OptionError, ShapeError, check_probability
from dropkit.training.checkpoint import Checkpoints
from dropkit.training.division import DIVISION, divide_rows, make_folds
from dropkit.training.network import LIKELIHOODS, Likelihood, NetworkSpec
from dropkit.training.records import Curve, Fold, Plan, Progress, Rows, Team, Trained
from dropkit.training.search import Candidate, Search, search_candidates
from dropkit.training.stack import train_stack

RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
SMALL = 250  # training rows below which fewer candidates compete for fewer steps
FOLDED_ROWS = 2000  # training rows up to which candidates are compared on several folds
SEARCH_ROWS = 10_000  # a longer table is searched on so many training rows, drawn evenly
Effort = Literal["quick", "normal", "thorough"]
EFFORTS: tuple[Effort, ...] = ("quick", "normal", "thorough")


@dataclass(frozen=True, slots=True)
class Fit:
    """A trained network and how it came about.

    Attributes:
        spec: shape and rates.
        network: in eval mode, at its best epoch; a Gaussian's mean and log variance are in the unit of y.
        weight_decay: with which it was trained.
        train_rows: row numbers it learned from, rising.
        validation_rows: row numbers it was stopped and chosen by, rising.
        curve: losses by epoch, nats a row, masks off, y in its own unit.
        search: what competed, or None where the rate was given.
        seed: all that chance depended on.
        plan: budget and learning rate of the training.
        operations: floating-point operations of all training steps, search included.
        interrupted: somebody stopped it; the network is the best until then.
        diverged: the optimizer step whose loss was no finite number, where the training ended; the network is the best
            until then. None: that did not happen to it.
    """

    spec: NetworkSpec
    network: nn.Sequential
    weight_decay: float
    train_rows: Rows
    validation_rows: Rows
    curve: Curve
    search: Search | None
    seed: int
    plan: Plan
    operations: int
    interrupted: bool
    diverged: int | None = None

    @property
    def best_epoch(self) -> int:
        """The epoch the weights are from."""
        return self.curve.best_epoch


def make_plan(rows: int, max_epochs: int | None, effort: Effort) -> Plan:
    """Budget, batch and patience for so many training rows. Depends on nothing else, so a seed says all.

    The batch grows like the square root of the rows; learning rate and averaging were chosen on validation rows of
    the UCI sets (see `benchmarks/uci.py`).
    """
    batch = int(np.clip(2 ** round(0.5 * np.log2(max(rows, 1)) + 0.7), 16, 1024))
    steps = max(1, rows // batch)
    wanted = {"quick": 500, "normal": 600 if rows < SMALL else 2500, "thorough": 10_000}[effort]
    least = {"quick": 10, "normal": 30, "thorough": 60}[effort]
    epochs = max_epochs or int(np.clip(wanted // steps, least, 400))
    every = -(-16 // steps)  # a look costs about as much as a few steps
    patience = max(6, -(-(100 if rows < SMALL else 300) // (steps * every)))
    return Plan(max_epochs=epochs, batch=batch, evaluate_every=every, patience=patience)


def make_candidates(
    rows: int,
    rate: float | Literal["auto"],
    hidden: tuple[int, ...] | None,
    weight_decay: float | None,
    effort: Effort,
) -> list[Candidate]:
    """Who competes. Few rows, few candidates: noise in the choice would cost more than the choice gains."""
    small = rows < SMALL or effort == "quick"
    long = rows > FOLDED_ROWS
    hiddens: list[tuple[int, ...]] = [(64, 64), (128, 128)] if long else [(32, 32), (64, 64)]
    decays: list[float] = [0.01, 0.1] if long else [0.01, 0.3]
    rates: list[float] = [0.0, 0.05, 0.2, 0.5] if small else list(RATES)
    inputs: list[float] = [0.0] if long else [0.0, 0.1]
    if effort == "thorough":
        decays, inputs = [0.001, 0.01, 0.1, 1.0], [0.0, 0.05, 0.1, 0.2]
    elif small:
        hiddens, decays, inputs = hiddens[-1:], [0.1], [0.0]
    if rate != "auto":
        rates, inputs, decays, hiddens = [rate], [0.0], [0.1], hiddens[-1:]
    hiddens = [hidden] if hidden is not None else hiddens
    decays = [weight_decay] if weight_decay is not None else decays
    return [Candidate(r, i, d, h) for h in hiddens for r in rates for i in inputs for d in decays]


def fit(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    *,
    likelihood: Likelihood,
    classes: int | None = None,
    rate: float | Literal["auto"] = "auto",
    seed: int = 0,
    rows: Sequence[int] | Rows | None = None,
    validation_rows: Sequence[int] | Rows | None = None,
    validation_share: float = 0.2,
    max_epochs: int | None = None,
    hidden: tuple[int, ...] | None = None,
    weight_decay: float | None = None,
    effort: Effort = "normal",
    progress: Callable[[Progress], None] | None = None,
    team: Team | None = None,
    checkpoints: Checkpoints | None = None,
) -> Fit:
    """Train a network with dropout on a table of numbers.

    Args:
        x: (N, D) float32, encoded and about of unit scale; may be a numpy.memmap of any length.
        y: (N,) float64 for a Gaussian, int64 class indices in [0, classes) for classes.
        likelihood: "gaussian" or "categorical".
        classes: number of classes C; by default the largest index plus one.
        rate: chance to drop a hidden unit, or "auto": candidates compete.
        seed: 64 bits; equal seeds give equal fits, bit for bit, on one machine.
        rows: row numbers that take part; the others are never looked at. By default all.
        validation_rows: row numbers among them to hold out; by default drawn.
        validation_share: part of the rows to draw, at most 20 000 of them.
        max_epochs: passes over the training rows, at most; by default from their number.
        hidden: width of each hidden layer; by default it competes too.
        weight_decay: likewise.
        effort: how many candidates and epochs.
        progress: called after each look at the networks; raise KeyboardInterrupt in it, or press Ctrl-C, to stop early.
        team: workers that train together, each on a slice of every batch; see `train_stack`.
        checkpoints: where the training is saved as it goes, and goes on from if something lies there: the fit is the
            one that nobody stopped, bit for bit.

    Returns:
        The fit; after an interrupt the best until then, with `interrupted` set.

    Raises:
        ShapeError: x and y do not match, or fewer than two rows.
        OptionError: an option outside what is allowed; the message says which.
        ProbabilityError: a rate outside [0, 1].
        DivergedError: the loss was no finite number any more before anything was learned.
        CheckpointError: the checkpoints are of other options or other data, or damaged.
    """
    n = _check(x, y, likelihood, classes, effort, validation_share, max_epochs, seed)
    outputs = 2 if likelihood == "gaussian" else int(classes if classes is not None else np.max(y) + 1)
    if rate != "auto":
        rate = check_probability(rate, "rate")
        if rate == 1:
            raise OptionError("rate=1 was given; a network without any unit cannot learn. Give less than 1.")
    taking = _row_numbers(rows, n, "rows", least=2) if rows is not None else np.arange(n)
    if validation_rows is None:
        validation = taking[divide_rows(y[taking], validation_share, likelihood=likelihood, seed=seed)]
    else:
        validation = _row_numbers(validation_rows, n, "validation_rows", least=1)
    train = np.setdiff1d(taking, validation)
    if not len(train) or not np.isin(validation, taking).all():
        raise OptionError(
            f"{len(validation)} validation rows of {len(taking)} were given; they are among the rows that take part, "
            "and leave at least one row to train on."
        )

    if checkpoints is not None:
        checkpoints = checkpoints.including(
            likelihood=likelihood, classes=outputs, rate=rate, seed=seed, max_epochs=max_epochs, hidden=hidden,
            weight_decay=weight_decay, effort=effort, data=_digest(x, y, train, validation),
        )  # fmt: skip
    candidates = make_candidates(len(train), rate, hidden, weight_decay, effort)
    plan = make_plan(len(train), max_epochs, effort)
    if len(candidates) == 1:
        winner, search, interrupted = None, None, False
    else:
        winner, search, fold, interrupted = _search(
            x, y, candidates, train, validation, likelihood, outputs, max_epochs, effort, seed, progress, team,
            checkpoints,
        )  # fmt: skip
        candidates = [search.chosen]
        if interrupted:  # the winner has seen the rows of the search alone
            train, validation = fold.train, fold.validation
    chosen = candidates[0]
    operations = 0 if search is None else search.operations
    if winner is None:
        spec = NetworkSpec(x.shape[1], chosen.hidden, outputs, chosen.rate, chosen.input_rate, likelihood)
        stack = train_stack(
            x, y, [spec], [chosen.weight_decay], [Fold(train, validation)], [0],
            plan=replace(plan, members=0), seed=seed, progress=progress, team=team,
            checkpoints=None if checkpoints is None else checkpoints.stage("fit"),
        )  # fmt: skip
        winner, interrupted = stack.trained[0], stack.interrupted
        operations += stack.operations
    if winner.diverged is not None and not winner.curve.best_epoch:
        raise DivergedError(
            f"the loss was no finite number any more at step {winner.diverged} of the training, before anything was "
            "learned. Look for huge or infinite values in x and y."
        )
    return Fit(
        winner.spec, winner.network(), chosen.weight_decay, train, validation, winner.curve, search, seed, plan,
        operations, interrupted, winner.diverged,
    )  # fmt: skip


def _search(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    candidates: list[Candidate],
    train: Rows,
    validation: Rows,
    likelihood: Likelihood,
    outputs: int,
    max_epochs: int | None,
    effort: Effort,
    seed: int,
    progress: Callable[[Progress], None] | None,
    team: Team | None,
    checkpoints: Checkpoints | None,
) -> tuple[Trained | None, Search, Fold, bool]:
    """Search on folds of a short table, or on one division of some rows of a long one.

    Returns:
        The winner where it need not be trained again, else None; the record; the winner's rows; interrupted.
    """
    folds, plan, rows = search_folds(train, validation, max_epochs, effort, seed)
    whole = rows == len(train) + len(validation)
    search, winner, interrupted = search_candidates(
        x,
        y,
        candidates,
        folds,
        likelihood=likelihood,
        outputs=outputs,
        plan=plan,
        seed=seed,
        progress=progress,
        team=team,
        checkpoints=checkpoints,
    )
    search = replace(search, rows=rows)
    return (winner if whole or interrupted else None), search, folds[0], interrupted


def search_folds(
    train: Rows, validation: Rows, max_epochs: int | None, effort: Effort, seed: int
) -> tuple[list[Fold], Plan, int]:
    """How the candidates for these rows are compared.

    Returns:
        The folds, on all rows or, of a long table, on some; how long each candidate trains; how many rows take part.
    """
    if len(train) > SEARCH_ROWS:
        generator = np.random.default_rng([seed, DIVISION, 2])
        train = np.sort(generator.choice(train, SEARCH_ROWS, replace=False))
        validation = np.sort(
            generator.choice(validation, min(len(validation), SEARCH_ROWS // 4), replace=False)
        )
    few = len(train) < SMALL or effort == "quick"
    count = 1 if len(train) > FOLDED_ROWS or len(train) < 10 else 3 if few else 4
    plan = make_plan(len(train), max_epochs, effort)
    return make_folds(train, validation, count, seed=seed), plan, len(train) + len(validation)


def _digest(x: NDArray[np.float32], y: NDArray[np.generic], *rows: Rows) -> str:
    """What tells this table, and how its rows are divided, from any other."""
    digest = hashlib.sha256(f"{x.shape} {x.dtype} {y.dtype}".encode())
    some = max(1, (1 << 26) // max(1, x[:1].nbytes))  # rows of 64 MiB: x may lie on disk
    for start in range(0, len(x), some):
        digest.update(np.ascontiguousarray(x[start : start + some]).data)
    for part in (y, *rows):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _row_numbers(given: Sequence[int] | Rows, n: int, name: str, least: int) -> Rows:
    """Row numbers, rising and each once."""
    numbers = np.unique(np.asarray(given, np.int64))
    if len(numbers) < least or numbers[0] < 0 or numbers[-1] >= n:
        raise OptionError(
            f"{name} with {len(numbers)} numbers was given; at least {least} from 0 to {n - 1} are needed."
        )
    return numbers


def _check(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    likelihood: Likelihood,
    classes: int | None,
    effort: Effort,
    share: float,
    max_epochs: int | None,
    seed: int,
) -> int:
    """Refuse what cannot be trained on; returns N."""
    if likelihood not in LIKELIHOODS:
        raise OptionError(f"likelihood={likelihood!r} was given; it is 'gaussian' or 'categorical'.")
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or x.shape[1] < 1:
        raise ShapeError(
            f"x of shape {x.shape} and y of shape {y.shape} were given; they are (N, D) and (N,), D >= 1."
        )
    if len(x) < 2:
        raise ShapeError(f"{len(x)} rows were given; one to learn from and one to validate are the least.")
    if effort not in EFFORTS:
        raise OptionError(f"effort={effort!r} was given; it is one of {', '.join(EFFORTS)}.")
    if not 0 < share < 1:
        raise OptionError(f"validation_share={share!r} was given; it lies strictly between 0 and 1.")
    if max_epochs is not None and max_epochs < 1:
        raise OptionError(f"max_epochs={max_epochs!r} was given; at least 1 is needed.")
    if not 0 <= seed < 1 << 64:
        raise OptionError(f"seed={seed!r} was given; a seed is a whole number of 64 bits, not negative.")
    if likelihood == "categorical":
        if not np.issubdtype(y.dtype, np.integer):
            raise ShapeError(f"y of dtype {y.dtype} was given; classes are counted by whole numbers from 0.")
        if int(y.min()) < 0 or (classes is not None and int(y.max()) >= classes):
            raise OptionError(f"class indices from {y.min()} to {y.max()} were given for {classes} classes.")
    elif not np.isfinite(y).all():
        raise OptionError("y has values that are not finite; leave those rows out.")
    return len(x)
