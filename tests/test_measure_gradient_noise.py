"""Variance of the minibatch gradient, the shift before BatchNorm, the law of the variance: against their closed forms.

Statistical checks ask for 3.5 standard errors at fixed seeds (one right value in 2000 fails, and then always).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import MeasurementError, OptionError, ProbabilityError
from dropkit.nn.layer import StochasticLayer
from test_measure_penalty import ERRORS, RATE, linear, one_thread, table

__all__ = ["one_thread"]


class GradientMask(nn.Module):
    """One weight whose gradient is g_i = x_i times the mask: the article's model, and nothing else."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop, self.linear = dk.nn.Dropout(rate), nn.Linear(1, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(x))


def mean_output(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.mean(dim=1)


@pytest.mark.parametrize(("mean", "spread", "rate", "batch"), [(1.0, 0.5, 0.5, 8), (-3.0, 1.0, 0.75, 16)])
def test_a_gradient_that_is_masked_once_has_the_articles_variance(
    mean: float, spread: float, rate: float, batch: int
) -> None:
    """Var = (s^2 + p mu^2) / (q B), and with one mask for the batch s^2 / (q B) + (p/q) mu^2."""
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = mean + spread * (x - x.mean()) / x.std(unbiased=False)
    found = dk.measure.gradient_noise(GradientMask(rate), x, x, loss=mean_output, members=400, batch=batch)
    q = 1 - rate
    expected = (spread**2 + rate * mean**2) / (q * batch)
    together = spread**2 / (q * batch) + rate / q * mean**2
    assert found.article == pytest.approx(expected)
    assert found.plain == pytest.approx(spread**2 / batch)
    assert found.shared_article == pytest.approx(together)
    assert found.signal == pytest.approx(mean**2)
    assert abs(float(found.measured) - expected) < ERRORS * float(found.standard_error)
    assert abs(found.shared - together) < ERRORS * found.shared_error
    assert found.layers[0].sites == ("drop",)
    assert "does not shrink" in found.to_text()


def test_the_noise_of_a_linear_model_is_exact_and_far_more_than_the_articles() -> None:
    """The residual is noisy too. Sources of the figure: all masks of 4 inputs, added up."""
    x, y = table(rows=6)
    x[:, 1] += 5
    model = linear()
    batch = 4
    found = dk.measure.gradient_noise(model, x, y, members=400, batch=batch)
    first, second = [], []
    weight, bias = model[1].weight.detach()[0], float(model[1].bias.detach())
    for i in range(6):
        one, two = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        for bits in range(16):
            keep = torch.tensor([bits >> j & 1 for j in range(4)], dtype=torch.float64)
            chance = float(((1 - RATE) ** keep * RATE ** (1 - keep)).prod())
            masked = x[i] * keep / (1 - RATE)
            g = 2 * (masked @ weight + bias - y[i]) * torch.cat((masked, torch.ones(1, dtype=torch.float64)))
            one, two = one + chance * g, two + chance * g.square()
        first.append(one)
        second.append(two)
    truth = float((torch.stack(second).mean(0) - torch.stack(first).mean(0).square()).sum()) / batch
    assert found.exact == pytest.approx(truth, rel=1e-4)  # masks have the rate to 2**-17
    assert found.predicted is not None
    assert float(found.predicted) == found.exact
    assert found.article is not None
    assert found.exact is not None
    assert found.exact > 1.2 * found.article
    assert abs(float(found.measured) - truth) < ERRORS * float(found.standard_error)
    assert "exact" in found.formula


def test_masks_that_touch_a_gradient_are_found_in_the_graph() -> None:
    x, y = table()
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), dk.nn.Dropout(0.25), nn.Linear(6, 5), nn.LayerNorm(5), dk.nn.Dropout(0.5),
        nn.Linear(5, 1)
    ).double()  # fmt: skip
    found = dk.measure.gradient_noise(model, x, y, members=4, batch=4)
    sites = {layer.name: set(layer.sites) for layer in found.layers}
    assert sites["0.weight"] == sites["0.bias"] == {"2"}
    assert sites["3.weight"] == {"2"}  # the norm behind mixes units, so no mask multiplies what it puts out
    assert sites["3.bias"] == set()
    assert sites["6.weight"] == {"5"}
    for layer in found.layers:
        assert layer.article is not None
        assert layer.plain <= layer.article
    assert found.exact is None


class Around(nn.Module):
    """A way around the mask: what the first layer puts out is not multiplied as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(4, 4), nn.Linear(4, 1), dk.nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(self.drop(h) + h)


def test_a_way_around_a_mask_leaves_its_gradient_unmasked() -> None:
    x, y = table()
    found = dk.measure.gradient_noise(Around().double(), x, y, members=2)
    assert all(layer.sites == () for layer in found.layers)


class SharedMask(StochasticLayer):
    """One mask for the whole batch, in training as well."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        return x * dk.functional.dropout(x.new_ones(1, 4), 0.5, shared=(0,), site=self.site, owner=self)


