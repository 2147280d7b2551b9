"""Design: letters as numbers, picking rules against slow ones, campaigns, and the committee in BoTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement
from botorch.optim import optimize_acqf, optimize_acqf_discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dropkit as dk
from dropkit.claims import Setting, judge
from dropkit.claims.experiments import design
from dropkit.errors import OptionError, ShapeError
from dropkit.fields.design import dropout_model, greedy, one_hot, run_campaign, thompson, upper_bound


@given(st.lists(st.text("ACGT", min_size=3, max_size=3), min_size=1, max_size=8))
def test_one_hot_can_be_read_back(sequences):
    found = one_hot(sequences)
    assert found.shape == (len(sequences), 12)
    back = ["".join("ACGT"[i] for i in row.reshape(3, 4).argmax(1)) for row in found]
    assert back == sequences
    assert (found.reshape(-1, 3, 4).sum(2) == 1).all()


def test_letters_have_their_alphabets():
    assert one_hot(["acgu"], "rna").reshape(4, 4).tolist() == np.eye(4).tolist()
    assert one_hot(["MW"], "protein").shape == (1, 40)
    assert one_hot(["xy"], "XY").tolist() == [[1, 0, 0, 1]]
    with pytest.raises(OptionError, match="'B'"):
        one_hot(["AB"])
    with pytest.raises(ShapeError, match=r"\[1, 2\]"):
        one_hot(["A", "AC"])
    with pytest.raises(ShapeError):
        one_hot([])


@given(st.integers(1, 6), st.integers(1, 12), st.data())
@settings(max_examples=60)
def test_picks_are_what_a_slow_reader_of_the_rule_would_pick(members, designs, data):
    seed = data.draw(st.integers(0, 999))
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal((members, designs))
    closed = generator.random(designs) < 0.3
    closed[generator.integers(designs)] = False
    samples[:, closed] = -np.inf
    count = data.draw(st.integers(1, int((~closed).sum())))
    means = [(-np.mean(samples[:, i]), i) for i in range(designs) if not closed[i]]
    assert greedy(samples, count).tolist() == [i for _, i in sorted(means)[:count]]
    bounds = [
        (-np.mean(samples[:, i]) - 2 * np.std(samples[:, i]), i) for i in range(designs) if not closed[i]
    ]
    assert upper_bound(samples, count, 2.0).tolist() == [i for _, i in sorted(bounds)[:count]]
    taken: list[int] = []
    while len(taken) < count:
        one = samples[len(taken) % members]
        taken.append(
            max((i for i in range(designs) if i not in taken and not closed[i]), key=lambda i: one[i])
        )
    assert thompson(samples, count).tolist() == taken


def test_a_campaign_keeps_the_books():
    values = np.arange(400.0)
    best_first = lambda built, count: np.setdiff1d(np.arange(400), built)[::-1][:count]  # noqa: E731
    found = run_campaign(values, best_first, rounds=2, batch=3, start=10, seed=1)
    assert [r.built for r in found.rounds] == [10, 13, 16]
    assert found.rounds[1].regret == 0
    assert found.rounds[-1].recall == 1  # the 4 best are among the start and the first 6 picks
    assert len(set(found.rows.tolist())) == 16
    again = run_campaign(values, best_first, rounds=2, batch=3, start=10, seed=1)
    assert (again.rows == found.rows).all()
    with pytest.raises(OptionError, match="twice or built"):
        run_campaign(values, lambda built, count: built[:count], rounds=1, batch=3, start=10)
    with pytest.raises(OptionError, match="from a pool of 400"):
        run_campaign(values, best_first, rounds=10, batch=96)
    with pytest.raises(ShapeError, match="N designs"):
        run_campaign(values[None], best_first)
    with pytest.raises(OptionError, match="may be picked"):
        greedy(np.full((2, 3), -np.inf), 1)


def test_botorch_sees_the_members():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), dk.nn.Dropout(0.3), nn.Linear(16, 1)).double()
    committee = dk.Committee(network, members=12, seed=5)
    model = dropout_model(committee)
    x = torch.rand(4, 2, 3, dtype=torch.float64)
    samples = model(x)
    assert samples.shape == (4, 12, 2, 1)
    prediction = committee.predict(x.reshape(-1, 3))
    torch.testing.assert_close(samples.mean(1).reshape(-1), prediction.mean.reshape(-1))
    torch.testing.assert_close(model.posterior(x).mean, samples.mean(1))
    acquisition = qLogExpectedImprovement(model, best_f=float(samples.detach().mean()))
    best, value = optimize_acqf(
        acquisition, bounds=torch.tensor([[0.0] * 3, [1.0] * 3]).double(), q=2, num_restarts=2, raw_samples=8
    )
    assert best.shape == (2, 3)
    choices = torch.rand(20, 3, dtype=torch.float64)
    picked, _ = optimize_acqf_discrete(acquisition, q=1, choices=choices)
    scores = torch.stack([acquisition(c[None, None]) for c in choices])
    torch.testing.assert_close(picked[0], choices[scores.argmax()])
    assert torch.isfinite(value)
    with pytest.raises(ShapeError, match="at least 2 outputs"):
        dropout_model(committee, outputs=2)(x)


def test_the_claim_runs_small(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")
    monkeypatch.setattr(design, "BATCH", 10)
    monkeypatch.setattr(design, "ROUNDS", 1)
    found = design.experiment(Setting(), epochs=1, members=3)
    judge(design.CLAIM, found)
    assert "6-mers" in found.data
