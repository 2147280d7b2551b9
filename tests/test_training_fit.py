from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.training import Candidate, Curve, NetworkSpec, Trained, divide_rows, fit, gaussian_nll
from dropkit.training.division import make_folds
from dropkit.training.fit import FOLDED_ROWS, SEARCH_ROWS, make_candidates, make_plan
from dropkit.training.search import choose


def regression(rows=60, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, 3)).astype(np.float32)
    return x, 100 + 10 * x[:, 0] + generator.standard_normal(rows)


def weights(result):
    return torch.cat([p.detach().reshape(-1) for p in result.network.parameters()])


def test_a_fit_learns_and_answers_in_the_unit_of_y():
    x, y = regression(200)
    result = fit(x, y, likelihood="gaussian", rate=0.1)
    with torch.no_grad():
        outputs = result.network(torch.from_numpy(x))
    held = result.validation_rows
    error = outputs[held, 0].numpy() - y[held]
    assert np.sqrt((error**2).mean()) < 0.4 * y.std()
    loss = gaussian_nll(outputs[held], torch.from_numpy(y[held]).float()).mean()
    assert float(loss) == pytest.approx(result.curve.validation[result.curve.best], rel=1e-3)
    assert not result.network.training
    assert result.search is None
    assert result.spec.rate == 0.1


def test_auto_lets_no_dropout_compete_and_keeps_the_whole_record():
    x, y = regression()
    result = fit(x, y, likelihood="gaussian", max_epochs=6)
    search = result.search
    candidates = [trial.candidate for trial in search.trials]
    assert any(not candidate.drops for candidate in candidates)
    assert search.chosen in candidates
    assert search.networks == len(candidates) * search.folds
    assert (result.spec.rate, result.spec.input_rate) == (search.chosen.rate, search.chosen.input_rate)
    assert "ropout" in search.verdict
    # The network handed back is the winner of the first fold, whose rows are those of the fit.
    assert set(result.train_rows) | set(result.validation_rows) == set(range(60))
    assert not set(result.train_rows) & set(result.validation_rows)


def test_equal_seeds_give_equal_fits_bit_for_bit():
    x, y = regression()
    one, two, other = (fit(x, y, likelihood="gaussian", seed=s, max_epochs=4) for s in (5, 5, 6))
    assert torch.equal(weights(one), weights(two))
    assert one.search == two.search
    assert one.curve == two.curve
    assert not torch.equal(weights(one), weights(other))


def test_the_order_of_a_callers_random_numbers_is_left_alone():
    x, y = regression()
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(x, y, likelihood="gaussian", max_epochs=2)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


@pytest.mark.parametrize("rows", [2, 3, 5, 11])
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_the_smallest_tables_are_learned_from(rows, likelihood):
    x = np.linspace(-1, 1, rows, dtype=np.float32)[:, None]
    y = np.arange(rows) % 2 if likelihood == "categorical" else np.linspace(0, 1e6, rows)
    result = fit(x, y, likelihood=likelihood, max_epochs=20)
    with torch.no_grad():
        assert torch.isfinite(result.network(torch.from_numpy(x))).all()
    assert len(result.validation_rows) >= 1
    assert len(result.train_rows) >= 1


@pytest.mark.parametrize("value", [0.0, 7.3, 1e9])
def test_a_constant_target_gives_no_nan(value):
    x, _ = regression()
    result = fit(x, np.full(60, value), likelihood="gaussian", max_epochs=30)
    with torch.no_grad():
        mean, log_variance = result.network(torch.from_numpy(x)).unbind(-1)
    assert torch.isfinite(log_variance).all()
    assert (mean - value).abs().max() <= 1e-6 * value + 3
    assert np.isfinite(result.curve.validation).all()


def test_a_class_seen_once_is_trained_on():
    x, _ = regression(40)
    y = np.arange(40) % 2
    y[17] = 2
    result = fit(x, y, likelihood="categorical", max_epochs=3)
    assert result.spec.outputs == 3
    assert 17 in result.train_rows


