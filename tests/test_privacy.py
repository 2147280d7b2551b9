"""Privacy: divergences by hand, the bound against exact tails and attackers of known strength, DP-SGD's proof."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from dropkit.claims import Setting, judge
from dropkit.claims.experiments import privacy
from dropkit.errors import OptionError, ProbabilityError, ShapeError
from dropkit.fields.privacy import (
    audit,
    delta_at,
    draw_members,
    dropout_delta,
    epsilon_bound,
    membership_scores,
    p_value,
    proven_epsilon,
    train_privately,
)


@given(st.floats(0.01, 6))
def test_randomised_response_is_as_private_as_it_is(epsilon):
    """It is epsilon-private and no more: delta is 0 at epsilon, and P - exp(e) Q below it."""
    yes = math.exp(epsilon) / (1 + math.exp(epsilon))
    first, second = {"y": yes, "n": 1 - yes}, {"y": 1 - yes, "n": yes}
    assert delta_at(first, second, epsilon) == pytest.approx(0, abs=1e-12)
    assert delta_at(first, second, epsilon / 2) == pytest.approx(yes - math.exp(epsilon / 2) * (1 - yes))
    assert delta_at(first, second, 0) == pytest.approx(2 * yes - 1)  # total variation


@given(st.floats(0, 1), st.floats(0, 100), st.integers(1, 30))
def test_no_epsilon_makes_up_for_dropout(p, epsilon, steps):
    assert dropout_delta(p, epsilon, steps=steps) == pytest.approx(1 - p**steps, abs=1e-12)


def test_the_p_value_without_delta_is_the_binomial_tail():
    for epsilon in (0.0, 0.5, 3.0):
        chance = math.exp(epsilon) / (1 + math.exp(epsilon))
        expected = sum(stats.binom.pmf(k, 40, chance) for k in range(33, 41))
        assert p_value(1000, 40, 33, epsilon, 0.0) == pytest.approx(expected)
    assert p_value(1000, 40, 33, 0.5, 1e-3) > p_value(1000, 40, 33, 0.5, 0.0)
    worst = max(
        sum(stats.binom.pmf(k, 40, 1 / (1 + math.exp(-0.5))) for k in range(33 - i, 33)) / i
        for i in range(1, 34)
    )
    expected = p_value(1000, 40, 33, 0.5, 0.0) + 2 * 1000 * 1e-3 * worst
    assert p_value(1000, 40, 33, 0.5, 1e-3) == pytest.approx(expected)


@given(st.integers(1, 200), st.data())
def test_the_bound_is_where_the_p_value_crosses_the_level(guesses, data):
    right = data.draw(st.integers(0, guesses))
    bound = epsilon_bound(500, guesses, right, delta=1e-5, level=0.05)
    if bound > 0:
        assert p_value(500, guesses, right, bound * 0.999, 1e-5) <= 0.05
        assert p_value(500, guesses, right, bound + 1e-6, 1e-5) > 0.05 - 1e-6
    else:
        assert p_value(500, guesses, right, 0.0, 1e-5) > 0.05 or right == guesses == 0


def test_an_attacker_of_known_strength_is_never_credited_with_more():
    """Randomised response of epsilon 2 on each canary: in 60 runs the bound exceeds 2 at most 9 times (level 5 %)."""
    exceeded, total = 0, []
    for seed in range(60):
        generator = np.random.default_rng([seed, 5])

        def answers(members, generator=generator):
            honest = generator.random(len(members)) < math.exp(2) / (1 + math.exp(2))
            return np.where(honest, members, ~members) + 0.01 * generator.random(len(members))

        found = audit(answers, 1000, seed=seed)
        exceeded += found.epsilon > 2
        total.append(found.epsilon)
    assert stats.binom.sf(9, 60, 0.05) < 1e-3
    assert exceeded <= 9
    assert 1.2 < np.mean(total) < 2  # and it is not blind
    perfect = audit(lambda members: members.astype(float), 1000)
    assert perfect.right == perfect.guesses
    assert perfect.epsilon > 4
    assert "any epsilon below" in perfect.to_text()
    blind = audit(lambda members: np.zeros(1000), 1000)
    assert blind.epsilon == 0
    assert "no proof of privacy" in blind.to_text()
    assert blind.auc == pytest.approx(0.5)


def test_scores_are_log_odds_of_the_own_class():
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    p = model(x).softmax(-1).gather(1, y[:, None])[:, 0].detach()
    np.testing.assert_allclose(membership_scores(model, x, y), (p / (1 - p)).log().numpy(), rtol=1e-9)


def test_both_accountants_prove_the_published_epsilon():
    """N 60 000, batch 256, noise 1.1, 60 epochs, delta 1e-5: 3.01 was published for an older accountant."""
    ours = proven_epsilon(60_000, noise=1.1, batch=256, epochs=60)
    theirs = proven_epsilon(60_000, noise=1.1, batch=256, epochs=60, accountant="dp-accounting")
    assert ours == pytest.approx(theirs, rel=0.02)
    assert 2.3 < ours < 3.05


def test_a_private_run_learns_and_can_be_had_again():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(train_privately(nn.Linear(4, 2), x, y, noise=1.0, batch=100, epochs=10, seed=3))
    assert torch.equal(runs[0].model.weight, runs[1].model.weight)
    assert (runs[0].model(x).argmax(1) == y).double().mean() > 0.8
    assert runs[0].epsilon == pytest.approx(proven_epsilon(400, noise=1.0, batch=100, epochs=10), rel=1e-6)
    assert runs[0].steps == 40


def test_bad_input_is_said():
    with pytest.raises(OptionError, match="at least 50"):
        audit(lambda members: members, 10)
    with pytest.raises(ShapeError, match="100 canaries"):
        audit(lambda members: members[:3], 100)
    with pytest.raises(OptionError, match="sum to 1"):
        delta_at({"a": 0.5}, {"a": 1.0}, 0.1)
    with pytest.raises(OptionError, match="at least 0"):
        delta_at({"a": 1.0}, {"a": 1.0}, -1)
    with pytest.raises(ProbabilityError):
        dropout_delta(1.5, 1)
    with pytest.raises(OptionError, match="noise=0"):
        train_privately(nn.Linear(2, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), noise=0)
    with pytest.raises(OptionError, match="'opacus' or 'dp-accounting'"):
        proven_epsilon(100, noise=1, batch=10, epochs=1, accountant="mine")


def test_the_claim_runs_small(monkeypatch):
    monkeypatch.setenv("DROPKIT_DATA", "/nowhere")
    found = privacy.experiment(Setting(), ordinary=200, canaries=60, epochs=1, private_epochs=1)
    _, judged = judge(privacy.CLAIM, found)
    verdicts = {one.rule.quantity: one.verdict for one in judged}
    assert verdicts["counterexample"] == verdicts["never_exceeds"] == "holds"
    assert draw_members(60, 0).tolist() == draw_members(60, 0).tolist()
