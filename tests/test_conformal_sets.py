"""Sets of classes cover as often as they say, at a stated false-alarm rate, and are what slow code says."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from dropkit.committee.conformal_sets import ConformalSet, class_scores
from dropkit.committee.prediction import ClassificationPrediction
from dropkit.errors import ModelDirectoryError, OptionError, ShapeError


def committee_of(probabilities: Tensor) -> ClassificationPrediction:
    return ClassificationPrediction(torch.stack((probabilities, probabilities)))


def wrong_classes(rows: int, seed: int) -> tuple[ClassificationPrediction, Tensor]:
    """A committee that is far too sure, and y from what it should have said."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return committee_of((4.0 * logits + 0.5).softmax(-1)), y


@pytest.mark.parametrize(("score", "seed"), [("least", None), ("adaptive", 5), ("adaptive", None)])
def test_sets_cover_as_often_as_they_say(score: str, seed: int | None) -> None:
    levels, fitting, runs = (0.5, 0.8, 0.9), 39, 600
    # One new row for each fitting set makes the runs independent, so the count is binomial; the chance is exactly
    # ceil((n + 1) level) / (n + 1), which n = 39 makes the level itself, and more where scores tie: with u = 0 all rows
    # whose likeliest class was right have the score 0.
    hits = np.zeros(len(levels), dtype=int)
    for run in range(runs):
        prediction, y = wrong_classes(fitting + 1, seed=run)
        fit = ConformalSet.fit(
            prediction.rows(slice(fitting)),
            y[:fitting],
            levels,
            score=score,
            seed=None if seed is None else seed + run,
        )  # type: ignore[arg-type]
        hits += [fit.sets(prediction.rows(slice(fitting, None)), v).covers(y[fitting:]) for v in levels]
    for hit, level in zip(hits, levels, strict=True):
        tied = score == "adaptive" and seed is None
        law = stats.binomtest(int(hit), runs, level, alternative="less" if tied else "two-sided")
        assert law.pvalue > 1e-9 / len(levels)  # false alarms: 1 in 10^9


def test_the_committee_alone_would_not_have_covered() -> None:
    prediction, y = wrong_classes(2000, seed=1)
    ordered, order = prediction.probabilities.sort(dim=-1, descending=True)
    needed = (ordered.cumsum(-1) < 0.9).sum(-1) + 1  # likeliest classes up to 90 %
    place = (order == y[:, None]).int().argmax(-1)
    assert float((place < needed).double().mean()) < 0.8  # the trap is real
    fit = ConformalSet.fit(prediction.rows(slice(1000)), y[:1000], 0.9)
    share = fit.sets(prediction.rows(slice(1000, None))).covers(y[1000:]) / 1000
    assert share > 0.85  # the level within 5 standard errors of 1000 rows, beside that of the threshold


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), u_seed=st.one_of(st.none(), st.integers(0, 10**6)))
def test_scores_are_those_of_slow_code(seed: int, u_seed: int | None) -> None:
    p = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    scores = class_scores(p, "adaptive", u_seed)
    for b in range(5):
        row = p[b].tolist()
        u = {(scores[b, c] - math.fsum(v for v in row if v > row[c])).item() / row[c] for c in range(4)}
        assert max(u) - min(u) < 1e-9 / min(row)  # one u for the row
        assert all(-1e-9 / min(row) <= v <= 1.0 + 1e-9 / min(row) for v in u)
        if u_seed is None:
            assert max(map(abs, u)) <= 1e-9 / min(row)
    torch.testing.assert_close(class_scores(p, "least"), 1 - p)


def test_a_rows_u_is_its_own_in_any_batch() -> None:
    p = torch.randn(6, 4, dtype=torch.float64).softmax(-1)
    ids = torch.tensor([3, 10**9, 0, 7, 8, 2])
    whole = class_scores(p, "adaptive", 9, ids)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(class_scores(p[order], "adaptive", 9, ids[order]), whole[order])
    assert not torch.equal(class_scores(p, "adaptive", 10, ids), whole)


def test_equal_probabilities_are_ordered_by_class() -> None:
    scores = class_scores(torch.full((1, 4), 0.25, dtype=torch.float64), "adaptive")
    assert scores.tolist() == [[0.0, 0.25, 0.5, 0.75]]


def test_hard_rows_get_larger_sets() -> None:
    generator = torch.Generator().manual_seed(2)
    p = (2.0 * torch.randn(1000, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    prediction, y = (
        committee_of(p),
        torch.multinomial(p, 1, generator=generator)[:, 0],
    )  # as sure as it should be
    fit = ConformalSet.fit(prediction, y, 0.9)
    easy, hard = torch.tensor([[0.97, 0.01, 0.01, 0.01]]), torch.tensor([[0.28, 0.25, 0.24, 0.23]])
    sizes = fit.sets(committee_of(torch.cat((easy, hard)).double())).size
    assert int(sizes[0]) < int(sizes[1])
    assert int(sizes.min()) >= 1  # the likeliest class has the score 0
    least = ConformalSet.fit(prediction, y, 0.5, score="least")
    assert (
        int(least.sets(committee_of(hard.double()), 0.5).size) == 0
    )  # no class is likely enough: said, not hidden


def test_a_threshold_is_the_right_order_statistic() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], dtype=torch.float64)
    fit = ConformalSet.fit(committee_of(p), torch.zeros(4, dtype=torch.int64), (0.5, 0.8), score="least")
    # ceil(5 * 0.5) = 3rd and ceil(5 * 0.8) = 4th of 0.1, 0.2, 0.3, 0.4
    assert fit.thresholds == pytest.approx((0.3, 0.4))
    assert fit.sets(committee_of(p), 0.5).included[:, 0].tolist() == [True, True, True, False]


def test_json_and_back() -> None:
    prediction, y = wrong_classes(50, seed=3)
    fit = ConformalSet.fit(prediction, y, (0.5, 0.9), seed=2**63)
    assert ConformalSet.from_json(json.loads(json.dumps(fit.to_json()))) == fit
    good = fit.to_json()
    for bad in (
        {"levels": [0.9, 0.5]}, {"levels": []}, {"levels": [0.5]}, {"thresholds": [math.nan, 1.0]}, {"rows": 0},
        {"score": "best"}, {"seed": -1}, {"seed": True}, {"thresholds": None},
    ):  # fmt: skip
        with pytest.raises(ModelDirectoryError):
            ConformalSet.from_json({**good, **bad})
    with pytest.raises(ModelDirectoryError):
        ConformalSet.from_json([])  # type: ignore[arg-type]


def test_mistakes_are_named() -> None:
    prediction, y = wrong_classes(8, seed=3)
    with pytest.raises(OptionError, match="takes 9"):
        ConformalSet.fit(prediction, y, 0.9)
    with pytest.raises(OptionError, match="least, adaptive"):
        ConformalSet.fit(prediction, y, 0.5, score="best")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="must agree"):
        ConformalSet.fit(prediction, y[:4], 0.5)
    with pytest.raises(OptionError, match="fitted for"):
        ConformalSet.fit(prediction, y, 0.5).sets(prediction, 0.8)
    with pytest.raises(ShapeError, match="8 rows"):
        ConformalSet.fit(prediction, y, 0.5, seed=1, ids=torch.arange(3))