def test_an_interrupted_search_gives_the_best_network_so_far():
    x, y = regression()

    def stop(event):
        if event.epoch >= 12:
            raise KeyboardInterrupt

    result = fit(x, y, likelihood="gaussian", progress=stop)
    assert result.interrupted
    assert result.search is not None
    assert max(result.curve.epochs) <= 12 < result.plan.max_epochs
    with torch.no_grad():
        assert torch.isfinite(result.network(torch.from_numpy(x))).all()


def test_a_long_table_is_searched_on_some_rows_and_learned_from_all(monkeypatch):
    # The name `dropkit.training.fit` is the function.
    monkeypatch.setattr(sys.modules["dropkit.training.fit"], "SEARCH_ROWS", 50)
    x, y = regression(120)
    stages = []
    result = fit(x, y, likelihood="gaussian", max_epochs=2, progress=lambda event: stages.append(event.stage))
    assert result.search.rows == 50 + 12
    assert len(result.train_rows) == 96
    assert stages[0] == "search"
    assert stages[-1] == "fit"

    def stop(event):
        raise KeyboardInterrupt

    cut = fit(x, y, likelihood="gaussian", max_epochs=2, progress=stop)
    assert cut.interrupted
    assert len(cut.train_rows) == 50  # what the network at hand has seen


def test_progress_counts_networks_and_epochs():
    x, y = regression()
    events = []
    fit(x, y, likelihood="gaussian", max_epochs=32, progress=events.append)
    assert all(0 <= e.live <= e.networks and 0 < e.epoch <= e.max_epochs == 32 for e in events)
    assert [e.epoch for e in events] == sorted(e.epoch for e in events)
    assert all(a.best >= b.best for a, b in pairwise(events))


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
)
def test_held_out_rows_are_a_share_of_every_class(counts, share, seed):
    y = np.repeat(np.arange(len(counts)), counts)
    if len(y) < 2:
        return
    held = divide_rows(y, share, likelihood="categorical", seed=seed)
    assert 1 <= len(held) <= len(y) - 1
    assert len(np.unique(held)) == len(held)
    assert (np.diff(held) > 0).all()
    if max(counts) > 1:
        drawn = np.bincount(y[held], minlength=len(counts))
        for count, taken in zip(counts, drawn, strict=True):
            if count == 1:
                assert taken == 0
            else:
                assert taken < count
                assert abs(taken - share * count) <= 1.5 + share * len(counts)


