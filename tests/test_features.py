"""The layer: a drop-in for torch.nn.Dropout."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError


def test_evaluation_is_the_identity_until_a_member_is_asked_for():
    layer, x = dk.nn.Dropout(0.5).eval(), torch.ones(3, 40)
    assert layer(x) is x
    with dk.masks(seed=0):
        assert layer(x) is x
    with dk.masks(seed=0, member=1):
        assert (layer(x) == 0).any()


def test_it_takes_torchs_place():
    ours, theirs = dk.nn.Dropout(0.3, inplace=True), nn.Dropout(0.3, inplace=True)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict() == {}
    twin = copy.deepcopy(ours)
    with dk.masks(seed=0):
        first = ours(torch.ones(2, 9))
    with dk.masks(seed=0):
        assert torch.equal(twin(torch.ones(2, 9)), first)


def test_inplace_writes_into_its_input():
    x = torch.ones(2, 50)
    y = dk.nn.Dropout(0.5, inplace=True)(x)
    assert y is x
    assert (x == 0).any()


def test_training_false_is_the_identity_even_in_a_members_context():
    x = torch.ones(2, 5)
    with dk.masks(seed=0, member=1):
        assert dk.functional.dropout(x, 0.5, training=False) is x


def test_names_are_the_models_own():
    model = nn.Sequential(nn.Linear(2, 2), dk.nn.Dropout(), nn.Sequential(dk.nn.Dropout()))
    assert dk.nn.name_sites(model) == ("1", "2.0")
    assert model[2][0].site == "2.0"


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "half", None])
def test_a_wrong_rate_is_said(p):
    with pytest.raises(ProbabilityError, match=r"p=.* was given"):
        dk.nn.Dropout(p)
    with pytest.raises(ProbabilityError, match=r"p=.* was given"):
        dk.functional.dropout(torch.ones(2), p)


def test_a_percentage_gets_a_hint():
    with pytest.raises(ProbabilityError, match=r"write 0\.2"):
        dk.nn.Dropout(20)


def test_a_tensor_of_rates_drops_each_feature_at_its_own_and_keeps_the_mean():
    rates = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    with dk.masks(seed=5):
        y = dk.functional.dropout(torch.ones(20_000, 5), rates)
    dropped = (y == 0).double().mean(0)
    assert dropped[0] == 0
    assert dropped[4] == 1
    # 6 standard deviations: a false alarm in 1 of 10**8 seeds, and this seed is fixed
    assert ((dropped - rates).abs() <= 6 * (rates * (1 - rates) / 20_000).sqrt()).all()
    for column, rate in zip(y.T[:4], rates[:4], strict=True):
        torch.testing.assert_close(column[column != 0].unique(), (1 / (1 - rate)).reshape(1))


def test_rates_by_sample_follow_the_row_and_are_monotone_and_members_share_them():
    x = torch.ones(6, 400)
    low, high = torch.full((6, 1), 0.2), torch.full((6, 1), 0.6)
    with dk.masks(seed=1):
        few = dk.functional.dropout(x, low) == 0
    with dk.masks(seed=1):
        many = dk.functional.dropout(x, high) == 0
    assert (many | ~few).all()
    with dk.masks(seed=1, row_offset=4):
        assert torch.equal(dk.functional.dropout(x[4:], low[4:]) == 0, few[4:])
    with dk.masks(seed=1, member=3):
        member = dk.functional.dropout(x, low)
    assert (member == member[:1]).all()
    x = torch.tensor([[float("nan"), 1.0]]).requires_grad_()
    y = dk.functional.dropout(x, torch.tensor([1.0, 0.0]))
    assert y.tolist() == [[0.0, 1.0]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(("shape", "shared"), [((3,), ()), ((2, 1, 1), ()), ((1, 4), (1,))])
def test_rates_that_do_not_fit_are_refused(shape, shared):
    with pytest.raises(ShapeError, match="broadcast against"):
        dk.functional.dropout(torch.ones(2, 4), torch.full(shape, 0.5), shared=shared)


def test_a_rate_by_schedule_needs_a_step_and_a_committee_takes_the_last_word():
    layer = dk.nn.Dropout(dk.nn.schedules.linear(0.0, 0.5, steps=10))
    x = torch.ones(4, 1000)
    with pytest.raises(AddressError, match="which step"):
        layer(x)
    with dk.masks(seed=0, step=0):
        assert torch.equal(layer(x), x)
    with dk.masks(seed=0, step=5):
        assert torch.equal(layer(x).unique(), torch.tensor([0.0, 65536 / 49152]))
    layer.eval()
    assert torch.equal(layer(x), x)
    with dk.masks(seed=0, member=1):
        assert torch.equal(layer(x).unique(), torch.tensor([0.0, 2.0]))


def test_schedules_are_the_curves_they_are_named_for():
    schedules = dk.nn.schedules
    assert [schedules.early(0.3, 5)(t) for t in (0, 4, 5, 99)] == [0.3, 0.3, 0.0, 0.0]
    assert [schedules.late(0.3, 5)(t) for t in (0, 4, 5, 99)] == [0.0, 0.0, 0.3, 0.3]
    assert [schedules.linear(0.1, 0.3, 4)(t) for t in (0, 2, 4)] == pytest.approx([0.1, 0.2, 0.3])
    curve = schedules.curriculum(0.5, 1000)
    for t in (0, 10, 100, 500, 999):
        assert curve(t) == pytest.approx(0.5 * (1 - math.exp(-10 * t / 1000)), abs=2e-3)
    assert curve(1000) == 0.5
    assert schedules.ramp(0.2, 5) == pytest.approx((0.0, 0.05, 0.1, 0.15, 0.2))
    assert schedules.ramp(0.2, 1) == (0.2,)
    for steps, rates in (((), ()), ((0, 1), (0.5,)), ((3, 1), (0.1, 0.2))):
        with pytest.raises(OptionError):
            schedules.Schedule(steps, rates)
    with pytest.raises(ProbabilityError):
        schedules.linear(0.0, 50, 10)
    with pytest.raises(OptionError):
        schedules.early(0.5, True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    "form", [dk.functional.dropout, dk.functional.gaussian_dropout, dk.functional.exact_dropout]
)
def test_whole_numbers_are_refused(form, dtype):
    with pytest.raises(OptionError, match="floating or complex dtype"):
        form(torch.ones(4, 3, dtype=dtype), 0.5)


@pytest.mark.parametrize("rates", [[0.1, 1.5], [-0.1, 0.2], [0.1, float("nan")]])
def test_a_layer_refuses_a_tensor_with_a_rate_outside(rates):
    with pytest.raises(ProbabilityError, match="every chance lies in"):
        dk.nn.Dropout(torch.tensor(rates))
    with pytest.raises(ProbabilityError, match="floating-point"):
        dk.nn.Dropout(torch.tensor([0, 1]))
