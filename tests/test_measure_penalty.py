"""What dropout adds to the loss and to its gradient, against closed forms and against every mask there is.

Statistical checks ask for 3.5 standard errors at fixed seeds: a right instrument would fail one value in 2000 of
them, and as the seeds are fixed, never or always.
"""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import MeasurementError, NoMaskError, OptionError, ShapeError
from dropkit.measure.noise import NoisyNetwork

ERRORS = 3.5
RATE = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def table(rows: int = 40, features: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of unequal size, one of them far from centred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.5, 2.0, features, dtype=torch.float64)
    x[:, 1] += 3.0
    y = x @ torch.linspace(-1.0, 1.0, features, dtype=torch.float64)
    return x, y + 0.1 * torch.randn(rows, generator=generator, dtype=torch.float64)


def linear(features: int = 4, outputs: int = 1, rate: float = RATE) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(dk.nn.Dropout(rate), nn.Linear(features, outputs)).double()


def small(rate: float = RATE, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(2)
    layers = (nn.Linear(2, 3), activation(), dk.nn.Dropout(rate), nn.Linear(3, 2))
    return nn.Sequential(dk.nn.Dropout(rate), *layers).double()


def every_mask(model: nn.Sequential, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, list[Tensor]]:
    """Mean cross-entropy of one row and its gradient over all 2^5 masks of `small`, by adding them up."""
    first, tail = model[1], model[4]
    loss = torch.zeros((), dtype=torch.float64)
    for keep in itertools.product([0.0, 1.0], repeat=5):
        chance = math.prod(1 - rate if k else rate for k in keep)
        scaled = torch.tensor(keep, dtype=torch.float64) / (1 - rate)
        outputs = tail(model[2](first(x * scaled[:2])) * scaled[2:])
        loss = loss + chance * nn.functional.cross_entropy(outputs, y)
    return loss.detach(), [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def far(measured: Tensor, predicted: Tensor, error: Tensor) -> Tensor:
    return ((measured - predicted).abs() / error).max()


def test_the_penalty_of_a_linear_model_is_the_adaptive_l2_penalty() -> None:
    x, y = table()
    model = linear(outputs=2)
    y = torch.stack((y, -2 * y), dim=1)
    found = dk.measure.penalty(model, x, y, members=200)
    squares = RATE / (1 - RATE) * model[1].weight.detach().square() * x.square().mean(dim=0)
    assert found.exact
    assert found.predicted is not None
    torch.testing.assert_close(found.predicted, squares.sum(dim=1).mean(), rtol=1e-9, atol=0)
    assert found.output_part is not None
    torch.testing.assert_close(found.output_part, found.predicted, rtol=1e-9, atol=0)
    (site,) = found.sites
    assert site.features is not None
    torch.testing.assert_close(site.features, squares.mean(dim=0), rtol=1e-6, atol=1e-12)
    assert found.deviation is not None
    assert abs(float(found.deviation)) < ERRORS
    torch.testing.assert_close(
        found.measured, site.measured
    )  # one site: the whole is its part, mask for mask


def test_a_loud_feature_is_one_with_a_large_mean_square() -> None:
    x, y = table(features=8)
    model = linear(8)
    nn.init.ones_(model[1].weight)
    x[:, 5] = 20.0  # its variance is 0
    assert dk.measure.penalty(model, x, y, members=2).sites[0].loud[0] == 5


def test_logistic_regression_is_within_five_percent_at_moderate_rates() -> None:
    """The second-order form of Wager et al.; the bar is that of its own accuracy."""
    x, _ = table(rows=200)
    model = linear()
    with torch.no_grad():
        model[1].weight.mul_(0.5)
        logits = model[1](x).squeeze(1)
        bend = logits.sigmoid() * (1 - logits.sigmoid())
        form = 0.5 * RATE / (1 - RATE) * (bend[:, None] * x.square() * model[1].weight.square()).sum(1).mean()
    found = dk.measure.penalty(model, x, torch.arange(200) % 2 == 0, members=600)
    assert found.loss == "binary cross-entropy"
    assert not found.exact
    assert found.predicted is not None
    torch.testing.assert_close(found.predicted, form, rtol=1e-6, atol=0)
    assert abs(float(found.measured - form)) < 0.05 * float(form) + ERRORS * float(found.standard_error)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_second_order_is_what_is_left_of_all_masks_where_units_matter_little(
    activation: type[nn.Module],
) -> None:
    """Summed over every mask, loss and gradient differ from the second order by the third power of a unit's weight."""
    y, rate = torch.tensor([1, 1]), 0.25  # a rate that masks have exactly
    misses = []
    for size in (2**-1, 2**-3):
        x = size * torch.tensor([[0.3, -0.4], [0.3, -0.4]], dtype=torch.float64)
        model = small(rate, activation)
        with torch.no_grad():
            model[4].weight.mul_(size)
        loss, gradient = every_mask(model, x[0], y[0], rate)
        penalty = dk.measure.penalty(model, x, y, members=2)
        bias = dk.measure.gradient_bias(model, x, y, members=2)
        plain = nn.functional.cross_entropy(model.eval()(x), y)
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(plain, list(model.parameters()))])
        rise = loss - plain.detach()
        assert penalty.predicted is not None
        assert bias.predicted is not None
        truth = torch.cat([g.flatten() for g in gradient]) - slope
        misses.append(
            (
                float((penalty.predicted - rise).abs() / rise.abs()),
                float((bias.predicted - truth).norm() / truth.norm()),
            )
        )
    for coarse, fine in zip(*misses, strict=True):
        assert fine < 0.02
        assert fine < 0.35 * coarse


