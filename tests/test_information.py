"""Entropy and mutual information: laws, exact values, and what float32 must not destroy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dropkit.committee.information import (
    check_class_probabilities,
    entropy,
    expected_entropy,
    mutual_information,
)
from dropkit.errors import NotProbabilitiesError, ShapeError


@st.composite
def member_probabilities(draw: st.DrawFn) -> Tensor:
    """(M, B, C) in float32 or float64, from nearly uniform to nearly certain, some exactly 0."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([1e-4, 1.0, 30.0, 1000.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.softmax(spread * torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def slow_entropy(row: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in row if p > 0)


@given(member_probabilities())
def test_values_are_those_of_the_definition(probs: Tensor) -> None:
    members, rows, _ = probs.shape
    exact = probs.double()
    for b in range(rows):
        all_doubt = slow_entropy(exact[:, b].mean(dim=0).tolist())
        own_doubt = math.fsum(slow_entropy(exact[m, b].tolist()) for m in range(members)) / members
        tolerance = 1e-6 if probs.dtype == torch.float32 else 1e-12
        assert float(expected_entropy(probs)[b]) == pytest.approx(own_doubt, abs=tolerance)
        assert float(mutual_information(probs)[b]) == pytest.approx(all_doubt - own_doubt, abs=tolerance)


@given(member_probabilities())
def test_doubt_splits_into_that_of_the_members_and_that_between_them(probs: Tensor) -> None:
    whole = entropy(probs.double().mean(dim=0))
    parts = expected_entropy(probs).double() + mutual_information(probs).double()
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


@given(member_probabilities())
def test_bounds_hold(probs: Tensor) -> None:
    members, _, classes = probs.shape
    information = mutual_information(probs)
    assert bool((information >= 0).all())
    assert bool((information <= math.log(min(members, classes)) + 1e-6).all())
    assert bool((entropy(probs) >= 0).all())
    assert bool((entropy(probs) <= math.log(classes) + 1e-6).all())


@given(member_probabilities(), st.integers(2, 7))
def test_members_that_agree_share_exactly_nothing(probs: Tensor, copies: int) -> None:
    assert torch.equal(
        mutual_information(probs[:1].expand(copies, *probs.shape[1:])),
        torch.zeros(probs.shape[1], dtype=probs.dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_members_are_exact(dtype: torch.dtype) -> None:
    sure = torch.eye(2, dtype=dtype)
    assert torch.equal(entropy(sure), torch.zeros(2, dtype=dtype))
    opposed = torch.stack((sure, sure.flip(0)))
    torch.testing.assert_close(mutual_information(opposed), torch.full((2,), math.log(2), dtype=dtype))
    assert torch.equal(expected_entropy(opposed), torch.zeros(2, dtype=dtype))


def test_a_small_disagreement_keeps_its_digits_in_float32() -> None:
    # Two members at 1/2 +- d have mutual information 2 d^2 + O(d^4); entropies of size log 2 leave no trace of it
    # in float32, whose steps there are 6e-8.
    d = 2.0**-14
    probs = torch.tensor([[[0.5 + d, 0.5 - d]], [[0.5 - d, 0.5 + d]]])
    assert float(mutual_information(probs)) == pytest.approx(2 * d**2, rel=1e-6)


@pytest.mark.parametrize(
    "probs",
    [
        torch.tensor([[[2.0, -1.0]]]),
        torch.tensor([[[0.5, 0.4]]]),
        torch.tensor([[[math.nan, 1.0]]]),
        torch.tensor([[[0, 1]]]),
    ],
    ids=["logits", "sum", "nan", "integers"],
)
def test_what_is_no_probability_is_refused(probs: Tensor) -> None:
    for function in (entropy, expected_entropy, mutual_information):
        with pytest.raises(NotProbabilitiesError):
            function(probs)


def test_the_axes_are_named_when_they_are_wrong() -> None:
    with pytest.raises(ShapeError, match=r"\(M, B, C\)"):
        mutual_information(torch.tensor([[0.5, 0.5]]))
    check_class_probabilities(torch.empty(0, 3), axes="B C")  # no rows are no mistake


def test_one_nats_per_member_and_class_against_numpy() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=(6, 9))
    mean = probs.mean(axis=0)
    expected = -(mean * np.log(mean)).sum(-1) + (probs * np.log(probs)).sum(-1).mean(0)
    np.testing.assert_allclose(mutual_information(torch.from_numpy(probs)).numpy(), expected, rtol=1e-10)
