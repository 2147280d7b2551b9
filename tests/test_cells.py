"""Single cells: the laws of counts against scipy, thinning, the check of zeros on simulated data, the autoencoder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

import dropkit as dk
from dropkit.claims import Setting, judge
from dropkit.claims.experiments import cells
from dropkit.errors import OptionError, ShapeError
from dropkit.fields.cells import (
    CountAutoencoder,
    check_zeros,
    negative_binomial_nll,
    poisson_nll,
    read_counts,
    thin_counts,
    train_autoencoder,
    zero_inflated_nll,
)
from dropkit.fields.cells.zeros import mask_zeros, negative_binomial_zeros


def simulated(cells: int, genes: int, inflation: float = 0.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mean = generator.lognormal(1.5, 1.0, genes)
    counts = generator.negative_binomial(4.0, 4.0 / (4.0 + mean), (cells, genes))
    return (counts * (generator.random((cells, genes)) >= inflation)).astype(np.float32)


@given(st.integers(0, 200), st.floats(0.01, 80), st.floats(0.01, 10), st.floats(-6, 6))
@settings(max_examples=80)
def test_the_laws_are_scipys(count, mean, dispersion, logit):
    k, mu, phi = (torch.tensor(v, dtype=torch.float64) for v in (float(count), mean, dispersion))
    np.testing.assert_allclose(
        float(poisson_nll(k, mu)), -stats.poisson.logpmf(count, mean), rtol=1e-9, atol=1e-9
    )
    r = 1 / dispersion
    law = stats.nbinom(r, r / (r + mean))
    np.testing.assert_allclose(
        float(negative_binomial_nll(k, mu, phi)), -law.logpmf(count), rtol=1e-7, atol=1e-7
    )
    pi = 1 / (1 + np.exp(-logit))
    whole = np.log((count == 0) * pi + (1 - pi) * law.pmf(count)) if law.pmf(count) > 1e-290 else None
    if whole is not None:
        found = zero_inflated_nll(k, mu, phi, torch.tensor(logit, dtype=torch.float64))
        np.testing.assert_allclose(float(found), -whole, rtol=1e-7, atol=1e-7)


def test_predicted_zero_shares_are_the_laws_at_zero():
    mean, phi = np.array([0.1, 1.0, 7.0]), np.array([0.5, 2.0, 0.0])
    expected = [
        stats.nbinom(1 / p, 1 / (1 + p * m)).pmf(0) if p else np.exp(-m)
        for m, p in zip(mean, phi, strict=True)
    ]
    np.testing.assert_allclose(negative_binomial_zeros(mean, phi), expected, rtol=1e-9)
    generator = np.random.default_rng(0)
    drawn = generator.poisson(2.0 / 0.7, 400_000) * (generator.random(400_000) >= 0.3)
    share = float(mask_zeros(np.array([2.0]), 0.3)[0])
    assert abs((drawn == 0).mean() - share) < 5 * (share * (1 - share) / 400_000) ** 0.5  # false alarm 6e-7
    assert abs(drawn.mean() - 2.0) < 0.02


def test_thinning_parts_a_matrix_in_two():
    counts = simulated(60, 30)
    part = thin_counts(counts, 0.3, seed=1)
    assert (part >= 0).all()
    assert (part <= counts).all()
    total = counts.sum()
    assert abs(part.sum() - 0.3 * total) < 5 * (0.21 * total) ** 0.5  # false alarm 6e-7
    assert (thin_counts(counts, 0.3, seed=1) == part).all()
    assert (thin_counts(counts, 0.3, seed=2) != part).any()


def test_the_check_tells_inflated_counts_from_others():
    """Twenty data sets of each kind, all told right: varying genes are no inflation, lost counts are."""
    for seed in range(20):
        assert not check_zeros(simulated(400, 60, seed=seed)).inflated
        assert check_zeros(simulated(400, 60, inflation=0.5, seed=seed)).inflated
    text = check_zeros(simulated(400, 60)).to_text()
    assert "not zero-inflated" in text
    assert "negative binomial, gene by gene" in text


def test_counts_are_read_from_what_people_have():
    counts = simulated(60, 30)
    assert (read_counts(sparse.csr_matrix(counts)) == counts).all()
    frame = SimpleNamespace(layers={"counts": sparse.csr_matrix(counts)}, X=np.log1p(counts))
    assert (read_counts(frame) == counts).all()
    with pytest.raises(OptionError, match="Give raw counts"):
        read_counts(SimpleNamespace(layers={}, X=np.log1p(counts)))
    with pytest.raises(OptionError, match="no counts"):
        read_counts(-counts)
    with pytest.raises(ShapeError, match="cells, genes"):
        read_counts(counts[0])
    with pytest.raises(OptionError, match="need 50 cells"):
        check_zeros(counts[:10])
    with pytest.raises(OptionError, match="between 0 and 1"):
        thin_counts(counts, 1.0)


@pytest.mark.parametrize("likelihood", ["negative binomial", "poisson", "zero-inflated", "squared error"])
def test_training_makes_the_other_half_likelier(likelihood):
    counts = simulated(200, 25)
    train = thin_counts(counts, 0.5)
    torch.manual_seed(0)
    model = CountAutoencoder(25, hidden=16, bottleneck=8, likelihood=likelihood)
    x, other = torch.from_numpy(train), torch.from_numpy(counts - train)

    def loss():
        with torch.no_grad():
            return float(model.negative_log_likelihood(other, model(x)).sum(-1).mean())

    before = loss()
    train_autoencoder(model, train, epochs=30, batch=50)
    assert loss() < before
    assert not model.training
    assert (model(torch.zeros(2, 25)) >= 0).all()  # a cell without counts
    assert torch.isfinite(model.loss(torch.zeros(2, 25))).all()


def test_a_seed_says_all_and_members_differ():
    counts = simulated(60, 12)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(
            train_autoencoder(CountAutoencoder(12, hidden=8, bottleneck=4), counts, epochs=2, batch=25)
        )
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    spread = dk.Committee(models[0], members=8).predict(torch.from_numpy(counts)).epistemic
    assert (spread > 0).any()


def test_bad_models_are_said():
    with pytest.raises(OptionError, match="likelihood='gauss'"):
        CountAutoencoder(5, likelihood="gauss")
    with pytest.raises(ShapeError, match="5 genes"):
        CountAutoencoder(5)(torch.zeros(2, 4))


def test_the_claim_runs_small(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")
    monkeypatch.setattr(cells, "find_spec", lambda name: None)
    found = cells.experiment(Setting(), epochs=1, genes=40)
    judge(cells.CLAIM, found)
    assert "simulated" in found.data
    assert found.figures["zeros"].value > 0
