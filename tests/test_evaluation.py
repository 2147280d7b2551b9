"""Measures against scikit-learn and scipy, standard errors against resampling, tables against their sums."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

import report_examples as examples
from dropkit import committee
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.errors import OptionError, ShapeError
from dropkit.evaluation import (
    ClassificationForecast,
    RegressionForecast,
    Split,
    compare,
    evaluate_classification,
    evaluate_regression,
    spread_by_members,
)
from dropkit.evaluation.comparison import constant_noise_forecast
from dropkit.evaluation.held_out import distribution_function, evenly_spaced
from dropkit.evaluation.measures import (
    average,
    calibration_error,
    classification_measures,
    paired_difference,
    regression_measures,
    root_mean_square,
    share,
    standard_error,
)
from dropkit.evaluation.members import jackknife_error
from dropkit.evaluation.spread import (
    classification_spread,
    detection_chance,
    equal_groups,
    rank_correlation,
    rank_correlation_error,
    ranks,
    regression_spread,
)

floats = st.floats(-1e6, 1e6)
columns = st.lists(floats, min_size=2, max_size=40).map(np.array)


def a_forecast(rng, n=200):
    y = rng.normal(size=n)
    mean = y + rng.normal(0, 0.5, n)
    std = rng.uniform(0.3, 0.7, n)
    return y, RegressionForecast(mean, std, mean - 1.5 * std, mean + 1.5 * std)


def probabilities(rng, n=200, classes=4):
    return rng.dirichlet(np.ones(classes), size=n), rng.integers(classes, size=n)


def test_regression_measures_are_those_of_their_definitions():
    y, forecast = a_forecast(np.random.default_rng(0))
    found = {name: measure.value for name, measure in regression_measures(y, forecast).items()}
    inside = (forecast.lower <= y) & (y <= forecast.upper)
    assert found == pytest.approx(
        {
            "RMSE": metrics.root_mean_squared_error(y, forecast.mean),
            "MAE": metrics.mean_absolute_error(y, forecast.mean),
            "NLL": -stats.norm(forecast.mean, forecast.std).logpdf(y).mean(),
            "coverage": inside.mean(),
            "width": (forecast.upper - forecast.lower).mean(),
        }
    )


def test_classification_measures_are_those_of_their_definitions():
    p, y = probabilities(np.random.default_rng(1))
    found = {name: m.value for name, m in classification_measures(y, ClassificationForecast(p)).items()}
    assert found == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(y, p.argmax(axis=1)),
            "log loss": metrics.log_loss(y, p),
            "Brier": ((p - np.eye(4)[y]) ** 2).sum(axis=1).mean(),
            "ECE": committee.reliability(
                torch.tensor(p), torch.tensor(y), bins=10
            ).expected_calibration_error,
        }
    )


def test_a_certain_wrong_class_costs_a_finite_loss():
    p = np.array([[1.0, 0.0]])
    assert classification_measures(np.array([1]), ClassificationForecast(p))["log loss"].value < 28


@pytest.mark.parametrize("name", ["RMSE", "MAE", "NLL", "coverage", "width"])
def test_standard_errors_are_what_resampling_rows_gives(name):
    # the standard deviation of 600 resamples is within 4 x 3 % of the truth but in 1 of 16 000 runs of other seeds
    rng = np.random.default_rng(2)
    y, f = a_forecast(rng, 400)
    values = []
    for _ in range(600):
        k = rng.integers(len(y), size=len(y))
        again = RegressionForecast(f.mean[k], f.std[k], f.lower[k], f.upper[k])
        values.append(regression_measures(y[k], again)[name].value)
    assert regression_measures(y, f)[name].standard_error == pytest.approx(np.std(values), rel=0.13)


def test_the_calibration_errors_standard_error_is_what_resampling_rows_gives():
    # confidence far from accuracy in each bin, where the error is smooth; false-alarm rate as above
    rng = np.random.default_rng(3)
    confidence, right = rng.uniform(0.7, 1, 800), rng.random(800) < 0.4
    values = []
    for _ in range(600):
        k = rng.integers(800, size=800)
        values.append(calibration_error(confidence[k], right[k]).value)
    assert calibration_error(confidence, right).standard_error == pytest.approx(np.std(values), rel=0.13)


@given(columns)
def test_a_standard_error_follows_the_unit_and_forgets_the_origin(values):
    if np.ptp(values) < 1e-3:
        return
    assert standard_error(3 * values + 7) == pytest.approx(3 * standard_error(values), rel=1e-6)


def test_equal_values_have_no_error_and_all_hits_have_some():
    assert standard_error(np.full(50, 197.3)) == 0
    assert average(np.array([2.0])).standard_error == 0
    assert 0 < share(np.ones(10, dtype=bool)).standard_error < 0.12
    none, every = (share(np.full(10, hit)).standard_error for hit in (False, True))
    assert none == pytest.approx(every)


@given(columns, st.randoms(use_true_random=False))
def test_differences_between_models_are_paired(errors, random):
    a, b = root_mean_square(errors), root_mean_square(errors[::-1] * random.uniform(0.5, 2))
    difference, error = paired_difference(a, b)
    assert paired_difference(b, a) == pytest.approx((-difference, error))
    assert paired_difference(a, a) == (0, 0)


def test_shuffling_rows_changes_no_score():
    rng = np.random.default_rng(4)
    y, f = a_forecast(rng)
    k = rng.permutation(len(y))
    there = regression_measures(y, f)
    back = regression_measures(y[k], RegressionForecast(f.mean[k], f.std[k], f.lower[k], f.upper[k]))
    for name in there:
        assert back[name].value == pytest.approx(there[name].value, rel=1e-12)
        assert back[name].standard_error == pytest.approx(there[name].standard_error, rel=1e-12)


@pytest.mark.parametrize("length", [0, 3])
def test_arrays_of_another_length_are_refused(length):
    with pytest.raises(ShapeError):
        regression_measures(np.zeros(length), RegressionForecast(*(np.ones(2) for _ in range(4))))
    with pytest.raises(ShapeError):
        classification_measures(np.zeros(length, dtype=int), ClassificationForecast(np.full((2, 2), 0.5)))
    with pytest.raises(ShapeError):
        classification_measures(np.zeros(2, dtype=int), ClassificationForecast(np.ones(2)))


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30))
def test_ranks_share_their_mean_as_in_scipy(values):
    np.testing.assert_array_equal(ranks(np.array(values, dtype=float)), stats.rankdata(values))


@given(columns, st.integers(0, 1000))
def test_rank_correlation_is_spearmans(a, seed):
    b = np.random.default_rng(seed).normal(size=len(a)).round(1)
    found = rank_correlation(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_rank_correlation_error_is_what_fresh_samples_scatter_by():
    # 800 samples of 60 rows: their scatter is known to 2.5 %; the formula is good to a few percent at this n.
    # 4 x 2.5 % beside the formula's own few: less than 1 run of other seeds in 10 000.
    rng = np.random.default_rng(5)
    values = []
    for _ in range(800):
        a = rng.normal(size=60)
        values.append(rank_correlation(a, a + rng.normal(0, 1.5, 60)))
    assert rank_correlation_error(float(np.mean(values)), 60) == pytest.approx(np.std(values), rel=0.15)
    assert rank_correlation_error(0.3, 3) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40))
def test_detection_is_the_area_under_the_curve(rows):
    wrong, spread = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=float)
    found = detection_chance(wrong, spread)
    if wrong.all() or not wrong.any():
        assert found is None
    else:
        assert found == pytest.approx(metrics.roc_auc_score(wrong, spread))


@given(st.integers(1, 300), st.integers(1, 400))
def test_evenly_spaced_rows_are_distinct_and_reach_both_ends(rows, most):
    kept = evenly_spaced(rows, most)
    assert len(kept) == min(rows, most)
    assert np.all(np.diff(kept) > 0)
    assert kept[0] == 0
    assert most == 1 or kept[-1] == rows - 1


@given(columns)
def test_groups_are_all_rows_once_in_order_of_spread(spread):
    groups = equal_groups(spread)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(spread)))
    assert all(spread[a].max() <= spread[b].min() for a, b in itertools.pairwise(groups))
    assert len(groups) == max(1, min(10, len(spread) // 10))


def test_a_committee_that_knows_its_error_is_found_out_to():
    rng = np.random.default_rng(6)
    std = rng.uniform(0.1, 3, 4000)
    table = regression_spread(np.abs(rng.normal(0, std)), std)
    # ten groups, each within 4.5 standard errors: false alarm in 1 of 15 000 runs of other seeds
    assert all(abs(b.observed - b.expected) < 4.5 * b.standard_error for b in table.bins)
    assert table.rank_correlation > 0.4
    blind = regression_spread(np.abs(rng.normal(0, 1, 4000)), std)
    assert abs(blind.rank_correlation) < 4.5 * blind.rank_correlation_error


def test_error_shares_in_groups_add_up_to_the_error_rate():
    rng = np.random.default_rng(7)
    wrong, entropy = rng.random(333) < 0.2, rng.random(333)
    table = classification_spread(wrong, entropy, entropy / 2)
    assert sum(b.observed * b.count for b in table.bins) == pytest.approx(wrong.sum())
    assert sum(b.expected * b.count for b in table.bins) == pytest.approx(entropy.sum() / 2)


def test_coverage_before_is_that_of_the_committees_own_intervals():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(150, 3))
    prediction = examples.regression_committee(x, rng)
    y = x @ [1.0, 2.0, 3.0] + rng.normal(size=150)
    calibration = committee.ConformalInterval.fit(prediction, torch.tensor(y), examples.LEVELS)
    held = evaluate_regression(y, prediction, calibration)
    slow = committee.coverage(prediction, torch.tensor(y), examples.LEVELS)
    assert held.coverage.before == pytest.approx(slow.covered)
    # on its own fitting rows the k-th smallest score covers exactly k rows
    assert held.coverage.after == pytest.approx([math.ceil(151 * v - 1e-9) / 150 for v in examples.LEVELS])


def test_the_committees_distribution_function_needs_noise():
    point = RegressionPrediction(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(OptionError, match="with_noise"):
        distribution_function(np.zeros(3), point)


@pytest.mark.parametrize("make", [examples.regression_report, examples.classification_report])
def test_an_evaluation_keeps_its_rows_and_the_least_certain_first(make):
    held = make(60).held_out
    spread = [row.spread for row in held.uncertain]
    assert spread == sorted(spread, reverse=True)
    assert held.points.row == tuple(range(1, 61))
    assert len(held.uncertain) == 8


def test_a_large_evaluation_keeps_some_points_and_all_of_the_tables():
    report = examples.classification_report(5000, classes=40, compared=False)
    assert len(report.held_out.points.row) == 1000
    assert sum(map(sum, report.held_out.confusion)) == 5000
    assert sum(b.count for b in report.held_out.reliability.before) == 5000


def test_a_temperature_of_one_leaves_before_and_after_equal():
    rng = np.random.default_rng(9)
    prediction = examples.class_committee(rng.normal(size=(50, 2)), rng, 3)
    held = evaluate_classification(rng.integers(3, size=50), prediction, "abc")
    assert held.reliability.before == held.reliability.after
    tempered = dataclasses.replace(prediction, temperature=2.0)
    again = evaluate_classification(rng.integers(3, size=50), tempered, "abc")
    assert again.reliability.before != again.reliability.after


def test_spread_by_members_is_unbiased_in_pairs_and_exact_in_full():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(16, 50, generator=generator, dtype=torch.float64)
    table = spread_by_members(RegressionPrediction(samples))
    assert table.members == (2, 4, 8, 16)
    pairs = (samples[0::2] - samples[1::2]).abs() / math.sqrt(2)
    assert table.spread[0] == pytest.approx(float(pairs.mean()))
    assert table.spread[-1] == pytest.approx(float(samples.std(dim=0).mean()))


def test_members_that_agree_have_no_spread():
    same = torch.ones(8, 5)
    assert spread_by_members(RegressionPrediction(same)).spread == (0, 0, 0)
    halves = spread_by_members(ClassificationPrediction(torch.full((8, 5, 2), 0.5)))
    assert halves.spread == (0, 0, 0)
    assert halves.quantity == "mutual information"


def test_the_monte_carlo_error_is_the_scatter_between_committees():
    # 400 committees of 16 know their scatter to 3.5 %, the jackknife's own mean is good to a few percent:
    # 20 % leaves less than 1 run of other seeds in 10 000
    rng = torch.Generator().manual_seed(1)
    samples = torch.randn(400, 16, 30, generator=rng, dtype=torch.float64) * torch.linspace(0.5, 2, 30)
    tables = [spread_by_members(RegressionPrediction(committee)) for committee in samples]
    found = np.mean([table.monte_carlo_error[-1] for table in tables])
    assert found == pytest.approx(np.std([table.spread[-1] for table in tables]), rel=0.2)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(12, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert jackknife_error(values, lambda v: float(v.mean())) == pytest.approx(
        float(values.std()) / math.sqrt(12)
    )


def test_three_members_are_too_few():
    with pytest.raises(ShapeError, match="4 members"):
        spread_by_members(RegressionPrediction(torch.zeros(3, 5)))


@given(st.integers(1, 200), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_a_rivals_interval_covers_its_own_residuals_as_often_as_it_says(n, level, seed):
    residuals = np.random.default_rng(seed).normal(size=n)
    forecast = constant_noise_forecast(np.zeros(n), residuals, level)
    inside = np.sum((forecast.lower <= residuals) & (residuals <= forecast.upper))
    assert inside >= min(math.ceil((n + 1) * level - 1e-9), n)


def comparison_data(rows=120):
    rng = np.random.default_rng(10)
    x = [rng.normal(size=(rows, 3)) for _ in range(3)]
    return x, [v @ [1.0, 2.0, 3.0] + rng.normal(0, 0.1, rows) for v in x]


def test_a_forecast_of_the_truth_beats_everyone_and_noise_loses_to_everyone():
    x, y = comparison_data()
    splits = [Split(a, b) for a, b in zip(x, y, strict=True)]
    for offset, sign in ((0.0, -1), (9.0, 1)):
        wave = torch.linspace(-0.01, 0.01, 8, dtype=torch.float64)[:, None]
        samples = torch.tensor(y[2])[None] + wave + offset * torch.tensor(np.cos(np.arange(len(y[2]))))
        prediction = RegressionPrediction(samples, torch.full_like(samples, 0.01))
        calibration = committee.ConformalInterval.fit(prediction, torch.tensor(y[2]), 0.9)
        found = compare(prediction, calibration, *splits)
        assert found.models[0].name == "dropkit"
        for rival in found.models[1:3]:
            score = rival.scores[0]
            assert score.name == "RMSE"
            assert score.difference * sign > 3 * score.difference_error


def test_rivals_learn_from_no_more_rows_than_allowed_and_say_so():
    x, y = comparison_data()
    prediction = RegressionPrediction(torch.tensor(np.stack([y[2], y[2] + 0.1])), torch.ones(2, 120).double())
    calibration = committee.ConformalInterval.fit(prediction, torch.tensor(y[2]), 0.9)
    splits = [Split(a, b) for a, b in zip(x, y, strict=True)]
    capped = compare(prediction, calibration, *splits, training_rows=40)
    kept = evenly_spaced(120, 40)
    by_hand = compare(prediction, calibration, Split(x[0][kept], y[0][kept]), *splits[1:])
    assert (capped.training_rows, capped.all_training_rows) == (40, 120)
    assert capped.models == by_hand.models
    everything = np.concatenate(x), np.concatenate(y)
    parts = [Split(*everything, rows=np.arange(120) + 120 * k) for k in range(3)]
    assert compare(prediction, calibration, *parts, training_rows=40) == capped
    assert capped.models != compare(prediction, calibration, *splits).models


def test_a_number_is_not_compared_without_intervals():
    x, y = comparison_data(20)
    prediction = RegressionPrediction(torch.zeros(4, 20), torch.ones(4, 20))
    with pytest.raises(OptionError, match="intervals"):
        compare(prediction, None, *(Split(a, b) for a, b in zip(x, y, strict=True)))


def test_a_class_without_training_rows_has_probability_zero():
    rng = np.random.default_rng(11)
    x = rng.normal(size=(60, 2))
    y = np.repeat([0, 2], 30)
    prediction = examples.class_committee(x, rng, 3)
    found = compare(prediction, None, Split(x, y), Split(x, y), Split(x, np.full(60, 1)))
    assert all(model.scores[0].value == 0 for model in found.models[1:])
    alone = compare(prediction, None, Split(x, np.zeros(60, dtype=int)), Split(x, y), Split(x, y))
    assert len(alone.models) == 1