@given(rows=st.integers(10, 80), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_folds_turn_each_row_into_a_validation_row_at_most_once(rows, count, seed):
    y = np.zeros(rows)
    validation = divide_rows(y, 0.2, likelihood="gaussian", seed=seed)
    train = np.setdiff1d(np.arange(rows), validation)
    folds = make_folds(train, validation, count, seed=seed)
    assert 1 <= len(folds) <= count
    assert np.array_equal(folds[0].validation, validation)
    held = np.concatenate([fold.validation for fold in folds])
    assert len(np.unique(held)) == len(held)
    for fold in folds:
        assert np.array_equal(np.sort(np.r_[fold.train, fold.validation]), np.arange(rows))
        assert len(fold.train) == len(train)


@given(rows=st.integers(1, 5_000_000))
def test_a_plan_is_within_reason(rows):
    plan = make_plan(rows, None, "normal")
    assert 16 <= plan.batch <= 1024
    assert 30 <= plan.max_epochs <= 400
    assert plan.evaluate_every <= plan.max_epochs
    assert make_plan(rows, 7, "normal").max_epochs == 7


@pytest.mark.parametrize("rows", [10, FOLDED_ROWS, SEARCH_ROWS + 1])
@pytest.mark.parametrize("effort", ["quick", "normal", "thorough"])
def test_every_search_has_a_candidate_without_dropout_and_no_candidate_twice(rows, effort):
    candidates = make_candidates(rows, "auto", None, None, effort)
    assert any(not c.drops for c in candidates)
    assert len(set(candidates)) == len(candidates) > 1
    assert make_candidates(rows, 0.3, (5,), 0.2, effort) == [Candidate(0.3, 0.0, 0.2, (5,))]


def trained(rate, losses, validation=(3.0, 1.0, 2.0)):
    spec = NetworkSpec(2, (4,), 2, rate, 0.0, "gaussian")
    curve = Curve(tuple(range(len(validation))), tuple(v - 0.5 for v in validation), validation)
    return Trained(spec, (), 0.0, 1.0, curve, torch.tensor(losses))


def none_and_some(none, some):
    results = {
        Candidate(0.0, 0.0, 0.1, (4,)): [trained(0.0, none)],
        Candidate(0.2, 0.0, 0.1, (4,)): [trained(0.2, some)],
        Candidate(0.5, 0.0, 0.1, (4,)): [trained(0.5, [9.0] * len(some))],
    }
    return choose(results, 1, len(none), 0)


def test_no_dropout_wins_where_it_is_clearly_better():
    search = none_and_some([1.0, 1.1, 0.9], [2.0, 2.1, 1.95])
    assert not search.chosen.drops
    assert search.advantage == 0
    assert search.verdict.startswith("No dropout was best")


def test_within_one_standard_error_dropout_is_taken_and_the_words_say_so():
    search = none_and_some([1.0, 2.0, 3.0], [1.5, 1.6, 3.1])  # behind by 0.0667, standard error 0.24
    assert search.chosen.rate == 0.2
    assert search.advantage == pytest.approx(-0.2 / 3, abs=1e-6)
    differences = np.array([-0.5, 0.4, -0.1])
    assert search.advantage_error == pytest.approx(differences.std(ddof=1) / 3**0.5, abs=1e-6)
    assert "without dropout validated better by 0.067" in search.verdict
    ahead = none_and_some([1.5, 1.6, 3.1], [1.0, 2.0, 3.0])
    assert "within one standard error" in ahead.verdict
    clear = none_and_some([2.0, 2.1, 1.95], [1.0, 1.1, 0.9])
    assert clear.verdict.startswith("Rate 0.2 validated better than no dropout by 1.017")
    assert "within" not in clear.verdict


def test_a_curve_knows_its_best_epoch_its_gap_and_when_it_had_converged():
    curve = Curve((0, 2, 4, 6, 8), (9.0, 5.0, 2.0, 1.0, 0.5), (10.0, 6.0, 3.1, 3.0, 4.0))
    assert curve.best_epoch == 6
    assert curve.gap == 2.0
    assert curve.epochs_to_converge == 4  # 3.1 is below 3.0 + 5 % of 7.0
    assert Curve((0, 3), (1.0, 0.5), (float("nan"),) * 2).best_epoch == 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rate": 1.2}, ProbabilityError, "lies in"),
        ({"rate": 1.0}, OptionError, "cannot learn"),
        ({"likelihood": "poisson"}, OptionError, "gaussian"),
        ({"effort": "huge"}, OptionError, "thorough"),
        ({"validation_share": 0.0}, OptionError, "between 0 and 1"),
        ({"validation_rows": []}, OptionError, "at least 1"),
        ({"validation_rows": [99]}, OptionError, "from 0 to 59"),
        ({"validation_rows": range(60)}, OptionError, "to train on"),
        ({"max_epochs": 0}, OptionError, "at least 1"),
        ({"seed": -1}, OptionError, "64 bits"),
        ({"y": np.full(60, np.nan)}, OptionError, "not finite"),
        ({"y": np.zeros(59)}, ShapeError, "shape"),
        ({"x": np.zeros((60, 0), np.float32)}, ShapeError, "shape"),
        ({"likelihood": "categorical"}, ShapeError, "whole numbers"),
        ({"likelihood": "categorical", "y": np.arange(60), "classes": 3}, OptionError, "3 classes"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_words(change, error, words):
    x, y = regression()
    with pytest.raises(error, match=words):
        fit(**{"x": x, "y": y, "likelihood": "gaussian", **change})


def test_one_row_is_too_few():
    with pytest.raises(ShapeError, match="1 rows"):
        fit(np.zeros((1, 2), np.float32), np.zeros(1), likelihood="gaussian")
