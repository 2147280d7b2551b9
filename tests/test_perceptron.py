"""The kernel for small perceptrons: members of the model itself, to rounding, whatever stands in the line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee import Committee, plan
from dropkit.committee.perceptron import WIDEST, find_perceptron
from dropkit.committee.perceptron_cpu import IDENTITY, LEAKY_RELU, RELU, ROWS, SIGMOID, TANH, run_members

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity)
NOISES = (dk.nn.Dropout, dk.nn.GaussianDropout, dk.nn.UniformDropout)


@st.composite
def lines(draw: st.DrawFn) -> nn.Sequential:
    """Perceptrons with masks before, between and behind their layers."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    rate = st.sampled_from([0.0, 0.2, 0.5, 1.0])
    width = draw(st.integers(1, 9))
    modules: list[nn.Module] = []

    def noise() -> None:
        if draw(st.booleans()):
            kind, p = draw(st.sampled_from(NOISES)), draw(rate)
            modules.append(kind(p if kind is dk.nn.Dropout else min(p, 0.5)))

    first = width
    noise()
    for _ in range(draw(st.integers(1, 3))):
        new = draw(st.integers(1, 9))
        modules.append(nn.Linear(width, new, bias=draw(st.booleans())))
        width = new
        noise()
        if draw(st.booleans()):
            modules.append(draw(st.sampled_from(ACTIVATIONS))())
        noise()
    modules.append(nn.Linear(width, draw(st.integers(1, 3))))
    if draw(st.booleans()):
        modules.append(nn.Softplus())
    network = nn.Sequential(*modules).double()
    network.inputs = first
    return network


def dense(model: nn.Module, x: Tensor, members: int, seed: int) -> Tensor:
    """Member after member by the model itself."""
    dk.nn.name_sites(model)
    answers = []
    for k in range(members):
        with torch.no_grad(), dk.masks(seed=seed, member=k):
            answers.append(model.eval()(x))
    return torch.stack(answers)


@settings(max_examples=60, deadline=None)
@given(model=lines(), rows=st.sampled_from([1, 3, 64, 70]), seed=st.integers(0, 2**64 - 1))
def test_members_are_those_of_the_model(model: nn.Sequential, rows: int, seed: int) -> None:
    x = torch.randn(rows, model.inputs, dtype=torch.float64)
    committee = Committee(model, members=5, seed=seed, allow=("no spread",))
    samples = committee.samples(x)
    torch.testing.assert_close(samples, dense(model, x, 5, seed), rtol=1e-10, atol=1e-10)
    if not any(isinstance(m, NOISES) and float(m.p) > 0 for m in model):
        assert committee.plan(x).how == "once"
    else:
        assert committee.plan(x).how == "thinned"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions_and_many_members(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        dk.nn.Dropout(0.1), nn.Linear(13, 50), nn.ReLU(), dk.nn.Dropout(0.5), nn.Linear(50, 2)
    )
    model.to(dtype)
    x = torch.randn(51, 13, dtype=dtype)
    samples = Committee(model, members=300, seed=1).samples(x)
    assert samples.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(samples, dense(model, x, 300, 1), rtol=tolerance, atol=tolerance)


class Forward(nn.Module):
    """A perceptron that is no Sequential, with its activation as a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 6), dk.nn.Dropout(0.5), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.first(x))))


class Residual(Forward):
    """Not a straight line."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.relu(self.first(x)))
        return self.last(h + h.tanh())


class Doubled(nn.Linear):
    """A linear map with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    model = Forward()
    model.first.register_forward_hook(lambda module, inputs, output: 3 * output)
    return model


def test_what_is_a_perceptron() -> None:
    drop = dk.nn.Dropout(0.5)
    found = find_perceptron(Forward())
    assert found is not None
    assert found.widths == (6, 1)
    assert [type(module) for module in found.head] == [nn.Linear, nn.ReLU]
    for other in (
        Residual(),
        hooked(),
        nn.Sequential(drop, Doubled(4, 4), nn.Linear(4, 1)),
        nn.Sequential(drop, nn.Linear(4, WIDEST + 1), nn.Linear(WIDEST + 1, 1)),
        nn.Sequential(drop, nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1)),
        nn.Sequential(nn.Linear(4, 4), drop),
        nn.Sequential(dk.nn.AlphaDropout(0.5), nn.Linear(4, 1)),
        nn.Sequential(drop, nn.Linear(4, 4).half(), nn.Linear(4, 1)),
        nn.Linear(4, 1),
    ):
        assert find_perceptron(other) is None


def test_rows_with_positions_are_left_to_others() -> None:
    # (B, T, D): a mask differs from position to position, which the kernel does not know.
    model = nn.Sequential(dk.nn.Dropout(0.5), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(5, 2, 4)
    committee = Committee(model, members=4)
    assert committee.plan(x).how == "batched"
    torch.testing.assert_close(committee.samples(x), dense(model, x, 4, 0), rtol=1e-5, atol=1e-6)


def test_derivatives_take_another_way() -> None:
    model, x = Forward(), torch.randn(3, 4, requires_grad=True)
    committee = Committee(model, members=4)
    prediction = committee.predict(x, grad=True)
    prediction.mean.sum().backward()
    assert float(x.grad.abs().max()) > 0
    torch.testing.assert_close(prediction.mean, committee.predict(x).mean, rtol=1e-5, atol=1e-6)


def test_values_that_are_not_finite_stay_where_they_are() -> None:
    model = Forward()
    x = torch.randn(5, 4)
    x[2] = torch.nan
    samples = Committee(model, members=8, allow=("no spread",)).samples(x)
    assert samples[:, 2].isnan().any()
    assert samples[:, [0, 1, 3, 4]].isfinite().all()


def test_the_kernel_alone_does_what_it_says() -> None:
    # One unit, one row of the block, by hand: 0.5 * (2 * 3) + 1 = 4, then f, then twice.
    for kind, expected in (
        (IDENTITY, 8.0), (RELU, 8.0), (LEAKY_RELU, 8.0), (TANH, 2 * np.tanh(4.0)), (SIGMOID, 2 / (1 + np.exp(-4.0))),
    ):  # fmt: skip
        x, out = np.full((1, ROWS), 3.0), np.zeros((1, ROWS, 1))
        noise = np.array([[2.0, 1.0, 2.0]])
        run_members(
            x, np.array([1, 1]), np.array([0.5]), np.array([1.0]), np.array([kind]), np.array([0.1]), noise, 0,
            np.zeros((0, ROWS)), 1.0, np.array([1]), np.array([2]), out, 0, 1,
        )  # fmt: skip
        np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_a_chain_is_checked_against_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # Were the kernel wrong, the committee would notice and go another way.
    monkeypatch.setattr(plan, "_agree", lambda ours, theirs: False)
    assert Committee(Forward(), members=4).plan(torch.randn(3, 4)).how == "loop"


def test_an_input_that_is_not_finite_is_dropped_like_any_other() -> None:
    # What all members have, less what one dropped, would be infinity less infinity.
    torch.manual_seed(0)
    model = nn.Sequential(dk.nn.Dropout(0.25), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(5, 4)
    x[2, 1] = torch.inf
    expected = dense(model, x, 24, 0)
    samples = Committee(model, members=24).samples(x)
    assert 0 < int(expected[:, 2].isfinite().sum()) < 24
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
