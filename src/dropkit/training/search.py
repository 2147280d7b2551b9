"""`rate="auto"`: rates, weight decay and width compete on validation likelihood; no dropout always takes part.

Candidates of one width train in one stack, all folds at once. What is compared is the loss of a small committee on
the validation rows, because a committee is what the product will be; a network without dropout is a committee of
equals. Early stopping inside a candidate watches the cheaper loss with masks off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dropkit.training.checkpoint import Checkpoints
from dropkit.training.network import Likelihood, NetworkSpec
from dropkit.training.records import Fold, Plan, Progress, Team, Trained
from dropkit.training.stack import train_stack


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One way to train.

    Attributes:
        rate: chance to drop a hidden unit.
        input_rate: chance to drop an input.
        weight_decay: share of a weight taken away each step, times the learning rate.
        hidden: width of each hidden layer.
    """

    rate: float
    input_rate: float
    weight_decay: float
    hidden: tuple[int, ...]

    @property
    def drops(self) -> bool:
        """Whether any mask acts."""
        return self.rate > 0 or self.input_rate > 0

    @property
    def rates_in_words(self) -> str:
        """Such as "Rate 0.2 (inputs 0.1)"."""
        return f"Rate {self.rate:g}" + (f" (inputs {self.input_rate:g})" if self.input_rate else "")

    def __str__(self) -> str:
        widths = "x".join(map(str, self.hidden)) or "none"
        rates = f"rate {self.rate:g}, input rate {self.input_rate:g}"
        return f"{rates}, weight decay {self.weight_decay:g}, hidden {widths}"


@dataclass(frozen=True, slots=True)
class Trial:
    """How a candidate did; losses in nats a row, y in its own unit, averaged over folds.

    Attributes:
        candidate: what was tried.
        validation: committee loss on the validation rows.
        standard_error: of `validation`, from all validation rows of all folds.
        deterministic: validation loss with masks off at the best epoch.
        train: training loss with masks off at the best epoch.
        best_epoch: epoch of the lowest validation loss.
        epochs_to_converge: first epoch with 95 % of the fall of the validation loss.
    """

    candidate: Candidate
    validation: float
    standard_error: float
    deterministic: float
    train: float
    best_epoch: float
    epochs_to_converge: float

    @property
    def gap(self) -> float:
        """Generalisation gap, nats: validation minus training loss, both with masks off."""
        return self.deterministic - self.train


@dataclass(frozen=True, slots=True)
class Search:
    """What competed and what won.

    Attributes:
        trials: every candidate, in the order tried.
        chosen: the winner.
        advantage: loss of the best trial without any dropout minus the chosen one's, nats a row (0 where that is it).
        advantage_error: standard error of `advantage`, paired by validation row.
        folds: how many.
        rows: rows that took part; fewer than the table has where it is long.
        networks: how many were trained.
        operations: floating-point operations that took.
    """

    trials: tuple[Trial, ...]
    chosen: Candidate
    advantage: float
    advantage_error: float
    folds: int
    rows: int
    networks: int
    operations: int

    @property
    def verdict(self) -> str:
        """In words, whether dropout helped."""
        rates = self.chosen.rates_in_words
        by = f"{abs(self.advantage):.3f} nats a row (standard error {self.advantage_error:.3f})"
        if not self.chosen.drops:
            return "No dropout was best on the validation rows: no rate tried came within one standard error of it."
        if not any(not trial.candidate.drops for trial in self.trials):
            return f"{rates} was best of what had been reached when the search was stopped."
        if self.advantage <= 0:
            return (
                f"The best network without dropout validated better by {by}, which is within one standard error; "
                f"{rates[0].lower()}{rates[1:]} was taken all the same, because a committee needs masks to tell what "
                "it does not know."
            )
        doubt = ": within one standard error." if self.advantage <= self.advantage_error else "."
        return f"{rates} validated better than no dropout by {by}{doubt}"


def search_candidates(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    candidates: Sequence[Candidate],
    folds: Sequence[Fold],
    *,
    likelihood: Likelihood,
    outputs: int,
    plan: Plan,
    seed: int,
    progress: Callable[[Progress], None] | None = None,
    team: Team | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Search, Trained, bool]:
    """Train every candidate on every fold and choose.

    The rule: the lowest mean committee loss wins. Where that is a candidate without any dropout, the best one with
    dropout is taken instead if it is behind by no more than one standard error of their paired difference.

    Returns:
        The record; the winner's network of the first fold; whether somebody interrupted (then candidates that were
        not reached are missing from the record).
    """
    by_width: dict[tuple[int, ...], list[Candidate]] = {}
    for candidate in candidates:
        by_width.setdefault(candidate.hidden, []).append(candidate)
    results: dict[Candidate, list[Trained]] = {}
    operations, interrupted = 0, False
    for i, (hidden, group) in enumerate(by_width.items()):
        pairs = [(candidate, f) for candidate in group for f in range(len(folds))]
        specs = [NetworkSpec(x.shape[1], hidden, outputs, c.rate, c.input_rate, likelihood) for c, _ in pairs]
        stack = train_stack(
            x, y, specs, [c.weight_decay for c, _ in pairs], folds, [f for _, f in pairs],
            plan=plan, seed=seed, progress=progress, stage="search", team=team,
            checkpoints=None if checkpoints is None else checkpoints.stage(f"search-{i}"),
        )  # fmt: skip
        for (candidate, _), trained in zip(pairs, stack.trained, strict=True):
            results.setdefault(candidate, []).append(trained)
        operations += stack.operations
        if stack.interrupted:
            interrupted = True
            break
    search = choose(results, len(folds), sum(len(f.validation) for f in folds), operations)
    return search, results[search.chosen][0], interrupted


def _row_losses(networks: Sequence[Trained]) -> NDArray[np.float64]:
    """Committee loss of every validation row of every fold."""
    return np.concatenate([t.row_loss.double().numpy() for t in networks])


def _mean_error(values: NDArray[np.float64]) -> tuple[float, float]:
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
    return float(values.mean()), error


def choose(results: dict[Candidate, list[Trained]], folds: int, rows: int, operations: int) -> Search:
    """Compare the candidates by the rule of `search_candidates`."""
    losses = {candidate: _row_losses(networks) for candidate, networks in results.items()}
    trials = []
    for candidate, networks in results.items():
        mean, error = _mean_error(losses[candidate])
        curves = [t.curve for t in networks]
        trials.append(
            Trial(
                candidate, mean, error,
                deterministic=float(np.mean([c.validation[c.best] for c in curves])),
                train=float(np.mean([c.train[c.best] for c in curves])),
                best_epoch=float(np.mean([c.best_epoch for c in curves])),
                epochs_to_converge=float(np.mean([c.epochs_to_converge for c in curves])),
            )
        )  # fmt: skip
    order = sorted(trials, key=lambda t: (t.validation, t.candidate))
    without = [t.candidate for t in order if not t.candidate.drops]
    dropping = [t.candidate for t in order if t.candidate.drops]
    chosen = order[0].candidate
    if without and dropping and chosen == without[0]:
        behind, error = _mean_error(losses[dropping[0]] - losses[chosen])
        chosen = dropping[0] if behind <= error else chosen
    advantage, error = (0.0, 0.0)
    if without and chosen != without[0]:
        advantage, error = _mean_error(losses[without[0]] - losses[chosen])
    count = sum(len(networks) for networks in results.values())
    return Search(tuple(trials), chosen, advantage, error, folds, rows, count, operations)