def test_a_mask_that_the_batch_shares_is_said_to_be_shared() -> None:
    x, y = table()
    model = nn.Sequential(SharedMask(), nn.Linear(4, 1)).double()
    found = dk.measure.gradient_noise(model, x, y, members=50)
    assert found.tied == ("0",)
    assert "'0' are shared by the batch" in found.to_text()
    assert float(found.measured) == found.shared  # asked for a mask a row, it still has one for all
    penalty = dk.measure.penalty(model, x, y, members=600)
    truth = (model[1].weight.detach().square() * x.square().mean(dim=0)).sum()
    assert penalty.predicted is not None
    torch.testing.assert_close(penalty.predicted, truth, rtol=1e-6, atol=0)
    assert abs(float(penalty.measured - truth)) < ERRORS * float(penalty.standard_error)


def test_a_weight_that_is_frozen_is_left_out() -> None:
    x, y = table()
    model = linear()
    model[1].bias.requires_grad_(False)
    assert [layer.name for layer in dk.measure.gradient_noise(model, x, y, members=4).layers] == ["1.weight"]
    model[1].weight.requires_grad_(False)
    with pytest.raises(MeasurementError, match="requires_grad_"):
        dk.measure.gradient_noise(model, x, y, members=4)


def test_the_variance_law_of_a_linear_unit_is_p_over_q_and_p_q_without_scale() -> None:
    x, y = table()
    model = linear()
    found = dk.measure.variance_law(model, x, y, members=600, rates=(0.1, 0.5, 0.9))
    spread = float((model[1].weight.detach().square() * x.square()).sum(dim=1).mean())
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert found.exact
    assert found.spread == pytest.approx(spread, rel=1e-5)
    assert found.predicted is not None
    assert found.unscaled_predicted is not None
    torch.testing.assert_close(found.predicted, p / (1 - p) * spread, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.unscaled_predicted, p * (1 - p) * spread, rtol=1e-5, atol=0)
    assert bool(((found.measured - found.predicted).abs() < ERRORS * found.standard_error).all())
    unscaled = (found.unscaled_measured - found.unscaled_predicted).abs()
    assert bool((unscaled < ERRORS * found.unscaled_error).all())
    assert found.peak == (0.9, 0.5)


def test_rates_are_checked() -> None:
    x, y = table()
    with pytest.raises(ProbabilityError):
        dk.measure.variance_law(linear(), x, y, rates=(50,))
    with pytest.raises(OptionError, match="without the ends"):
        dk.measure.variance_law(linear(), x, y, rates=(0.5, 1.0))
    with pytest.raises(MeasurementError, match="Bernoulli"):
        dk.measure.variance_law(nn.Sequential(dk.nn.GaussianDropout(0.3), nn.Linear(4, 1)).double(), x, y)


@pytest.mark.parametrize("kind", ["dense", "convolution", "maps"])
def test_the_shift_before_batch_norm_is_that_of_its_weights(kind: str) -> None:
    """Var / (Var + p/q sum_j w_j^2 mean h_j^2); for images the sum runs over the window, and over maps as a whole."""
    torch.manual_seed(0)
    if kind == "dense":
        x, norm, layer = torch.randn(40, 6).double() + 1, nn.BatchNorm1d(3), nn.Linear(6, 3)
        drop: nn.Module = dk.nn.Dropout(0.5)
        added = x.square() @ layer.double().weight.detach().square().T
    else:
        x, norm, layer = torch.randn(8, 2, 6, 6).double() + 1, nn.BatchNorm2d(3), nn.Conv2d(2, 3, 3)
        drop = dk.nn.Dropout(0.5) if kind == "convolution" else dk.nn.ChannelDropout(0.5)
        weight = layer.double().weight.detach()
        if kind == "convolution":
            added = nn.functional.conv2d(x.square(), weight.square())
        else:
            added = sum(
                nn.functional.conv2d(x[:, c : c + 1], weight[:, c : c + 1]).square() for c in range(2)
            )
    model = nn.Sequential(drop, layer, norm, nn.Flatten()).double()
    y = model.eval()(x).detach()
    found = dk.measure.variance_shift(model, x, y, members=64)
    with torch.no_grad():
        quiet = layer(x).movedim(1, 0).flatten(1).var(dim=1, unbiased=False)
    expected = quiet / (quiet + added.movedim(1, 0).flatten(1).mean(dim=1))
    assert found.predicted is not None
    torch.testing.assert_close(
        found.predicted, expected, rtol=0.02 if kind == "convolution" else 1e-5, atol=0
    )
    assert bool(((found.measured - expected).abs() < 4 * found.standard_error).all())
    assert found.norms[0].name == "2"
    assert "lower p" in found.to_text()


def test_only_a_batch_norm_behind_a_mask_shifts() -> None:
    x, y = table()
    with pytest.raises(MeasurementError, match="without BatchNorm"):
        dk.measure.variance_shift(linear(), x, y)
    behind = nn.Sequential(nn.BatchNorm1d(4), dk.nn.Dropout(0.3), nn.Linear(4, 1)).double()
    with pytest.raises(MeasurementError, match="behind a mask"):
        dk.measure.variance_shift(behind, x, y)
