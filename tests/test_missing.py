"""Missing data: mechanisms have the rate and dependence they say, the layer is feature dropout, the check is fair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import dropkit as dk
from dropkit.claims import Setting, judge
from dropkit.claims.experiments import missing_mar, missing_mcar
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.fields.missing import MissingInputs, check_missing, mar, mcar, self_masking
from dropkit.fields.missing.check import maximum_likelihood
from dropkit.fields.missing.mechanisms import SITE

MAKERS = {"mcar": mcar, "mar": mar, "self-masking": self_masking}


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix


@given(
    kind=st.sampled_from(sorted(MAKERS)),
    rate=st.floats(0.01, 0.95),
    rows=st.integers(2, 60),
    columns=st.integers(2, 7),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_each_column_loses_the_asked_share_on_average(kind, rate, rows, columns, seed):
    x = correlated(rows, columns, seed)
    chances = MAKERS[kind](x, rate).chances(x)
    may = chances.amax(0) > 0
    assert may.any()
    torch.testing.assert_close(chances[:, may].mean(0), torch.full((int(may.sum()),), rate).double())


def test_drawn_cells_follow_their_chances():
    """A cell is a coin: over 4 000 draws each count lies within 5.5 standard deviations (false alarms below 1e-5)."""
    x = correlated(6, 4)
    for mechanism in (mcar(x, 0.3), mar(x, 0.3), self_masking(x, 0.3)):
        chances = mechanism.chances(x)
        count = sum(mechanism.draw(x, seed=s).double() for s in range(4000))
        spread = (4000 * chances * (1 - chances)).sqrt()
        assert ((count - 4000 * chances).abs() <= 5.5 * spread).all()


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_rows_holes_do_not_depend_on_its_batch(kind):
    x = correlated(50, 5)
    mechanism = MAKERS[kind](x, 0.4)
    whole = mechanism.draw(x, seed=7)
    parts = [mechanism.draw(x[:13], seed=7), mechanism.draw(x[13:], seed=7, row_offset=13)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(mechanism.draw(x, seed=8), whole)


def test_mcar_is_what_feature_dropout_drops():
    x = correlated(40, 5)
    layer = dk.nn.ClassicDropout(torch.full((5,), 0.3, dtype=torch.float64))
    layer.site = SITE
    with dk.masks(seed=3):
        dropped = layer(x)
    filled = MissingInputs(indicators=False)(mcar(x, 0.3).remove(x, seed=3))
    assert torch.equal(dropped, filled)


def test_what_the_chance_depends_on():
    """MCAR on nothing, MAR on the columns that are always seen and on them alone, MNAR on the cell's own value."""
    x = correlated(30, 6)
    changed = x.clone()
    changed[:, 4] += 3
    assert torch.equal(mcar(x, 0.3).chances(x), mcar(x, 0.3).chances(changed))
    at_random = mar(x, 0.3)
    assert torch.equal(at_random.chances(x), at_random.chances(changed))  # column 4 may be missing itself
    seen = x.clone()
    seen[:, 0] += 3
    moved = (at_random.chances(x) != at_random.chances(seen)).all(0)
    assert moved.tolist() == [False, False, True, True, True, True]
    own = self_masking(x, 0.3)
    difference = own.chances(changed) - own.chances(x)
    assert (difference[:, 4] > 0).all()
    assert not difference[:, [0, 1, 2, 3, 5]].any()


def test_the_layer_fills_says_where_and_removes_in_training_alone():
    x = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    layer = MissingInputs(fill=torch.tensor([9.0, 8.0]))
    assert layer.eval()(x).tolist() == [[1.0, 8.0, 0.0, 1.0], [3.0, 4.0, 0.0, 0.0]]
    many = torch.ones(4000, 2)
    layer = MissingInputs(mechanism=mcar(many, 0.25), indicators=False)
    with dk.masks(seed=0, step=1):
        first = layer.train()(many)
    with dk.masks(seed=0, step=2):
        second = layer(many)
    share = float((first == 0).double().mean())
    assert abs(share - 0.25) < 5.5 * (0.25 * 0.75 / 8000) ** 0.5  # false alarms below 1e-7
    assert not torch.equal(first, second)
    with dk.masks(seed=0, member=1):
        assert torch.equal(layer.eval()(many), many)


def test_little_rejects_as_often_as_it_says_under_mcar():
    """80 tables, level 5 %: at most 11 rejections of either test (false alarms of this test below 1e-3)."""
    rejected = np.zeros(2, int)
    for seed in range(80):
        x = correlated(200, 4, seed)
        found = check_missing(mcar(x, 0.2).remove(x, seed=seed).numpy())
        rejected += [found.little.p_value < 0.05, found.refutes_mcar]
    assert stats.binom.sf(11, 80, 0.05) < 1e-3
    assert (rejected <= 11).all(), rejected


