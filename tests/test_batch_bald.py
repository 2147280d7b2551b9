"""Choosing rows: joint information against sums over all labellings, the greedy bound, and what it is for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from dropkit.committee import batch_bald
from dropkit.committee.batch_bald import information_gain, joint_mutual_information, select_batch
from dropkit.committee.prediction import ClassificationPrediction, RegressionPrediction
from dropkit.committee.tolerance import summarise
from dropkit.errors import OptionError, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def committee(
    members: int, rows: int, classes: int, seed: int = 0, scale: float = 1.5
) -> ClassificationPrediction:
    return ClassificationPrediction((scale * normal(members, rows, classes, seed=seed)).softmax(dim=-1))


def brute_force(samples: Tensor, rows: tuple[int, ...]) -> float:
    """I(labels of rows; member), summed over every labelling."""
    p = samples.numpy()
    members, _, classes = p.shape
    joint = 0.0
    for labels in itertools.product(range(classes), repeat=len(rows)):
        chance = np.mean(
            [math.prod(p[m, r, c] for r, c in zip(rows, labels, strict=True)) for m in range(members)]
        )
        joint -= chance * math.log(chance) if chance > 0 else 0.0
    own = (
        -sum(np.sum(p[m, r] * np.log(np.maximum(p[m, r], 1e-300))) for m in range(members) for r in rows)
        / members
    )
    return float(joint - own)


shapes = st.tuples(st.integers(2, 5), st.integers(3, 6), st.integers(2, 3), st.integers(0, 10**6))


@settings(max_examples=40)
@given(shapes, st.sampled_from([0.3, 2.0, 40.0]))
def test_each_choice_is_the_best_and_its_score_the_growth(
    shape: tuple[int, int, int, int], scale: float
) -> None:
    members, rows, classes, seed = shape
    prediction = committee(members, rows, classes, seed, scale)
    selection = select_batch(prediction, 3)
    chosen: tuple[int, ...] = ()
    before = 0.0
    for index, score in zip(selection.indices.tolist(), selection.scores.tolist(), strict=True):
        growth = {
            r: brute_force(prediction.samples, (*chosen, r)) - before for r in range(rows) if r not in chosen
        }
        assert score == pytest.approx(growth[index], abs=1e-9)
        assert score >= max(growth.values()) - 1e-9
        chosen = (*chosen, index)
        before += growth[index]
    assert selection.joint_mutual_information == pytest.approx(
        brute_force(prediction.samples, chosen), abs=1e-9
    )
    assert selection.joint_mutual_information == pytest.approx(
        joint_mutual_information(prediction, chosen), abs=1e-9
    )
    assert selection.exact == 3
    assert selection.joint_mutual_information <= math.log(members) + 1e-9
    assert bool((selection.scores.diff() <= 1e-9).all())  # submodular


@settings(max_examples=25)
@given(shapes)
def test_the_greedy_batch_has_its_share_of_the_best(shape: tuple[int, int, int, int]) -> None:
    prediction = committee(*shape)
    found = select_batch(prediction, 3).joint_mutual_information
    best = max(
        joint_mutual_information(prediction, rows) for rows in itertools.combinations(range(shape[1]), 3)
    )
    assert (1 - 1 / math.e) * best - 1e-9 <= found <= best + 1e-9


def test_the_first_score_is_bald() -> None:
    prediction = committee(8, 30, 4)
    selection = select_batch(prediction, 1)
    assert int(selection.indices) == int(prediction.mutual_information.argmax())
    assert float(selection.scores) == pytest.approx(float(prediction.mutual_information.max()), rel=1e-12)
    torch.testing.assert_close(information_gain(prediction), prediction.mutual_information)


def test_copies_of_a_row_are_not_chosen_together() -> None:
    # Ten copies of the row with most disagreement, and one row about which members disagree otherwise, a little less.
    copied = torch.tensor([[0.98, 0.02], [0.98, 0.02], [0.02, 0.98], [0.02, 0.98]])
    other = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.95, 0.05], [0.05, 0.95]])
    prediction = ClassificationPrediction(
        torch.cat((copied[:, None].expand(4, 10, 2), other[:, None]), dim=1)
    )
    assert prediction.mutual_information.topk(2).indices.max() < 10  # the trap is real: BALD takes two copies
    assert select_batch(prediction, 2).indices.tolist() == [0, 10]


def test_sampled_scores_agree_with_exact_ones() -> None:
    prediction = committee(6, 12, 3, seed=4)
    exact = select_batch(prediction, 6)
    assert exact.exact == 6  # 3^5 = 243 labellings
    errors = []
    for seed in range(200):
        labellings = batch_bald.Labellings.none(prediction.samples, limit=40, seed=seed)
        for row in exact.indices[:5].tolist():
            labellings = labellings.with_row(row)
        gain, error = labellings.gain_of(int(exact.indices[5]))
        assert error > 0.0
        errors.append((gain - float(exact.scores[5])) / error)
    # Unbiased: the mean of 200 errors is within 4.5 of its own standard errors; false alarms: 1 in 100 000.
    assert abs(np.mean(errors)) <= 4.5 * np.std(errors) / math.sqrt(200)
    assert np.std(errors) <= 1.5  # the stated error is no smaller than two thirds of what is seen
    sampled = select_batch(prediction, 6, limit=40, seed=1)
    assert sampled.exact == 4  # of no, one, two and three rows there are 1, 3, 9 and 27 labellings
    assert torch.equal(sampled.indices[:4], exact.indices[:4])
    assert torch.equal(select_batch(prediction, 6, limit=40, seed=1).scores, sampled.scores)


def test_rows_that_are_left_out_unseen_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = committee(6, 200, 3, seed=7)
    whole = select_batch(prediction, 5)
    monkeypatch.setattr(
        batch_bald, "VALUES_AT_ONCE", 60
    )  # a few rows at a time, so that many are never looked at
    looked = []
    gains = batch_bald.Labellings.gains
    monkeypatch.setattr(
        batch_bald.Labellings, "gains", lambda self, rows: looked.append(len(rows)) or gains(self, rows)
    )
    pieces = select_batch(prediction, 5)
    assert torch.equal(pieces.indices, whole.indices)
    torch.testing.assert_close(pieces.scores, whole.scores)
    assert sum(looked) < 0.7 * 5 * 200


def test_large_batches_do_not_underflow() -> None:
    prediction = committee(8, 300, 10, scale=0.5)
    selection = select_batch(prediction, 60, limit=64)
    assert bool(torch.isfinite(selection.scores).all())
    assert len(selection.indices.unique()) == 60
    # Labels of 60 rows nearly tell the 8 members apart, and cannot tell more than that.
    assert 0.5 * math.log(8) < selection.joint_mutual_information < math.log(8) * 1.1


def test_candidates_are_kept_to() -> None:
    prediction = committee(5, 20, 3)
    selection = select_batch(prediction, 3, candidates=[2, 3, 5, 7])
    assert set(selection.indices.tolist()) <= {2, 3, 5, 7}
    rows = RegressionPrediction(normal(9, 20), normal(9, 20, seed=1).exp())
    assert set(select_batch(rows, 3, candidates=[2, 3, 5, 7]).indices.tolist()) <= {2, 3, 5, 7}


# --- numbers -------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(3, 6), st.sampled_from([(), (1,), (2,)]), st.integers(0, 10**6))
def test_numbers_are_chosen_by_the_joint_covariance(members: int, out: tuple[int, ...], seed: int) -> None:
    rows = 7
    prediction = RegressionPrediction(
        normal(members, rows, *out, seed=seed), normal(members, rows, *out, seed=seed + 1).exp()
    )
    noise = prediction.aleatoric

    def joint(chosen: tuple[int, ...]) -> float:
        size = len(chosen) * math.prod(out)
        covariance = prediction.joint_covariance(list(chosen)).reshape(size, size).numpy()
        scaled = covariance / noise[list(chosen)].flatten().numpy()[:, None]
        return 0.5 * np.linalg.slogdet(np.eye(size) + scaled)[1]

    selection = select_batch(prediction, 3)
    chosen: tuple[int, ...] = ()
    for index, score in zip(selection.indices.tolist(), selection.scores.tolist(), strict=True):
        growth = {
            r: joint((*chosen, r)) - joint(chosen) if chosen else joint((r,))
            for r in range(rows)
            if r not in chosen
        }
        assert score == pytest.approx(growth[index], abs=1e-9)
        assert score >= max(growth.values()) - 1e-9
        chosen = (*chosen, index)
    np.testing.assert_allclose(information_gain(prediction), [joint((r,)) for r in range(rows)], atol=1e-12)


def test_the_gain_of_a_number_is_the_mutual_information_under_normal_laws() -> None:
    # Many members with normal means and one noise: the mixture of their laws is normal, and its entropy minus
    # theirs is what the label says. The mixture's entropy is integrated numerically.
    means = torch.from_numpy(stats.norm.ppf((np.arange(4000) + 0.5) / 4000))[:, None] * 1.5
    prediction = RegressionPrediction(means, torch.full_like(means, 0.49))
    mean = means.numpy()[:, 0]

    def summand(y: float) -> float:
        density = float(stats.norm.pdf(y, mean, 0.7).mean())
        return -density * math.log(density)

    mixture = integrate.quad(summand, -12, 12, limit=200)[0]
    assert float(information_gain(prediction)) == pytest.approx(
        mixture - float(stats.norm.entropy(0, 0.7)), rel=2e-3
    )


def test_joint_covariance_is_that_of_numpy() -> None:
    prediction = RegressionPrediction(normal(11, 6, 2) + 1e6)
    covariance = prediction.joint_covariance([4, 1])
    assert covariance.shape == (2, 2, 2, 2)
    expected = np.cov(prediction.samples[:, [4, 1]].flatten(1).numpy(), rowvar=False)
    np.testing.assert_allclose(covariance.reshape(4, 4).numpy(), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(covariance[0, 1, 0, 1], prediction.epistemic[4, 1])
    assert ClassificationPrediction(normal(5, 6, 3).softmax(-1)).joint_covariance(slice(2)).shape == (
        2,
        3,
        2,
        3,
    )


def test_fresh_masks_for_each_row_would_hide_what_rows_share() -> None:
    # Two equal rows: with one mask for both, members move them together; with masks of their own they do not.
    shared = normal(4000, 1).expand(4000, 2)
    assert float(RegressionPrediction(shared).joint_covariance()[0, 1]) == pytest.approx(1.0, abs=0.1)
    assert (
        abs(float(RegressionPrediction(normal(4000, 2)).joint_covariance()[0, 1])) < 0.1
    )  # 6 standard errors


def test_mistakes_are_named() -> None:
    prediction = committee(4, 5, 3)
    for size in (0, 6, True, 1.0):
        with pytest.raises(OptionError, match="from 1 to 5"):
            select_batch(prediction, size)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="0 to 4"):
        select_batch(prediction, 1, candidates=[5])
    with pytest.raises(ShapeError, match="twice"):
        select_batch(prediction, 1, candidates=[1, 1])
    with pytest.raises(OptionError, match="with_noise"):
        select_batch(RegressionPrediction(normal(4, 5)), 1)
    with pytest.raises(OptionError, match="limit"):
        joint_mutual_information(prediction, [0, 1, 2], limit=8)
    with pytest.raises(OptionError, match="at least 1"):
        select_batch(prediction, 1, limit=0)
    with pytest.raises(OptionError, match="kept"):
        select_batch(summarise(prediction.samples, "categorical"), 1)  # type: ignore[arg-type]
    spoiled = prediction.samples.clone()
    spoiled[1, 3] = math.nan
    with pytest.raises(OptionError, match=r"rows \[3\]"):
        select_batch(ClassificationPrediction(spoiled), 1)
    assert int(select_batch(ClassificationPrediction(spoiled), 1, candidates=[0, 2]).indices) in (0, 2)
