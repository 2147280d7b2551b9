"""The layer: a drop-in for torch.nn.Dropout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dropkit as dk
from dropkit.errors import ProbabilityError


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