@pytest.mark.parametrize("kind", ["mar", "self-masking"])
def test_holes_that_depend_on_values_refute_mcar(kind):
    x = correlated(400, 5)
    found = check_missing(MAKERS[kind](x, 0.3).remove(x).numpy())
    assert found.refutes_mcar
    assert "is refuted" in found.to_text()
    assert "cannot be known" in found.to_text()


def test_the_normal_law_of_rows_with_holes_is_the_likeliest():
    """No step away raises the likelihood of the seen cells; without holes it is mean and covariance."""
    x = correlated(80, 3)
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    whole = np.ones((1, 3), bool)
    mean, covariance = maximum_likelihood(z, whole, np.zeros(80, int))
    np.testing.assert_allclose(mean, z.mean(0), atol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(z.T, bias=True), atol=2e-6)
    spoiled = mcar(x, 0.3).remove(torch.from_numpy(z), seed=2).numpy()
    spoiled = spoiled[~np.isnan(spoiled).all(1)]
    patterns, which = np.unique(~np.isnan(spoiled), axis=0, return_inverse=True)
    mean, covariance = maximum_likelihood(spoiled, patterns, which.reshape(-1))

    def likelihood(mu, sigma):
        total = 0.0
        for k, seen in enumerate(patterns):
            rows = spoiled[which.reshape(-1) == k][:, seen]
            total += stats.multivariate_normal(mu[seen], sigma[np.ix_(seen, seen)]).logpdf(rows).sum()
        return total

    best = likelihood(mean, covariance)
    generator = np.random.default_rng(0)
    for _ in range(20):
        step = 0.05 * generator.standard_normal(3)
        turn = 0.05 * generator.standard_normal((3, 3))
        assert likelihood(mean + step, covariance) < best
        assert likelihood(mean, covariance + turn @ turn.T) < best + 1e-3


def test_a_whole_table_and_a_table_of_few_holes_are_said_to_be_so():
    x = correlated(30, 3).numpy()
    assert check_missing(x).to_text() == "Nothing is missing."
    x[0, 0] = np.nan
    found = check_missing(x)
    assert not found.refutes_mcar
    assert "too few cells to ask" in found.to_text()


def test_bad_input_is_said():
    x = correlated(10, 3)
    with pytest.raises(ProbabilityError):
        mcar(x, 1.5)
    with pytest.raises(OptionError, match=r"\[0, 1\)"):
        mar(x, 1.0)
    with pytest.raises(OptionError, match="columns 0 to 2"):
        mcar(x, 0.1, columns=[3])
    with pytest.raises(OptionError, match="always seen"):
        mar(x, 0.1, columns=[0, 1, 2])
    with pytest.raises(ShapeError, match="N rows, D columns"):
        mcar(x[0], 0.1)
    with pytest.raises(ShapeError, match="3 columns"):
        mcar(x, 0.1).draw(x[:, :2])
    with pytest.raises(ShapeError, match="fill has 2 columns"):
        MissingInputs(fill=torch.zeros(2))(x)
    with pytest.raises(ShapeError, match="at least 2"):
        check_missing([[1.0]])
    with pytest.raises(OptionError, match="infinite"):
        check_missing([[1.0, np.inf], [2.0, 3.0]])
    with pytest.raises(OptionError, match="level=2"):
        check_missing([[1.0, 2.0], [2.0, 3.0]], level=2)


def test_the_claims_run_small(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")  # scikit-learn's table
    found = missing_mcar.experiment(Setting(), epochs=1)
    _, judged = judge(missing_mcar.CLAIM, found)
    assert {j.rule.quantity for j in judged if j.verdict == "holds"} >= {"masks", "objective", "weights"}
    assert "diabetes" in found.data
    other = missing_mar.experiment(Setting(), epochs=1)
    judge(missing_mar.CLAIM, other)
    assert len(other.charts[0].series) == 6


def test_a_wrong_formula_fails_the_claim(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")
    right = missing_mcar.objectives

    def wrong(x, y, rate):
        measured, error, predicted = right(x, y, rate)
        return measured, error, predicted * 1.001

    monkeypatch.setattr(missing_mcar, "objectives", wrong)
    verdict, _ = judge(missing_mcar.CLAIM, missing_mcar.experiment(Setting(), epochs=1))
    assert verdict == "does not hold here"
