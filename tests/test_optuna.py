"""The search by Optuna: trials equal to dropkit's own candidates, on disk, and gone on with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dropkit.engines import optuna as engine
from dropkit.errors import OptionError, ProbabilityError
from dropkit.training import Candidate, fit

CANDIDATES = [Candidate(rate, 0.0, decay, (8,)) for rate in (0.0, 0.2, 0.5) for decay in (0.01, 0.3)]


def table(likelihood="gaussian", rows=90):
    generator = np.random.default_rng(5)
    x = generator.standard_normal((rows, 3)).astype(np.float32)
    y = x[:, 0] + 0.5 * generator.standard_normal(rows)
    return x, y if likelihood == "gaussian" else (y > 0).astype(np.int64)


def search(**options):
    likelihood = options.pop("likelihood", "gaussian")
    settings = {"candidates": CANDIDATES, "seed": 3, "effort": "quick", "max_epochs": 3, **options}
    return engine.search_candidates(*table(likelihood), likelihood=likelihood, **settings)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_trials_are_those_of_the_search_of_fit(likelihood):
    x, y = table(likelihood)
    own = fit(x, y, likelihood=likelihood, seed=3, effort="quick", max_epochs=3).search
    found = search(likelihood=likelihood, candidates=None)
    assert [trial.candidate for trial in found.trials] == [trial.candidate for trial in own.trials]
    for mine, theirs in zip(found.trials, own.trials, strict=True):
        for name in (
            "validation",
            "standard_error",
            "deterministic",
            "train",
            "best_epoch",
            "epochs_to_converge",
        ):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-5, abs=1e-6), name
    assert found.chosen == own.chosen
    assert found.advantage == pytest.approx(own.advantage, rel=1e-4, abs=1e-6)
    assert (found.folds, found.rows, found.networks) == (own.folds, own.rows, own.networks)


@pytest.mark.parametrize("storage", ["search.journal", "sqlite:///{}/search.db"])
def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch, storage):
    where = storage.format(tmp_path) if "://" in storage else tmp_path / storage
    whole = search(proposals=2)
    trained = []

    def counted(*args, **kwargs):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(args[2][0].rate)
        return train_stack(*args, **kwargs)

    train_stack = engine.train_stack
    monkeypatch.setattr(engine, "train_stack", counted)
    with pytest.raises(KeyboardInterrupt):
        search(storage=where, proposals=2)
    monkeypatch.setattr(engine, "train_stack", train_stack)
    again = []
    monkeypatch.setattr(engine, "train_stack", lambda *a, **k: again.append(1) or train_stack(*a, **k))
    assert search(storage=where, proposals=2) == whole
    assert len(again) == len(CANDIDATES) + 2 - 4
    assert search(storage=where, proposals=2) == whole
    assert len(again) == len(CANDIDATES) + 2 - 4  # nothing was left to do
    assert len(whole.trials) == len(CANDIDATES) + 2


def test_another_search_under_the_same_name_is_refused(tmp_path):
    where = tmp_path / "search.journal"
    few = CANDIDATES[:1]
    search(storage=where, candidates=few)
    for other in ({"seed": 4}, {"max_epochs": 4}, {"likelihood": "categorical"}):
        with pytest.raises(OptionError, match="other rows, options or kind"):
            search(storage=where, candidates=few, **other)
    with pytest.raises(OptionError, match="other rows, options or kind"):
        engine.search_rates(lambda rate: rate, [0.1], storage=where, name="dropkit")
    assert len(search(storage=where).trials) == len(
        CANDIDATES
    )  # more candidates of the same search are welcome


def test_rates_of_any_objective_are_tried_once_and_proposals_go_on(tmp_path):
    where, asked = tmp_path / "rates.journal", []

    def objective(rate):
        asked.append(rate)
        return (rate - 0.3) ** 2

    first = engine.search_rates(objective, [0.5, 0.0, 0.25], storage=where, proposals=4)
    assert list(first)[:3] == asked[:3] == [0.5, 0.0, 0.25]
    assert all(loss == (rate - 0.3) ** 2 for rate, loss in first.items())
    assert len(first) == 7
    assert all(0 <= rate <= 0.9 for rate in first)
    more = engine.search_rates(objective, [0.5, 0.0, 0.25], storage=where, proposals=9)
    assert len(asked) == len(set(asked)) == len(more) == 12
    # As it would have gone without a stop.
    assert more == engine.search_rates(lambda rate: (rate - 0.3) ** 2, [0.5, 0.0, 0.25], proposals=9)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ProbabilityError):
        engine.search_rates(math.cos, [0.1, 1.5])
    with pytest.raises(OptionError, match="at least one"):
        engine.search_rates(math.cos, [])
    with pytest.raises(OptionError, match="proposals=-1"):
        engine.search_rates(math.cos, [0.5], proposals=-1)
