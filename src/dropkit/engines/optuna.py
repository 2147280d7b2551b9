"""Optuna: the search for a rate on one machine, with its trials on disk, so that it goes on where it stopped.

Given candidates come first, each a trial of its own; then Optuna proposes. A trial is what dropkit's own search makes
of a candidate: the same folds, weights, order of rows and masks, since all of them are functions of the seed. Only the
program that trains it differs, one candidate at a time in place of all at once.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit import records
from dropkit.errors import MissingPackageError, OptionError, check_probability
from dropkit.training import (
    Candidate,
    Curve,
    Fold,
    NetworkSpec,
    Progress,
    Search,
    Trained,
    divide_rows,
    train_stack,
)
from dropkit.training.fit import Effort, make_candidates, search_folds
from dropkit.training.network import Likelihood
from dropkit.training.records import Plan
from dropkit.training.search import choose

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState
except ImportError:
    raise MissingPackageError(
        "dropkit.engines.optuna needs the package optuna: pip install 'dropkit[optuna]'"
    ) from None

HIGHEST = 0.9  # rate that is proposed
Storage: TypeAlias = str | Path | optuna.storages.BaseStorage | None
Point = dict[str, Any]


def search_rates(
    objective: Callable[[float], float],
    rates: Sequence[float],
    *,
    storage: Storage = None,
    name: str = "rates",
    proposals: int = 0,
    highest: float = HIGHEST,
    seed: int = 0,
) -> dict[float, float]:
    """Try rates of anything: your model, your loop.

    Args:
        objective: rate -> loss, to be small; called once for each rate, even over several calls of this function.
        rates: tried first, in this order.
        storage: where trials lie: the path of a journal file, a database such as "sqlite:///rates.db", a storage of
            Optuna's, or None: nowhere. With the same storage and name, what is done there is not done again.
        name: of the study. Give another objective another name.
        proposals: how many rates Optuna's tree-structured Parzen estimator proposes beside those.
        highest: rate that is proposed, at most.
        seed: of the proposals. They depend on it and on the trials before, so a search that was stopped goes on as
            it would have gone.

    Returns:
        {rate: loss}, in the order tried; `min(found, key=found.get)` is the best.

    Raises:
        ProbabilityError: a rate outside [0, 1].
        OptionError: no rates, or a negative number of proposals.

    Example:
        >>> from dropkit.engines.optuna import search_rates
        >>> found = search_rates(lambda rate: (rate - 0.3) ** 2, [0.0, 0.2, 0.5])
        >>> min(found, key=found.get)
        0.2
    """
    wanted = [{"rate": check_probability(rate, "rate")} for rate in rates]
    top = max([check_probability(highest, "highest"), *(point["rate"] for point in wanted)])
    space: dict[str, BaseDistribution] = {"rate": FloatDistribution(0.0, top)}
    study = _open(storage, name, {"kind": "rates"})
    done = _run(study, wanted, space, proposals, seed, lambda trial, point: float(objective(point["rate"])))
    return {trial.params["rate"]: trial.value for trial in done}


def search_candidates(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    *,
    likelihood: Likelihood,
    classes: int | None = None,
    candidates: Sequence[Candidate] | None = None,
    storage: Storage = None,
    name: str = "dropkit",
    proposals: int = 0,
    seed: int = 0,
    effort: Effort = "normal",
    max_epochs: int | None = None,
    validation_share: float = 0.2,
    progress: Callable[[Progress], None] | None = None,
) -> Search:
    """The search of `dropkit.training.fit`, one candidate after another.

    Without proposals the record is the one that `fit` gives for the same table and seed, but for `operations`, and for
    losses that may differ in their last digits, as sums are added up in another order for fewer networks at once.

    Args:
        x, y, likelihood, classes, effort, max_epochs, validation_share, progress: as in `dropkit.training.fit`.
        candidates: by default those of `fit`.
        storage, name, proposals: as in `search_rates`. A study of another table, seed or effort is refused.
        seed: 64 bits.

    Returns:
        All that was tried, and what won by the rule of dropkit's own search.

    Raises:
        OptionError: the study in the storage is of other rows or options; or as in `search_rates`.
        ProbabilityError: a rate outside [0, 1].
    """
    numbers = np.arange(len(x))
    validation = numbers[divide_rows(y, validation_share, likelihood=likelihood, seed=seed)]
    train = np.setdiff1d(numbers, validation)
    folds, plan, rows = search_folds(train, validation, max_epochs, effort, seed)
    outputs = 2 if likelihood == "gaussian" else int(classes if classes is not None else np.max(y) + 1)
    wanted = list(candidates or make_candidates(len(train), "auto", None, None, effort))
    study = _open(
        storage, name, {"kind": "candidates", "run": _digest(x, y, folds, plan, seed, outputs, likelihood)}
    )

    def train_one(trial: optuna.Trial, point: Point) -> float:
        candidate = _candidate(point)
        spec = NetworkSpec(
            x.shape[1], candidate.hidden, outputs, candidate.rate, candidate.input_rate, likelihood
        )
        stack = train_stack(
            x, y, [spec] * len(folds), [candidate.weight_decay] * len(folds), folds, range(len(folds)),
            plan=plan, seed=seed, progress=progress, stage="search",
        )  # fmt: skip
        if stack.interrupted:
            raise KeyboardInterrupt
        trial.set_user_attr("operations", stack.operations)
        trial.set_user_attr("networks", [_to_plain(network) for network in stack.trained])
        return float(
            np.mean(np.concatenate([network.row_loss.double().numpy() for network in stack.trained]))
        )

    done = _run(study, [_point(c) for c in wanted], _space(wanted), proposals, seed, train_one)
    results = {}
    for trial in done:
        candidate = _candidate(trial.params)
        spec = NetworkSpec(
            x.shape[1], candidate.hidden, outputs, candidate.rate, candidate.input_rate, likelihood
        )
        results[candidate] = [_from_plain(value, spec) for value in trial.user_attrs["networks"]]
    operations = sum(trial.user_attrs["operations"] for trial in done)
    found = choose(results, len(folds), sum(len(f.validation) for f in folds), operations)
    return replace(found, rows=rows)


def _run(
    study: optuna.Study,
    wanted: Sequence[Point],
    space: dict[str, BaseDistribution],
    proposals: int,
    seed: int,
    objective: Callable[[optuna.Trial, Point], float],
) -> list[optuna.trial.FrozenTrial]:
    """Do what is not done: the points that are wanted, then proposals. All of them, each once, in the order asked."""
    if not wanted or isinstance(proposals, bool) or not isinstance(proposals, int) or proposals < 0:
        raise OptionError(
            f"{len(wanted)} rates or candidates and proposals={proposals!r} were given; at least one of the former "
            "is needed, and of proposals a whole number from 0 on."
        )

    def finished() -> list[optuna.trial.FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def one() -> None:
        study.optimize(lambda trial: objective(trial, _ask(trial, space)), n_trials=1)

    for point in wanted:
        while not any(trial.params == point for trial in finished()):
            # A killed process may have left another point in the queue, which is then done first.
            study.enqueue_trial(point)
            one()
    while len(more := [t for t in finished() if t.params not in wanted]) < proposals:
        # A sampler of its own for each trial: what is proposed hangs on the trials alone, not on when they were made.
        study.sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(finished())) % (1 << 32))
        one()
    of_wanted = [next(t for t in finished() if t.params == point) for point in wanted]
    return [*of_wanted, *more[:proposals]]


def _ask(trial: optuna.Trial, space: dict[str, BaseDistribution]) -> Point:
    """The point of a trial: the one that was enqueued, or a proposal."""
    point: Point = {}
    for key, kind in space.items():
        if isinstance(kind, FloatDistribution):
            point[key] = trial.suggest_float(key, kind.low, kind.high, log=kind.log)
        elif isinstance(kind, CategoricalDistribution):
            point[key] = trial.suggest_categorical(key, kind.choices)
    return point


def _open(storage: Storage, name: str, attributes: Point) -> optuna.Study:
    """The study of that name, new or as it was left."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=_storage(storage), study_name=name, load_if_exists=True)
    finally:
        optuna.logging.set_verbosity(level)
    for key, value in attributes.items():
        if study.user_attrs.setdefault(key, value) != value:
            raise OptionError(
                f"the study {name!r} in {storage} is one of other rows, options or kind. Give what was given then, or "
                "another name."
            )
        study.set_user_attr(key, value)
    return study


