"""Calibration: what is guaranteed holds at a stated false-alarm rate, and other libraries agree."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from dropkit.committee.calibrate import ConformalInterval, Temperature, best_temperature, rows_needed
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction, temper
from dropkit.committee.reliability import coverage, reliability
from dropkit.errors import ModelDirectoryError, OptionError, ShapeError


def committee_of(probabilities: Tensor) -> ClassificationPrediction:
    return ClassificationPrediction(torch.stack((probabilities, probabilities)))


def classes_from(probabilities: Tensor, seed: int) -> Tensor:
    return torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0]


def wrong_regression(rows: int, seed: int) -> tuple[RegressionPrediction, Tensor]:
    """A committee that is biased, has the wrong spread, and knows a little where it is uncertain."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, generator=generator, dtype=torch.float64)
    y = x.sin() + (0.1 + x) * torch.randn(rows, generator=generator, dtype=torch.float64) ** 3
    samples = torch.stack((x, x + 0.3))
    return RegressionPrediction(samples, (0.02 + 0.2 * x).expand(2, rows)), y


# --- temperature ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_recovered(true: float) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 2.0 * torch.randn(40_000, 4, generator=generator, dtype=torch.float64)
    y = classes_from((logits / true).softmax(-1), seed=8)
    fit = Temperature.fit(committee_of(logits.softmax(-1)), y)
    # Over 200 other seeds log T scattered by less than 0.01 around its truth (maximum likelihood, 40 000 rows);
    # five of these are 1 alarm in 2 million.
    assert math.log(fit.temperature) == pytest.approx(math.log(true), abs=0.05)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 30), classes=st.integers(2, 5), scale=st.floats(0.1, 8)
)
def test_held_out_rows_never_get_less_likely(seed: int, rows: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (scale * torch.randn(rows, classes, generator=generator)).softmax(-1)
    y = torch.randint(0, classes, (rows,), generator=generator)
    prediction = committee_of(probabilities)
    fit = Temperature.fit(prediction, y)
    assert fit.after <= fit.before
    assert -float(fit.apply(prediction).log_likelihood(y).double().mean()) == pytest.approx(
        fit.after, abs=1e-5
    )
    assert torch.equal(fit.apply(prediction).label, prediction.label)


def test_the_minimum_is_that_of_a_general_optimiser() -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(200, 3, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    y = classes_from(temper(p, 2.0), seed=5)

    def loss(log_t: float) -> float:
        return -float(torch.log_softmax(p.log() / math.exp(log_t), -1)[torch.arange(200), y].mean())

    found = optimize.minimize_scalar(
        loss, bounds=(math.log(0.05), math.log(20)), method="bounded", options={"xatol": 1e-10}
    )
    assert math.log(best_temperature(p, y)) == pytest.approx(found.x, abs=1e-6)


def test_rows_that_are_all_right_or_all_wrong_end_at_the_bounds() -> None:
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert best_temperature(p, torch.tensor([0, 1])) == 0.05
    assert best_temperature(p, torch.tensor([1, 0])) == 20.0


def test_temperature_mistakes_are_named() -> None:
    prediction = committee_of(torch.tensor([[0.5, 0.5]]))
    with pytest.raises(OptionError, match="0 to 1"):
        Temperature.fit(prediction, torch.tensor([2]))
    with pytest.raises(ShapeError, match="must agree"):
        Temperature.fit(prediction, torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="at least one"):
        Temperature.fit(prediction.rows(slice(0)), torch.tensor([], dtype=torch.int64))
    with pytest.raises(OptionError, match="fit on one at 1"):
        Temperature.fit(ClassificationPrediction(prediction.samples, 2.0), torch.tensor([0]))


# --- conformal intervals -------------------------------------------------------------------------------


def test_conformal_intervals_cover_as_often_as_they_say() -> None:
    levels, fitting, new, runs = (0.5, 0.8, 0.9), 39, 1, 1500
    # One new row for each fitting set makes the runs independent, so the count is binomial; with scores that are not
    # tied the chance is exactly ceil((n + 1) level) / (n + 1), which n = 39 makes the level itself.
    hits = np.zeros(len(levels), dtype=int)
    for run in range(runs):
        prediction, y = wrong_regression(fitting + new, seed=run)
        fit = ConformalInterval.fit(prediction.rows(slice(fitting)), y[:fitting], levels)
        hits += [fit.interval(prediction.rows(slice(fitting, None)), v).covers(y[fitting:]) for v in levels]
    for hit, level in zip(hits, levels, strict=True):
        assert stats.binomtest(int(hit), runs, level).pvalue > 1e-9 / len(levels)  # false alarms: 1 in 10^9


def test_the_committee_alone_would_not_have_covered() -> None:
    prediction, y = wrong_regression(4000, seed=1)
    held, new = slice(2000), slice(2000, None)
    fit = ConformalInterval.fit(prediction.rows(held), y[held], (0.8, 0.9))
    before = coverage(prediction.rows(new), y[new], (0.8, 0.9))
    after = coverage(prediction.rows(new), y[new], (0.8, 0.9), fit)
    assert before.covered[1] < 0.8
    # Two sources of chance, 2000 rows each: six standard errors are 1 alarm in 5 * 10^8.
    for covered, level in zip(after.covered, after.levels, strict=True):
        assert abs(covered - level) < 6 * math.sqrt(2) * math.sqrt(level * (1 - level) / 2000)
    assert after.rows == 2000
    assert after.width[0] < after.width[1]


@given(seed=st.integers(0, 10**6), rows=st.integers(9, 60))
def test_the_factor_is_the_smallest_that_covers_enough(seed: int, rows: int) -> None:
    prediction, y = wrong_regression(rows, seed)
    fit = ConformalInterval.fit(prediction, y, 0.9)
    inside = fit.interval(prediction).covers(y * (1 - 1e-15))
    needed = -(-(rows + 1) * 9 // 10)
    scores = ((y - prediction.mean).abs() / prediction.std).sort().values
    assert fit.factors[0] == float(scores[needed - 1])
    assert inside >= needed - 1


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_the_factor_is_an_inflated_quantile(level: float) -> None:
    # The usual way to write it: the ceil((n + 1) level) / n empirical quantile of the scores.
    prediction, y = wrong_regression(57, seed=4)
    scores = ((y - prediction.mean).abs() / prediction.std).numpy()
    quantile = np.quantile(scores, math.ceil(58 * level) / 57, method="inverted_cdf")
    assert ConformalInterval.fit(prediction, y, level).factors == (quantile,)


@pytest.mark.parametrize(("level", "rows"), [(0.9, 9), (0.95, 19), (0.5, 1), (0.07, 1), (0.99, 99), (0.7, 3)])
def test_too_few_rows_are_refused_and_enough_are_not(level: float, rows: int) -> None:
    assert rows_needed(level) == rows
    prediction, y = wrong_regression(rows, seed=5)
    assert math.isfinite(ConformalInterval.fit(prediction, y, level).factors[0])
    with pytest.raises(OptionError, match=f"takes {rows}"):
        ConformalInterval.fit(prediction.rows(slice(rows - 1)), y[: rows - 1], level)


def test_the_rank_is_counted_in_decimals() -> None:
    # In floating point 100 * 0.07 is above 7, and the eighth score would be taken.
    y = torch.arange(1.0, 100.0, dtype=torch.float64)
    prediction = RegressionPrediction(torch.zeros(2, 99).double(), torch.ones(2, 99).double())
    assert 100 * 0.07 > 7
    assert ConformalInterval.fit(prediction, y, 0.07).factors == (7.0,)


def test_a_model_without_any_spread_gets_one_width_for_all() -> None:
    y = torch.arange(1.0, 10.0)
    fit = ConformalInterval.fit(RegressionPrediction(torch.zeros(2, 9)), y, (0.5, 0.9))
    assert not fit.normalised
    assert fit.interval(RegressionPrediction(torch.full((2, 1), 5.0)), 0.9) == (
        torch.tensor([-4.0]),
        torch.tensor([14.0]),
    )


def test_a_row_that_is_sure_and_wrong_counts_as_infinitely_wrong() -> None:
    y = torch.ones(9)
    prediction = RegressionPrediction(torch.zeros(2, 9), torch.tensor([0.0] + [1.0] * 8).expand(2, 9))
    fit = ConformalInterval.fit(prediction, y, (0.8, 0.9))
    assert fit.factors == (1.0, math.inf)
    assert bool(torch.isinf(fit.interval(prediction).upper).all())
    assert ConformalInterval.from_json(json.loads(json.dumps(fit.to_json(), allow_nan=False))) == fit


def test_conformal_mistakes_are_named() -> None:
    prediction, y = wrong_regression(20, seed=0)
    fit = ConformalInterval.fit(prediction, y, [0.9, 0.5])
    assert fit.levels == (0.5, 0.9)
    with pytest.raises(OptionError, match=r"fitted for \[0.5, 0.9\]"):
        fit.interval(prediction, 0.8)
    with pytest.raises(OptionError, match="no level"):
        ConformalInterval.fit(prediction, y, [])
    with pytest.raises(OptionError, match="both excluded"):
        ConformalInterval.fit(prediction, y, 1.0)
    with pytest.raises(ShapeError, match="must agree"):
        ConformalInterval.fit(prediction, y[:, None])
    with pytest.raises(OptionError, match="finite"):
        ConformalInterval.fit(prediction, y.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ShapeError, match="2 outputs"):
        ConformalInterval.fit(RegressionPrediction(torch.zeros(2, 20, 2)), torch.zeros(20, 2))


# --- what is written can be read, and is not trusted ---------------------------------------------------


def test_records_come_back_from_json() -> None:
    prediction, y = wrong_regression(30, seed=2)
    conformal = ConformalInterval.fit(prediction, y, (0.5, 0.9))
    temperature = Temperature.fit(committee_of(torch.tensor([[0.7, 0.3]] * 3)), torch.tensor([0, 1, 0]))
    assert ConformalInterval.from_json(json.loads(json.dumps(conformal.to_json()))) == conformal
    assert Temperature.from_json(json.loads(json.dumps(temperature.to_json()))) == temperature


@pytest.mark.parametrize(
    "change",
    [
        {"levels": [0.9, 0.5]},
        {"levels": [0.5]},
        {"levels": "ab"},
        {"levels": [0.0, 0.9]},
        {"levels": [], "factors": []},
        {"factors": [1.0, -1.0]},
        {"factors": [1.0, "2"]},
        {"factors": [1.0, math.nan]},
        {"rows": 0},
        {"rows": None},
        {"rows": True},
        {"rows": 2.5},
        {"rows": 10**400},
        {"normalised": 1},
    ],
    ids=str,
)  # fmt: skip
def test_altered_intervals_are_refused(change: dict[str, object]) -> None:
    prediction, y = wrong_regression(30, seed=2)
    data = ConformalInterval.fit(prediction, y, (0.5, 0.9)).to_json() | change
    with pytest.raises(ModelDirectoryError):
        ConformalInterval.from_json(data)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.0}, {"temperature": "1"}, {"after": math.nan}, {"after": math.inf}, {"rows": -1}],
    ids=str,
)
def test_an_altered_temperature_is_refused(change: dict[str, object]) -> None:
    data = {"temperature": 1.5, "before": 1.0, "after": 0.5, "rows": 3} | change
    with pytest.raises(ModelDirectoryError):
        Temperature.from_json(data)


