"""Ray Tune: the search for a rate over the machines of a Ray cluster, each candidate a trial of its own.

Candidates share nothing, so nothing passes between trials. A trial is what dropkit's own search makes of its candidate:
the same folds, weights, order of rows and masks, since all of them are functions of the seed. A trial whose worker dies
is started anew and goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dropkit.engines.ray_parts import start_ray, told_by
from dropkit.engines.ray_train import check_installed
from dropkit.engines.workers import RESTARTS, check_workers
from dropkit.errors import EngineError, OptionError, check_probability
from dropkit.training import (
    Candidate,
    Checkpoints,
    Fold,
    NetworkSpec,
    Plan,
    Search,
    StackResult,
    divide_rows,
    train_stack,
)
from dropkit.training.fit import Effort, make_candidates, search_folds
from dropkit.training.network import Likelihood
from dropkit.training.search import choose

LOSS = "loss"


def search_rates(
    objective: Callable[[float], float], rates: Sequence[float], *, folder: str | Path, workers: int = 2
) -> dict[float, float]:
    """Try rates of anything: your model, your loop, each on a CPU of the cluster.

    Args:
        objective: rate -> loss, to be small. It travels to the workers by Ray's own serialisation.
        rates: to be tried, each once.
        folder: for Ray's records; all machines must see it.
        workers: trials at a time.

    Returns:
        {rate: loss}, in the order given; `min(found, key=found.get)` is the best.

    Raises:
        MissingPackageError: Ray, or what Ray Tune needs, is not installed.
        ProbabilityError: a rate outside [0, 1].
        OptionError: no rates, or fewer than one worker.
        EngineError: a trial failed; its own error is told.
    """
    wanted = list(dict.fromkeys(check_probability(rate, "rate") for rate in rates))
    if not wanted:
        raise OptionError("no rates were given; at least one is needed.")

    def trial(config: Mapping[str, Any]) -> dict[str, float]:
        return {LOSS: float(objective(wanted[config["number"]]))}

    losses = _run(trial, len(wanted), Path(folder), workers, {})
    return dict(zip(wanted, losses, strict=True))


def search_candidates(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    *,
    likelihood: Likelihood,
    folder: str | Path,
    workers: int = 2,
    classes: int | None = None,
    candidates: Sequence[Candidate] | None = None,
    seed: int = 0,
    effort: Effort = "normal",
    max_epochs: int | None = None,
    validation_share: float = 0.2,
) -> Search:
    """The search of `dropkit.training.fit`, each candidate on a CPU of the cluster.

    The record is the one that `fit` gives for the same table and seed, but for losses that may differ in their last
    digits, as sums are added up in another order for fewer networks at once. The number of workers changes nothing.

    Args:
        x, y: as in `dropkit.training.fit`. They travel to the workers through Ray's store of objects.
        likelihood, classes, effort, max_epochs, validation_share: as there.
        folder: for checkpoints and Ray's records; all machines must see it. Trials that are done there are not done
            again.
        workers: trials at a time.
        candidates: by default those of `fit`.
        seed: 64 bits.

    Returns:
        All that was tried, and what won by the rule of dropkit's own search.

    Raises:
        MissingPackageError: Ray, or what Ray Tune needs, is not installed.
        OptionError: no candidates, or fewer than one worker.
        CheckpointError: the folder holds trials of other rows or options.
        EngineError: a trial failed; its own error is told.
    """
    numbers = np.arange(len(x))
    validation = numbers[divide_rows(y, validation_share, likelihood=likelihood, seed=seed)]
    train = np.setdiff1d(numbers, validation)
    folds, plan, rows = search_folds(train, validation, max_epochs, effort, seed)
    outputs = 2 if likelihood == "gaussian" else int(classes if classes is not None else np.max(y) + 1)
    wanted = (
        make_candidates(len(train), "auto", None, None, effort) if candidates is None else list(candidates)
    )
    if not wanted:
        raise OptionError("no candidates were given; at least one is needed.")
    place = Path(folder).resolve()
    shared = {
        "x": x, "y": y, "candidates": wanted, "likelihood": likelihood, "outputs": outputs, "folds": folds,
        "plan": plan, "seed": seed, "place": place,
    }  # fmt: skip
    _run(_train_trial, len(wanted), place, workers, shared)
    # The networks lie in the checkpoints of the trials: gone on from, there is nothing left to train.
    done = [train_candidate(number, **shared) for number in range(len(wanted))]  # type: ignore[arg-type]
    results = {candidate: list(stack.trained) for candidate, stack in zip(wanted, done, strict=True)}
    held = sum(len(fold.validation) for fold in folds)
    search = choose(results, len(folds), held, sum(stack.operations for stack in done))
    return replace(search, rows=rows)


def train_candidate(
    number: int,
    *,
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    candidates: Sequence[Candidate],
    likelihood: Likelihood,
    outputs: int,
    folds: Sequence[Fold],
    plan: Plan,
    seed: int,
    place: Path,
) -> StackResult:
    """One candidate on all folds, from its last checkpoint on."""
    candidate = candidates[number]
    spec = NetworkSpec(
        x.shape[1], candidate.hidden, outputs, candidate.rate, candidate.input_rate, likelihood
    )
    checkpoints = Checkpoints(place / f"candidate-{number}")
    return train_stack(
        x, y, [spec] * len(folds), [candidate.weight_decay] * len(folds), folds, range(len(folds)), plan=plan,
        seed=seed, stage="search", checkpoints=checkpoints,
    )  # fmt: skip


def _train_trial(config: Mapping[str, Any], **shared: Any) -> dict[str, float]:
    """A trial of `search_candidates`."""
    torch.set_num_threads(1)
    stack = train_candidate(config["number"], **shared)
    return {LOSS: float(np.mean([network.committee_loss for network in stack.trained]))}


def _run(
    trial: Callable[..., dict[str, float]], count: int, folder: Path, workers: int, shared: Mapping[str, Any]
) -> list[float]:
    """Have Ray Tune run so many trials; the loss of each."""
    check_workers(workers)
    check_installed()
    start_ray()
    from ray import tune
    from ray.exceptions import RayError

    tuner = tune.Tuner(
        tune.with_parameters(trial, **shared) if shared else trial,
        param_space={"number": tune.grid_search(list(range(count)))},
        tune_config=tune.TuneConfig(metric=LOSS, mode="min", max_concurrent_trials=workers, reuse_actors=True),
        run_config=tune.RunConfig(
            name="trials", storage_path=str(folder.resolve() / "ray"), verbose=0,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
        ),
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a table of what is known already
            grid = tuner.fit()
    except RayError as error:
        raise EngineError(f"the trials could not be run: {told_by(error)}.") from error
    found: dict[int, float] = {}
    for result in (grid[i] for i in range(len(grid))):
        if result.error is not None:
            raise EngineError(
                f"a trial failed, after {RESTARTS} new starts: {told_by(result.error)}."
            ) from result.error
        assert result.config is not None  # each trial that did not fail has both
        assert result.metrics is not None
        found[int(result.config["number"])] = float(result.metrics[LOSS])
    return [found[number] for number in range(count)]