def _storage(given: Storage) -> str | optuna.storages.BaseStorage | None:
    if isinstance(given, str) and "://" in given:
        return given
    if isinstance(given, str | Path):
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(str(given)))
    return given


def _space(candidates: Sequence[Candidate]) -> dict[str, BaseDistribution]:
    """Where Optuna looks: rates up to 0.9, decays between those given, the widths given."""
    decays = [c.weight_decay for c in candidates]
    inputs = [c.input_rate for c in candidates]
    return {
        "rate": FloatDistribution(0.0, max(HIGHEST, *(c.rate for c in candidates))),
        "input_rate": FloatDistribution(0.0, max(inputs)),
        "weight_decay": FloatDistribution(min(decays), max(decays), log=min(decays) > 0),
        "hidden": CategoricalDistribution(tuple(sorted({_widths(c) for c in candidates}))),
    }


def _widths(candidate: Candidate) -> str:
    return "x".join(map(str, candidate.hidden))


def _point(candidate: Candidate) -> Point:
    return {**asdict(candidate), "hidden": _widths(candidate)}


def _candidate(point: Point) -> Candidate:
    hidden = tuple(int(width) for width in point["hidden"].split("x") if width)
    return Candidate(point["rate"], point["input_rate"], point["weight_decay"], hidden)


def _to_plain(network: Trained) -> Point:
    """What the choice needs of a network, for a storage: its curve, and the loss of each validation row."""
    losses = network.row_loss.numpy().astype("<f4").tobytes()
    return {"curve": records.finite(asdict(network.curve)), "row_loss": base64.b85encode(losses).decode()}


def _from_plain(value: Point, spec: NetworkSpec) -> Trained:
    losses = np.frombuffer(base64.b85decode(value["row_loss"]), "<f4").copy()
    curve: Curve = records.rebuild(Curve, value["curve"], "curve")
    return Trained(spec, (), 0.0, 1.0, curve, torch.from_numpy(losses))


def _digest(
    x: NDArray[np.float32], y: NDArray[np.generic], folds: Sequence[Fold], plan: Plan, *rest: object
) -> str:
    """What tells this search from any other."""
    digest = hashlib.sha256(repr((x.shape, plan, rest)).encode())
    for part in (y, *(rows for fold in folds for rows in (fold.train, fold.validation))):
        digest.update(np.ascontiguousarray(part).data)
    for start in range(0, len(x), 1 << 16):
        digest.update(np.ascontiguousarray(x[start : start + (1 << 16)]).data)
    return digest.hexdigest()