def test_masks_a_row_measure_the_mean_over_all_masks() -> None:
    model = small()
    x, y = torch.tensor([[0.3, -0.4]] * 64, dtype=torch.float64), torch.ones(64, dtype=torch.int64)
    loss, gradient = every_mask(model, x[0], y[0], RATE)
    penalty = dk.measure.penalty(model, x, y, members=64)
    assert abs(float(penalty.measured + penalty.plain - loss)) < ERRORS * float(penalty.standard_error)
    bias = dk.measure.gradient_bias(model, x, y, members=64)
    truth = torch.cat([(g - layer.plain).flatten() for g, layer in zip(gradient, bias.layers, strict=True)])
    assert far(bias.measured, truth, bias.standard_error) < 4.5  # of 17 values: one run in 10 000


def test_the_bias_of_a_linear_model_is_the_gradient_of_its_penalty() -> None:
    x, y = table()
    model = linear()
    found = dk.measure.gradient_bias(model, x, y, members=200)
    weight = next(layer for layer in found.layers if layer.name == "1.weight")
    expected = 2 * RATE / (1 - RATE) * model[1].weight.detach() * x.square().mean(dim=0)
    assert weight.predicted is not None
    torch.testing.assert_close(weight.predicted, expected, rtol=1e-4, atol=1e-9)
    assert found.predicted is not None
    assert far(found.measured, found.predicted, found.standard_error) < 4.0
    assert "exact" in found.formula


