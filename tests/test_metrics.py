"""Scores against numerical integration, metrics against torchmetrics' own, batches against the whole."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchmetrics looks at other packages while it is imported
    import torchmetrics

from dropkit.committee import mixture
from dropkit.committee.calibrate import ConformalInterval
from dropkit.committee.conformal_sets import ConformalSet
from dropkit.committee.metrics import (
    ContinuousRankedProbabilityScore,
    Coverage,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    SpreadAUROC,
)
from dropkit.committee.mixture import mixture_crps, mixture_log_density, sample_crps
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.committee.ranking import auroc, midranks
from dropkit.committee.reliability import coverage, reliability
from dropkit.committee.tolerance import summarise
from dropkit.errors import MissingPackageError, OptionError, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(rows: int = 40, members: int = 9) -> tuple[RegressionPrediction, Tensor]:
    return RegressionPrediction(normal(members, rows), normal(members, rows, seed=1).exp()), normal(
        rows, seed=2
    )


def classes(rows: int = 60, members: int = 9) -> tuple[ClassificationPrediction, Tensor]:
    prediction = ClassificationPrediction((2 * normal(members, rows, 4)).softmax(dim=-1))
    return prediction, torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(5))


def by_quadrature(distribution, y: float, low: float, high: float, points: list[float]) -> float:
    """Integral of (F(t) - [y <= t])^2."""
    inside = sorted({p for p in [y, *points] if low < p < high})
    cuts = [low, *inside, high]
    return math.fsum(
        integrate.quad(lambda t: (distribution(t) - (y <= t)) ** 2, a, b, limit=200)[0]
        for a, b in itertools.pairwise(cuts)
    )


# --- the functions ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), y=st.floats(-4, 4), scale=st.sampled_from([0.05, 1.0, 3.0]))
def test_the_score_of_a_mixture_is_its_integral(seed: int, y: float, scale: float) -> None:
    means, variances = normal(4, seed=seed), (scale * normal(4, seed=seed + 1).exp()).square()
    score = float(mixture_crps(means, variances, torch.tensor(y, dtype=torch.float64)))
    mu, sd = means.numpy(), variances.sqrt().numpy()
    reach = float(10 * sd.max() + abs(mu).max() + abs(y))
    expected = by_quadrature(lambda t: stats.norm.cdf(t, mu, sd).mean(), y, -reach, reach, mu.tolist())
    assert score == pytest.approx(expected, rel=1e-6, abs=1e-8)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), y=st.floats(-4, 4), members=st.integers(1, 7))
def test_the_score_of_values_is_its_integral(seed: int, y: float, members: int) -> None:
    values = normal(members, seed=seed)
    at = torch.tensor(y, dtype=torch.float64)
    score = float(sample_crps(values, at))
    steps = values.numpy()
    expected = by_quadrature(lambda t: (steps <= t).mean(), y, -12.0, 12.0, steps.tolist())
    assert score == pytest.approx(expected, abs=1e-9)
    pairs = np.abs(steps[:, None] - steps).sum() / 2
    assert score == pytest.approx(np.abs(steps - y).mean() - pairs / members**2, abs=1e-12)
    if members > 1:
        fair = np.abs(steps - y).mean() - pairs / (members * (members - 1))
        assert float(sample_crps(values, at, fair=True)) == pytest.approx(fair, abs=1e-12)
    # Members without noise are values.
    assert float(mixture_crps(values, torch.zeros_like(values), at)) == pytest.approx(score, abs=1e-12)


def test_one_normal_law_has_the_score_of_the_textbook() -> None:
    y = torch.linspace(-3, 3, 13, dtype=torch.float64)
    z = ((y - 0.5) / 2).numpy()
    expected = 2 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    mean, variance = torch.full((1, 13), 0.5).double(), torch.full((1, 13), 4.0).double()
    np.testing.assert_allclose(mixture_crps(mean, variance, y).numpy(), expected, rtol=1e-12)


def test_the_fair_score_does_not_depend_on_the_number_of_members() -> None:
    # E of the fair score is that of the law itself; for standard normal values and y = 0 it is (sqrt 2 - 1) / sqrt pi.
    truth = (math.sqrt(2) - 1) / math.sqrt(math.pi)
    for members in (2, 5, 20):
        scores = sample_crps(normal(members, 20_000, seed=members), torch.zeros(20_000), fair=True)
        assert float(scores.mean()) == pytest.approx(
            truth, abs=5 * float(scores.std()) / math.sqrt(20_000)
        )  # 1 in 10^6
    plain = sample_crps(normal(2, 20_000, seed=2), torch.zeros(20_000))
    assert float(plain.mean()) > 1.5 * truth  # what few members cost without it


def test_a_score_keeps_its_digits_on_a_large_value() -> None:
    values, y = normal(50, 3), normal(3, seed=1)
    torch.testing.assert_close(
        sample_crps(values + 1e8, y + 1e8), sample_crps(values, y), rtol=1e-6, atol=0.0
    )


def test_members_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, y = numbers()
    whole = mixture_crps(prediction.samples, prediction.noise, y)  # type: ignore[arg-type]
    monkeypatch.setattr(mixture, "PAIRS_AT_ONCE", 2 * prediction.samples.numel())
    torch.testing.assert_close(mixture_crps(prediction.samples, prediction.noise, y), whole)  # type: ignore[arg-type]


def test_the_density_is_that_of_scipy() -> None:
    prediction, y = numbers()
    assert prediction.noise is not None
    density = stats.norm.pdf(y.numpy(), prediction.samples.numpy(), prediction.noise.sqrt().numpy()).mean(0)
    np.testing.assert_allclose(
        mixture_log_density(y, prediction.samples, prediction.noise).numpy(), np.log(density)
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_the_area_is_that_of_all_pairs(rows: list[tuple[int, bool]]) -> None:
    spread = torch.tensor([float(v) for v, _ in rows])
    flags = torch.tensor([f for _, f in rows])
    pairs = [(a > b) + 0.5 * (a == b) for a in spread[flags].tolist() for b in spread[~flags].tolist()]
    area = auroc(spread, flags)
    if pairs:
        assert area == pytest.approx(sum(pairs) / len(pairs))
        assert area == pytest.approx(roc_auc_score(flags.numpy(), spread.numpy()))
    else:
        assert area is None
    np.testing.assert_array_equal(midranks(spread).numpy(), stats.rankdata(spread.numpy()))


def test_score_mistakes_are_named() -> None:
    with pytest.raises(ShapeError, match="like one of them"):
        sample_crps(normal(3, 4), normal(4, 1))
    with pytest.raises(ShapeError, match="at least 2"):
        sample_crps(normal(1, 4), normal(4), fair=True)
    with pytest.raises(ShapeError, match="one for each"):
        mixture_crps(normal(3, 4), normal(4).exp(), normal(4))
    with pytest.raises(ShapeError, match=r"\(n,\) each"):
        auroc(normal(3), torch.zeros(4))


# --- the metrics -----------------------------------------------------------------------------------------


def in_batches(metric: torchmetrics.Metric, prediction, y: Tensor, sizes: list[int]) -> Tensor:
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        metric.update(prediction.rows(part), y[part])
        start += size
    assert start == len(y)
    return metric.compute()


METRICS = {
    "nll of numbers": (NegativeLogLikelihood, numbers, lambda p, y: -p.log_likelihood(y).mean()),
    "nll of classes": (NegativeLogLikelihood, classes, lambda p, y: -p.log_likelihood(y).mean()),
    "crps": (ContinuousRankedProbabilityScore, numbers, lambda p, y: mixture_crps(p.samples, p.noise, y).mean()),
    "ece": (
        ExpectedCalibrationError, classes,
        lambda p, y: reliability(p.probabilities, y).expected_calibration_error,
    ),
    "coverage": (lambda: Coverage(0.8), numbers, lambda p, y: coverage(p, y, (0.8,)).covered[0]),
    "wrong classes": (
        SpreadAUROC, classes, lambda p, y: auroc(p.mutual_information, p.label != y),
    ),
    "wrong numbers": (
        lambda: SpreadAUROC(error_above=1.0, spread="total"), numbers,
        lambda p, y: auroc(p.total, (p.mean - y).abs() > 1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_batches_sum_to_the_whole(name: str) -> None:
    make, data, truth = METRICS[name]
    prediction, y = data()
    expected = float(truth(prediction, y))
    for sizes in ([len(y)], [7, 1, len(y) - 8]):
        metric = make()
        assert float(in_batches(metric, prediction, y, sizes)) == pytest.approx(expected, rel=1e-9)
        metric.reset()
        assert float(in_batches(metric, prediction, y, sizes)) == pytest.approx(expected, rel=1e-9)
    assert isinstance(make(), torchmetrics.Metric)
    # forward gives the batch's value and keeps the sum, as every torchmetrics metric does
    metric = make()
    assert float(metric(prediction, y)) == pytest.approx(expected, rel=1e-9)
    assert float(copy.deepcopy(metric).compute()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_two_processes_sum_to_the_whole(name: str) -> None:
    make, data, truth = METRICS[name]
    prediction, y = data()
    one, other = make(), make()
    one.update(prediction.rows(slice(11)), y[:11])
    other.update(prediction.rows(slice(11, None)), y[11:])
    for state, reduction in one._reductions.items():
        mine, theirs = (m._defaults and getattr(m, state) for m in (one, other))
        if isinstance(mine, list):
            setattr(one, state, [*mine, *theirs])
        else:
            setattr(one, state, reduction(torch.stack((mine, theirs))))
    one._computed = None
    assert float(one.compute()) == pytest.approx(float(truth(prediction, y)), rel=1e-9)


def test_they_go_into_one_collection() -> None:
    prediction, y = numbers()
    collection = torchmetrics.MetricCollection(
        {"nll": NegativeLogLikelihood(), "crps": ContinuousRankedProbabilityScore(), "coverage": Coverage()}
    )
    collection.update(prediction, y)
    values = collection.compute()
    assert {name: float(v) for name, v in values.items()} == {
        "nll": pytest.approx(-float(prediction.log_likelihood(y).mean())),
        "crps": pytest.approx(float(mixture_crps(prediction.samples, prediction.noise, y).mean())),  # type: ignore[arg-type]
        "coverage": pytest.approx(coverage(prediction, y, (0.9,)).covered[0]),
    }


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_that_of_torchmetrics(bins: int) -> None:
    prediction, y = classes(400)
    theirs = torchmetrics.classification.MulticlassCalibrationError(
        4, n_bins=bins, norm="l1", validate_args=True
    )
    theirs.update(prediction.probabilities, y)
    ours = ExpectedCalibrationError(bins)
    ours.update(prediction, y)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), abs=1e-6)
    table = ours.reliability
    assert sum(table.count) == 400
    assert len(table.accuracy) == bins
    assert table.expected_calibration_error == pytest.approx(float(ours.compute()), rel=1e-12)


def test_the_score_of_values_is_that_of_torchmetrics() -> None:
    prediction, y = RegressionPrediction(normal(9, 40)), normal(40, seed=2)
    theirs = torchmetrics.regression.ContinuousRankedProbabilityScore()
    theirs.update(prediction.samples.T, y)
    ours = ContinuousRankedProbabilityScore()
    ours.update(prediction, y)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)
    fair = ContinuousRankedProbabilityScore(fair=True)
    fair.update(prediction, y)
    assert float(fair.compute()) == pytest.approx(float(sample_crps(prediction.samples, y, fair=True).mean()))


def test_coverage_of_what_was_calibrated() -> None:
    prediction, y = numbers(80)
    fit = ConformalInterval.fit(prediction.rows(slice(40)), y[:40], 0.8)
    metric = Coverage(0.8, fit)
    metric.update(prediction.rows(slice(40, None)), y[40:])
    table = coverage(prediction.rows(slice(40, None)), y[40:], (0.8,), fit)
    assert float(metric.compute()) == pytest.approx(table.covered[0])
    assert float(metric.width) == pytest.approx(table.width[0])
    classified, labels = classes(80)
    sets = ConformalSet.fit(classified.rows(slice(40)), labels[:40], 0.8)
    metric = Coverage(0.8, sets)
    metric.update(classified.rows(slice(40, None)), labels[40:])
    there = sets.sets(classified.rows(slice(40, None)), 0.8)
    assert float(metric.compute()) == pytest.approx(there.covers(labels[40:]) / 40)
    assert float(metric.width) == pytest.approx(float(there.size.double().mean()))


def test_members_that_were_not_kept_are_scored_by_their_sums() -> None:
    prediction, y = classes()
    summary = summarise(prediction.samples, "categorical")
    for make in (NegativeLogLikelihood, ExpectedCalibrationError, SpreadAUROC):
        ours, theirs = make(), make()
        ours.update(prediction, y)
        theirs.update(summary, y)
        assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-9)
    of_numbers = RegressionPrediction(normal(30, 20), normal(30, 20, seed=1).exp())
    samples = torch.stack((of_numbers.samples, of_numbers.noise), dim=-1)  # type: ignore[list-item]
    metric = Coverage(0.9)
    metric.update(summarise(samples, "gaussian"), normal(20, seed=2))
    width = 2 * stats.norm.ppf(0.95) * of_numbers.std
    assert float(metric.width) == pytest.approx(float(width.mean()))
    with pytest.raises(OptionError, match="kept"):
        ContinuousRankedProbabilityScore().update(summarise(samples, "gaussian"), normal(20))  # type: ignore[arg-type]


def test_strange_rows_are_found_by_their_spread() -> None:
    here, there = normal(20, 200), 3 * normal(20, 100, seed=1)
    prediction = RegressionPrediction(torch.cat((here, there), dim=1))
    strange = torch.arange(300) >= 200
    metric = SpreadAUROC("novelty")
    metric.update(prediction, strange)
    assert float(metric.compute()) > 0.99
    metric.reset()
    metric.update(prediction, torch.ones(300, dtype=torch.bool))
    assert math.isnan(float(metric.compute()))  # nothing to compare with
    several = RegressionPrediction(torch.stack((prediction.samples, 0 * prediction.samples), dim=-1))
    metric.reset()
    metric.update(several, strange)
    assert float(metric.compute()) > 0.99


def test_metric_mistakes_are_named() -> None:
    prediction, y = numbers()
    classified, labels = classes()
    with pytest.raises(OptionError, match="error_above"):
        SpreadAUROC().update(prediction, y)
    with pytest.raises(OptionError, match="none such"):
        SpreadAUROC(spread="epistemic").update(classified, labels)
    for bad in ({"against": "all"}, {"spread": "samples"}, {"error_above": -1.0}):
        with pytest.raises(OptionError):
            SpreadAUROC(**bad)
    with pytest.raises(ShapeError, match="must agree"):
        SpreadAUROC("novelty").update(prediction, y[:3])
    with pytest.raises(OptionError, match="sets"):
        Coverage().update(classified, labels)
    with pytest.raises(OptionError, match="point model"):
        ContinuousRankedProbabilityScore(fair=True).update(prediction, y)
    with pytest.raises(ShapeError, match="must agree"):
        ContinuousRankedProbabilityScore().update(prediction, y[:, None])
    with pytest.raises(OptionError, match="bins"):
        ExpectedCalibrationError(0)


def test_without_torchmetrics_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "dropkit.committee.metrics")
    with pytest.raises(MissingPackageError, match=r'pip install "dropkit\[metrics\]"'):
        importlib.import_module("dropkit.committee.metrics")