@pytest.mark.parametrize("data", [[], None, "text", {}], ids=str)
def test_other_things_than_a_record_are_refused(data: object) -> None:
    for kind in (ConformalInterval, Temperature):
        with pytest.raises(ModelDirectoryError):
            kind.from_json(data)


# --- instruments ---------------------------------------------------------------------------------------


def test_reliability_by_hand() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    table = reliability(probabilities, torch.tensor([0, 1, 1, 0]), bins=5)
    assert table.count == (0, 0, 1, 1, 2)  # 0.6 and 0.8 lie on edges and belong below
    assert table.accuracy[2:] == (1.0, 1.0, 0.5)
    assert table.confidence[2:] == pytest.approx((0.6, 0.8, 0.925))
    assert math.isnan(table.accuracy[0])
    assert math.isnan(table.standard_error[0])
    assert table.standard_error[4] == pytest.approx(math.sqrt(0.125))
    assert table.expected_calibration_error == pytest.approx((0.4 + 0.2 + 2 * 0.425) / 4)
    assert table.maximum_calibration_error == pytest.approx(0.425)
    assert table.rows == 4
    assert table.edges == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1))


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 50), bins=st.integers(1, 20))
def test_reliability_against_a_loop_over_rows(seed: int, rows: int, bins: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(rows, 3, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    y = torch.randint(0, 3, (rows,), generator=generator)
    gaps = dict.fromkeys(range(bins), 0.0)
    for row, label in zip(probabilities.tolist(), y.tolist(), strict=True):
        top = max(row)
        gaps[math.ceil(top * bins) - 1] += (row.index(top) == label) - top
    table = reliability(probabilities, y, bins)
    assert table.expected_calibration_error == pytest.approx(sum(map(abs, gaps.values())) / rows)
    assert sum(table.count) == rows


def test_coverage_by_hand() -> None:
    prediction = RegressionPrediction(torch.zeros(2, 4).double(), torch.ones(2, 4).double())
    table = coverage(prediction, torch.tensor([0.0, 0.6, -1.6, 3.0]), levels=(0.5, 0.9))
    assert table.covered == (0.5, 0.75)
    assert table.width == pytest.approx((2 * 0.6744897501960817, 2 * 1.6448536269514722))
    assert table.standard_error == pytest.approx((0.25, 0.15))


def test_instruments_need_rows() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        reliability(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ShapeError, match="at least one"):
        coverage(RegressionPrediction(torch.zeros(2, 0)), torch.zeros(0))
    with pytest.raises(OptionError, match="bins"):
        reliability(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), bins=0)


def test_few_rows_leave_the_temperature_alone_and_many_do_not() -> None:
    """The same doubtful gain, on 12 rows and on 12 000: only the second is more than chance gives."""
    probabilities = torch.tensor([[0.8, 0.2]]).expand(12, 2)
    right = torch.tensor([0] * 9 + [1] * 3)  # 75 % where 80 % was said
    few = ClassificationPrediction(probabilities.expand(2, 12, 2))
    many = ClassificationPrediction(probabilities.repeat(1000, 1).expand(2, 12_000, 2))
    assert Temperature.fit(few, right).temperature == 1.0
    assert Temperature.fit(many, right.repeat(1000)).temperature > 1.1
