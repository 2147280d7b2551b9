from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal

from dropkit.errors import ShapeError
from dropkit.training.losses import (
    HIGHEST_LOG_VARIANCE,
    LOSSES,
    LOWEST_LOG_VARIANCE,
    bound_log_variance,
    categorical_nll,
    committee_nll,
    gaussian_nll,
)

numbers = st.floats(-8, 8)


@given(mean=numbers, log_variance=numbers, y=numbers)
def test_the_gaussian_loss_is_minus_the_log_density(mean, log_variance, y):
    outputs = torch.tensor([mean, log_variance], dtype=torch.float64)
    target = torch.tensor(y, dtype=torch.float64)
    expected = -Normal(outputs[0], (outputs[1] / 2).exp()).log_prob(target)
    torch.testing.assert_close(gaussian_nll(outputs, target), expected, rtol=1e-9, atol=1e-9)


def test_the_categorical_loss_is_minus_the_log_probability():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 6, (4,), generator=generator)
    torch.testing.assert_close(
        categorical_nll(logits, y), -Categorical(logits=logits).log_prob(y.expand(3, 4))
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name):
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 1, 0, 1])
    target = y if name == "categorical" else y.double() - 0.3
    assert torch.autograd.gradcheck(lambda o: LOSSES[name](o, target), (outputs,))
    assert torch.autograd.gradcheck(lambda o: committee_nll(LOSSES[name](o, target)), (outputs,))


@given(raw=st.floats(-1e4, 1e4))
def test_a_bounded_log_variance_lies_between_its_bounds(raw):
    bounded = float(bound_log_variance(torch.tensor(raw, dtype=torch.float64)))
    assert LOWEST_LOG_VARIANCE <= bounded <= HIGHEST_LOG_VARIANCE + 1e-6


def test_the_bound_is_nearly_the_identity_where_data_lie_and_keeps_a_gradient_at_its_ends():
    middle = torch.linspace(-9, 0, 20)
    assert (bound_log_variance(middle) - middle).abs().max() < 0.01
    ends = torch.tensor([LOWEST_LOG_VARIANCE - 3, HIGHEST_LOG_VARIANCE + 3], requires_grad=True)
    bound_log_variance(ends).sum().backward()
    assert (ends.grad > 0.01).all()


@given(losses=st.lists(st.floats(-50, 900), min_size=1, max_size=9))
def test_a_committee_averages_densities(losses):
    member = torch.tensor(losses, dtype=torch.float64)
    least = min(losses)  # the average density, scaled so that nothing underflows
    expected = least - math.log(sum(math.exp(least - loss) for loss in losses) / len(losses))
    committee = float(committee_nll(member))
    assert committee == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert committee <= sum(losses) / len(losses) + 1e-9  # Jensen


def test_losses_of_a_stack_are_those_of_its_networks():
    outputs = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(2))
    y = torch.linspace(-1, 1, 7)
    torch.testing.assert_close(gaussian_nll(outputs, y), torch.stack([gaussian_nll(o, y) for o in outputs]))


def test_a_gaussian_has_two_outputs():
    with pytest.raises(ShapeError, match="mean and log variance"):
        gaussian_nll(torch.zeros(4, 3), torch.zeros(4))