def test_wide_masks_are_predicted_with_an_error_of_their_own() -> None:
    """129 noise values are past what is visited one by one: random signs must say the same to their error."""
    torch.manual_seed(3)
    x = torch.randn(8, 129, dtype=torch.float64)
    y = torch.randint(0, 3, (8,))
    model = nn.Sequential(dk.nn.Dropout(0.2), nn.Linear(129, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    whole = dk.measure.penalty(model, x, y, members=2)
    halves = nn.Sequential(Halves(0.2), *model[1:])
    split = dk.measure.penalty(halves, x, y, members=2)
    assert whole.predicted_error is not None
    assert split.predicted_error is not None
    assert float(whole.predicted_error) > 0 == float(split.predicted_error)
    assert whole.predicted is not None
    assert split.predicted is not None
    assert abs(float(whole.predicted - split.predicted)) < ERRORS * float(whole.predicted_error)


class Halves(nn.Module):
    """Dropout in two pieces, each narrow enough to be visited value by value."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.one, self.two = dk.nn.Dropout(p), dk.nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x[:, :65]), self.two(x[:, 65:])), dim=1)


@pytest.mark.parametrize(
    "layer",
    [
        dk.nn.Dropout(0.3),
        dk.nn.GaussianDropout(0.3),
        dk.nn.UniformDropout(0.1),
        dk.nn.DropPath(0.3),
        dk.nn.LockedDropout(0.3),
        dk.nn.AlphaDropout(0.3),
        nn.Dropout(0.3),
        nn.Dropout1d(0.3),
    ],
    ids=lambda layer: f"{type(layer).__module__.partition('.')[0]}-{type(layer).__name__}",
)
def test_a_network_as_a_function_of_its_noise_is_the_network(layer: nn.Module) -> None:
    """With the noise that its masks have, drawn at the same address, it is the masked network to the last bits."""
    torch.manual_seed(4)
    model = dk.convert(
        nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)).eval()
    ).model
    x = torch.randn(6, 5, 3)
    noise = NoisyNetwork(model, x)
    with torch.no_grad(), dk.masks(seed=5, member=7, samples=torch.arange(6)):
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(noise(x, noise.drawn(x, 5, 7)), expected, rtol=1e-5, atol=1e-6)
    assert len(noise.sites) == 1
    assert not noise.rough
    assert not noise.hidden


def test_noise_that_is_only_compared_gives_no_formula_and_is_measured_all_the_same() -> None:
    x, y = table()
    model = nn.Sequential(dk.nn.Dropout(torch.linspace(0.1, 0.5, 4)), nn.Linear(4, 1)).double()
    found = dk.measure.penalty(model, x, y, members=400)
    assert found.predicted is None
    assert found.deviation is None
    assert "jumps" in found.formula
    assert "jumps" in found.to_text()
    rates = torch.linspace(0.1, 0.5, 4).double()
    truth = (rates / (1 - rates) * model[1].weight.detach().square() * x.square().mean(dim=0)).sum()
    assert abs(float(found.measured - truth)) < ERRORS * float(found.standard_error)


def test_a_model_that_cannot_be_recorded_is_measured_all_the_same() -> None:
    class Jumpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = dk.nn.Dropout(0.2), nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.drop(x)) if float(x.sum()) > -1e9 else x

    x, y = table()
    found = dk.measure.penalty(Jumpy(), x, y, members=4)
    assert found.predicted is None
    assert "recorded" in found.formula
    assert math.isfinite(float(found.measured))


@pytest.mark.parametrize("instrument", ["penalty", "gradient_noise", "gradient_bias", "variance_law"])
def test_the_model_given_is_not_changed(instrument: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(6, 1)
    )
    model.double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = table()
    state = torch.get_rng_state()
    kept = x.clone()
    getattr(dk.measure, instrument)(model, x, y, members=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert type(model[2]) is nn.Dropout
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_two_runs_agree_to_the_bit_and_another_seed_does_not() -> None:
    x, y = table()
    one, same, other = (dk.measure.penalty(small_regression(), x, y, members=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.measured, same.measured)
    assert not torch.equal(one.measured, other.measured)


def small_regression() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), dk.nn.Dropout(0.2), nn.Linear(6, 1)).double()


def test_records_print_and_become_json() -> None:
    x, y = table()
    found = dk.measure.penalty(linear(), x, y, members=8)
    said = json.loads(found.to_json())
    assert said["predicted"] == pytest.approx(float(found.predicted or 0.0))
    assert said["sites"][0]["site"] == "0"
    assert "mean squared error" in found.to_text()
    assert f"{float(found.measured):.4g}" in found.to_text()


def test_a_loss_of_ones_own_may_give_a_mean_or_a_value_for_each_row() -> None:
    x, y = table()

    def huber(outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.huber_loss(outputs.squeeze(1), y, reduction="none")

    each = dk.measure.penalty(linear(), x, y, loss=huber, members=4)
    mean = dk.measure.penalty(linear(), x, y, loss=lambda o, t: huber(o, t).mean(), members=4)
    assert each.loss == "huber"
    torch.testing.assert_close(each.measured, mean.measured)
    assert each.predicted is not None
    assert mean.predicted is not None
    torch.testing.assert_close(each.predicted, mean.predicted)


@torch.library.custom_op("dropkit_tests::frozen_slope", mutates_args=())
def frozen_slope(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("dropkit_tests::frozen_slope_backward", mutates_args=())
def frozen_slope_backward(x: Tensor, gradient: Tensor) -> Tensor:
    return gradient * x.cos()


frozen_slope.register_fake(torch.empty_like)
frozen_slope_backward.register_fake(lambda x, gradient: torch.empty_like(x))
frozen_slope.register_autograd(
    lambda ctx, gradient: frozen_slope_backward(ctx.saved_tensors[0], gradient),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class OnceOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return frozen_slope(x)


def test_a_layer_without_a_second_derivative_is_named() -> None:
    x, y = table()
    model = nn.Sequential(dk.nn.Dropout(0.2), nn.Linear(4, 3), OnceOnly(), nn.Linear(3, 1)).double()
    for instrument in (dk.measure.penalty, dk.measure.gradient_bias):
        with pytest.raises(MeasurementError, match=r"layer '2'.*second derivative"):
            instrument(model, x, y, members=2)


def test_bad_input_is_refused_in_words() -> None:
    x, y = table()
    model = linear()
    measure = dk.measure.penalty
    with pytest.raises(NoMaskError, match=r"dropkit\.insert"):
        measure(nn.Linear(4, 1), x, y)
    with pytest.raises(NoMaskError, match="every rate of this model is 0"):
        measure(nn.Sequential(dk.nn.Dropout(0.0), nn.Linear(4, 1)).double(), x, y)
    with pytest.raises(MeasurementError, match="the loss without masks is nan"):
        measure(model, x * math.nan, y)
    with pytest.raises(MeasurementError, match=r"Give about [0-9]+ members"):
        measure(model, x, y, members=4, tolerance=1e-9)
    with pytest.raises(OptionError, match="tolerance=0"):
        measure(model, x, y, members=4, tolerance=0)
    with pytest.raises(OptionError, match="members=1"):
        measure(model, x, y, members=1)
    with pytest.raises(OptionError, match="seed=-1"):
        measure(model, x, y, seed=-1)
    with pytest.raises(ShapeError, match="39 rows x and 40 targets"):
        measure(model, x[:39], y)
    with pytest.raises(ShapeError, match="rows: 1 given"):
        measure(model, x[:1], y[:1])
    with pytest.raises(ShapeError, match="targets of shape"):
        measure(model, x, torch.stack((y, y), dim=1))
    with pytest.raises(ShapeError, match="classes of shape"):
        measure(model, x, torch.zeros(40, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match="returned a tuple"):
        measure(nn.LSTM(4, 2, 2, dropout=0.1, batch_first=True).double(), x[:, None], y)
    with pytest.raises(OptionError, match="loss='mse'"):
        measure(model, x, y, loss="mse")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a str was given"):
        measure("model", x, y)  # type: ignore[arg-type]


def test_the_members_asked_for_are_enough() -> None:
    """The number that the error names does reach the tolerance."""
    x, y = table()
    tolerance = 0.5 * float(dk.measure.penalty(linear(), x, y, members=16).standard_error)
    with pytest.raises(MeasurementError) as caught:
        dk.measure.penalty(linear(), x, y, members=16, tolerance=tolerance)
    need = int(str(caught.value).rpartition("Give about ")[2].split()[0])
    found = dk.measure.penalty(linear(), x, y, members=2 * need)
    assert float(found.standard_error) < tolerance
