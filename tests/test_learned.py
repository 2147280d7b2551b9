"""Rates that are learned: gradients agree with differences of expectations, divergences with integrals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError
from dropkit.functional import (
    concrete_dropout,
    concrete_regularisation,
    uniform_dropout,
    variational_divergence,
    variational_dropout,
)
from dropkit.nn import concrete

CONVOLUTIONS = [
    (lambda: nn.Conv1d(4, 6, 3, padding="same"), (5, 4, 9)),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, padding=1, padding_mode="reflect"), (5, 4, 6, 5)),
    (lambda: nn.Conv3d(2, 3, 2, bias=False), (5, 2, 3, 4, 3)),
]
LEARNED = pytest.mark.parametrize("kind", [dk.nn.ConcreteDropout, dk.nn.VariationalDropout])


def logit_of(p: float) -> Tensor:
    return torch.tensor(special.logit(p), dtype=torch.float64, requires_grad=True)


def over_noise(value, p: float) -> float:
    """The mean of value(logit of u) for u ~ U(0, 1), by numerical integration."""
    kink = -special.logit(p)

    def integrand(a: float) -> float:
        return float(value(a)) * math.exp(-abs(a)) / (1 + math.exp(-abs(a))) ** 2

    # Smooth, yet steep at the kink: pieces around it.
    return integrate.quad(integrand, -40, 40, points=[kink - 1, kink, kink + 1, 0], limit=400, epsabs=1e-12)[
        0
    ]


# --- Concrete dropout -----------------------------------------------------------------------------------


@given(p=st.floats(0.01, 0.99), temperature=st.floats(0.05, 2.0), seed=st.integers(0, 1000))
def test_masks_are_the_equation_on_uniform_noise_of_the_address(
    p: float, temperature: float, seed: int
) -> None:
    x, logit = torch.randn(4, 6, dtype=torch.float64), logit_of(p)
    with dk.masks(seed=seed):
        y = concrete_dropout(x, logit, temperature=temperature)
    with dk.masks(seed=seed):
        u = uniform_dropout(torch.ones_like(x), 0.25) / 2
    assert u.min() > 0
    assert u.max() < 1
    z = torch.sigmoid((logit + u.log() - (1 - u).log()) / temperature)
    torch.testing.assert_close(y, x * (1 - z) / (1 - p))
    with dk.masks(seed=seed):
        hard = concrete_dropout(x, logit, temperature=temperature, relaxed=False)
    torch.testing.assert_close(hard, torch.where(u > 1 - p, 0, x / (1 - p)))


def test_rounded_masks_drop_with_chance_p() -> None:
    """Counts of 2**18 masks at three rates; a false alarm less often than 1e-9."""
    for p in (0.02, 0.3, 0.7):
        with dk.masks(seed=1):
            y = concrete_dropout(torch.ones(512, 512), logit_of(p), relaxed=False)
        assert stats.binomtest(int((y == 0).sum()), y.numel(), p).pvalue > 1e-9 / 3


@pytest.mark.parametrize(("p", "kept"), [(0.1, 0.9987), (0.2, 0.9980), (0.5, 1.0), (0.8, 1.0078)])
def test_the_documented_mean_of_relaxed_masks(p: float, kept: float) -> None:
    """By integration, and by 2**20 masks within what chance explains but once in 1e9 (variance below p / (1 - p))."""
    mean = over_noise(lambda a: special.expit(-(special.logit(p) + a) / 0.1), p) / (1 - p)
    assert round(mean, 4) == kept
    with dk.masks(seed=1):
        y = concrete_dropout(torch.ones(1024, 1024, dtype=torch.float64), logit_of(p)).detach()
    deviation = math.sqrt(p / (1 - p) / y.numel()) * stats.norm.isf(1e-9 / 8)
    assert abs(y.mean().item() - mean) < deviation
    coarse = over_noise(lambda a: special.expit(-(special.logit(p) + a) / 0.05), p) / (1 - p)
    assert p == 0.5 or (mean - 1) / (coarse - 1) == pytest.approx(
        4, rel=0.05
    )  # goes with temperature squared


def expected_loss(p: float) -> float:
    """Of y = relaxed mask / (1 - p): the mean of (y - 1/2)^2 + sin(y), by integration."""

    def value(a: float) -> float:
        y = special.expit(-(special.logit(p) + a) / 0.1) / (1 - p)
        return (y - 0.5) ** 2 + math.sin(y)

    return over_noise(value, p)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.8])
def test_the_gradient_of_p_is_that_of_the_expected_loss(p: float) -> None:
    """A mean of 2**18 gradients against a finite difference; a false alarm less often than 1e-9."""
    step = 1e-3
    rates = [special.expit(special.logit(p) + sign * step) for sign in (-1, 1)]
    difference = (expected_loss(rates[1]) - expected_loss(rates[0])) / (2 * step)
    rows, logit = 2**18, logit_of(p)
    x = torch.ones(rows, 1, dtype=torch.float64)
    with dk.masks(seed=2):
        y, slope = torch.func.jvp(
            lambda v: concrete_dropout(x, v), (logit.detach(),), (torch.ones_like(logit),)
        )
    each = (2 * (y - 0.5) + y.cos()) * slope
    error = float(each.std()) / math.sqrt(rows)
    assert abs(each.mean().item() - difference) < error * stats.norm.isf(1e-9 / 6) + 1e-5
    with dk.masks(seed=2):
        z = concrete_dropout(x, logit)
    (found,) = torch.autograd.grad(((z - 0.5).square() + z.sin()).mean(), logit)
    torch.testing.assert_close(found, each.mean())


def test_noise_at_its_ends_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 rounds the uppermost of 2**25 numbers to 2, too rare to wait for."""
    ends = torch.tensor([[2.0, 2.0**-32, 1.0]])
    monkeypatch.setattr(concrete, "uniform_dropout", lambda *_, **__: ends)
    logit = torch.tensor(0.0, requires_grad=True)
    y = concrete_dropout(torch.ones(1, 3), logit)
    torch.testing.assert_close(y.detach(), torch.tensor([[0.0, 2.0, 1.0]]))
    assert torch.autograd.grad(y.sum(), logit)[0].isfinite()


@pytest.mark.parametrize(("p", "units", "length_scale"), [(0.1, 7, 0.5), (0.6, 1, 2.0)])
def test_regularisation_is_the_divergence_up_to_a_constant(p: float, units: int, length_scale: float) -> None:
    weight, logit = torch.randn(3, 7, dtype=torch.float64), logit_of(p)
    found = concrete_regularisation(weight, logit, units, length_scale)
    kept = weight / (1 - p)
    torch.testing.assert_close(
        found.weight, length_scale**2 / 2 * (1 - p) * kept.square().sum(), check_dtype=False
    )
    assert found.entropy.item() == pytest.approx(-units * stats.bernoulli(p).entropy())
    assert found.total.item() == pytest.approx((found.weight + found.entropy).item())
    assert torch.autograd.gradcheck(
        lambda w, v: concrete_regularisation(w, v, units, length_scale).total,
        (weight.requires_grad_(), logit),
    )


def test_a_layer_has_a_mask_value_for_each_feature_or_channel() -> None:
    assert dk.nn.ConcreteDropout(nn.Linear(5, 3)).units == 5
    assert dk.nn.ConcreteDropout(nn.Conv2d(4, 6, 3, groups=2)).units == 4
    layer = dk.nn.ConcreteDropout(nn.Linear(5, 3), 0.3, length_scale=0.1)
    torch.testing.assert_close(
        layer.regularisation().total, concrete_regularisation(layer.weight, layer.logit, 5, 0.1).total
    )
    assert torch.equal(layer.divergence(), layer.regularisation().total)


@pytest.mark.parametrize(("make", "shape"), CONVOLUTIONS)
def test_concrete_convolutions_drop_channels(make, shape: tuple[int, ...]) -> None:
    plain, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layer = dk.nn.ConcreteDropout(plain, 0.3)
    with dk.masks(seed=1):
        y = layer(x)
    with dk.masks(seed=1):
        factor = concrete_dropout(x.new_ones(*shape[:2], *[1] * (len(shape) - 2)), layer.logit)
    torch.testing.assert_close(y, plain(x * factor))
    with dk.masks(seed=1):
        torch.testing.assert_close(layer(x[:1]), y[:1])


def test_learning_lowers_the_rate_where_noise_hurts_and_the_input_is_not_touched() -> None:
    torch.manual_seed(0)
    layer = dk.nn.ConcreteDropout(nn.Linear(4, 1), 0.5)
    x = torch.randn(256, 4, requires_grad=True)
    before, target = x.detach().clone(), x.detach().sum(dim=1, keepdim=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        with dk.masks(seed=0, step=step):
            loss = 50 * (layer(x) - target).square().mean() + layer.divergence() / 1000
        loss.backward()
        optimizer.step()
        copy.deepcopy(layer)  # nothing of a pass is left in the layer
    assert layer.p.item() < 0.2
    assert torch.equal(x.detach(), before)


# --- variational dropout --------------------------------------------------------------------------------


def exact_divergence(log_alpha: float) -> float:
    """KL from the log-uniform prior, by integrating Dawson's function: its derivative by alpha^(-1/2)."""
    return 2 * integrate.quad(special.dawsn, 0, math.exp(-log_alpha / 2) / math.sqrt(2), limit=500)[0]


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 3.0])
def test_the_exact_divergence_is_the_integral_it_is_defined_by(log_alpha: float) -> None:
    def mean_log(shift: float) -> float:
        def integrand(e: float) -> float:
            return math.log(abs(e + shift)) * stats.norm.pdf(e)

        return sum(
            integrate.quad(integrand, *ends, limit=400)[0] for ends in ((-shift - 12, -shift), (-shift, 12))
        )

    wanted = mean_log(math.exp(-log_alpha / 2)) - mean_log(0.0)
    assert exact_divergence(log_alpha) == pytest.approx(wanted, abs=1e-7)


def test_the_fitted_divergence_is_as_close_as_documented() -> None:
    log_alpha = torch.linspace(-16, 16, 257, dtype=torch.float64)
    exact = torch.tensor([exact_divergence(v) for v in log_alpha.tolist()], dtype=torch.float64)
    error = (variational_divergence(log_alpha) - exact).abs().max()
    assert 0.0090 < error < 0.0094


def test_ard_is_the_least_divergence_from_any_normal_prior() -> None:
    """KL(N(w, s^2) || N(0, v)) at the best v, w^2 + s^2, against a grid of v."""
    for alpha in (0.01, 1.0, 30.0):
        w, s2 = 0.7, alpha * 0.49
        grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64).exp() * (w * w + s2)
        kl = (grid.log() - math.log(s2) + (s2 + w * w) / grid - 1) / 2
        found = variational_divergence(torch.tensor(math.log(alpha), dtype=torch.float64), "ard")
        torch.testing.assert_close(found, kl.min(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prior", ["log-uniform", "ard"])
def test_divergence_falls_with_noise_and_stays_finite(prior: str) -> None:
    log_alpha = torch.linspace(-80, 80, 401, requires_grad=True)
    kl = variational_divergence(log_alpha, prior)
    assert (kl.diff() <= 0).all()
    assert (torch.autograd.grad(kl.sum(), log_alpha)[0].isfinite()).all()
    assert kl[-1] < 1e-6


def test_local_noise_has_the_moments_of_drawn_weights() -> None:
    """Means and variances of 2**16 rows and 4096 members; any of 24 figures wrong less often than 1e-9."""
    weight, log_variance = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    x = torch.randn(5, dtype=torch.float64)
    mean, variance = weight @ x, log_variance.exp() @ x.square()
    with dk.masks(seed=1):
        rows = variational_dropout(x.expand(2**16, 5), weight, log_variance)

    def ask(k: Tensor) -> Tensor:
        with dk.masks(seed=1, member=k):
            return variational_dropout(x[None], weight, log_variance)[0]

    for y in (rows, torch.func.vmap(ask)(torch.arange(4096))):
        n = len(y)
        z = (y.mean(dim=0) - mean) / (variance / n).sqrt()
        chi = y.var(dim=0) * (n - 1) / variance
        assert float(z.abs().max()) < stats.norm.isf(1e-9 / 48)
        assert float(chi.max()) < stats.chi2.isf(1e-9 / 48, n - 1)
        assert float(chi.min()) > stats.chi2.ppf(1e-9 / 48, n - 1)


@pytest.mark.parametrize(("make", "shape"), [(lambda: nn.Linear(4, 3), (5, 4)), (lambda: nn.Linear(4, 3), (5, 2, 4)),
                                             *CONVOLUTIONS])  # fmt: skip
def test_variational_maps_are_their_equations(make, shape: tuple[int, ...]) -> None:
    plain, x = make().double(), torch.randn(shape, dtype=torch.float64)
    layer = dk.nn.VariationalDropout(plain, 0.2)
    with dk.masks(seed=1):
        y = layer(x)
    mean = plain(x)
    variance = torch.func.functional_call(
        plain, {"weight": layer.log_variance.exp(), **({"bias": torch.zeros(len(plain.weight)).double()}
                                                       if plain.bias is not None else {})}, (x.square(),)
    )  # fmt: skip
    with dk.masks(seed=1):
        eps = dk.functional.gaussian_dropout(torch.ones_like(mean), 0.5) - 1
    torch.testing.assert_close(y, mean + variance.sqrt() * eps)
    layer.eval()
    with dk.masks(seed=1, member=3):
        y = layer(x)
    with dk.masks(seed=1, member=3):
        eps = dk.functional.gaussian_dropout(torch.ones_like(plain.weight)[None], 0.5, shared=(0,))[0] - 1
    drawn = plain.weight + (layer.log_variance / 2).exp() * eps
    torch.testing.assert_close(y, torch.func.functional_call(plain, {"weight": drawn}, (x,)))
    with dk.masks(seed=1, member=3):
        torch.testing.assert_close(layer(x[1:2]), y[1:2])


def test_learning_begins_at_the_rate_for_every_weight() -> None:
    layer = dk.nn.VariationalDropout(nn.Linear(50, 20), 0.2)
    torch.testing.assert_close(layer.p, torch.full((20, 50), 0.2), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        layer.weight[0, 0] = 0
    assert layer.divergence().isfinite()


def test_a_cut_weight_is_zero_in_evaluation_and_in_members() -> None:
    layer = dk.nn.VariationalDropout(nn.Linear(4, 2, bias=False), 0.05)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]]))
        layer.log_variance.fill_(-9)
        layer.log_variance[0, 1] = math.log(4) + 3.01
    assert layer.pruned.nonzero().tolist() == [[0, 1]]
    assert layer.pruned_share == 1 / 8
    x = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert layer(x).shape == (1, 2)
    layer.eval()
    assert layer(x)[0].tolist() == [0, 1]
    with dk.masks(member=1):
        y = layer(x)[0]
    assert y[0] == 0
    assert y[1] != 1


def test_a_divergence_makes_a_network_sparse() -> None:
    """Of 20 inputs 17 are noise: what is cut is most of their weights, and none of the others."""
    torch.manual_seed(0)
    x = torch.randn(400, 20)
    target = x[:, :3].sum(dim=1, keepdim=True)
    layer = dk.nn.VariationalDropout(nn.Linear(20, 1), 0.05)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        with dk.masks(seed=0, step=step):
            (50 * (layer(x) - target).square().mean() + layer.divergence() / 4).backward()
        optimizer.step()
    assert not layer.pruned[0, :3].any()
    assert layer.pruned[0, 3:].double().mean() > 0.8
    assert (layer.eval()(x) - target).square().mean() < 0.01


# --- both -----------------------------------------------------------------------------------------------


@LEARNED
def test_parameters_are_taken_over_and_saved(kind) -> None:
    linear = nn.Linear(4, 3)
    layer = kind(linear, 0.2)
    assert layer.weight is linear.weight
    assert set(layer.state_dict()) - set(linear.state_dict()) in ({"logit"}, {"log_variance"})
    twin = kind(nn.Linear(4, 3), 0.7)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4)
    with dk.masks(seed=1):
        y = layer(x)
    with dk.masks(seed=1):
        assert torch.equal(twin(x), y)
    assert torch.equal(layer.eval()(x), linear(x))
    assert "in_features=4" in repr(layer)


@LEARNED
def test_every_parameter_has_the_gradient_of_differences(kind) -> None:
    layer, x = kind(nn.Linear(3, 2), 0.3).double(), torch.randn(4, 3, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def f(*parameters: Tensor) -> Tensor:
        with dk.masks(seed=1):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, values)


@LEARNED
def test_one_row_without_a_batch_is_row_0(kind) -> None:
    layer, x = kind(nn.Linear(6, 3), 0.3), torch.randn(4, 6)
    conv, image = kind(nn.Conv1d(2, 3, 2), 0.3), torch.randn(4, 2, 5)
    for each, batch in ((layer, x), (conv, image)):
        with dk.masks(seed=1):
            y = each(batch)[0]
        with dk.masks(seed=1):
            torch.testing.assert_close(each(batch[0]), y)


@LEARNED
def test_half_precision_and_autocast_run(kind) -> None:
    layer, x = kind(nn.Linear(8, 3), 0.3), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).isfinite().all()
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@LEARNED
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_learning_cannot_begin_at_an_end(kind, p: float) -> None:
    with pytest.raises(ProbabilityError, match="begins inside"):
        kind(nn.Linear(2, 2), p)


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda: concrete_dropout(torch.ones(2, 3).long(), torch.tensor(0.0)), OptionError, "floating"),
        (lambda: concrete_dropout(torch.ones(2, 3), torch.zeros(3)), ShapeError, "one number"),
        (lambda: concrete_dropout(torch.ones(2, 3), torch.tensor(0.0), temperature=0), OptionError, "above 0"),
        (lambda: concrete_dropout(torch.ones(2, 3), torch.tensor(0.0), shared=(2,)), ShapeError, "shared"),
        (lambda: dk.nn.ConcreteDropout(nn.BatchNorm1d(2)), OptionError, "BatchNorm1d"),
        (lambda: dk.nn.ConcreteDropout(nn.Linear(2, 2), length_scale=-1), OptionError, "length_scale"),
        (lambda: dk.nn.VariationalDropout(nn.Linear(2, 2), prior="normal"), OptionError, "log-uniform"),
        (lambda: dk.nn.VariationalDropout(nn.Linear(2, 2), threshold=math.nan), OptionError, "threshold"),
        (lambda: variational_dropout(torch.ones(1, 2), torch.ones(2, 2), torch.ones(2)), ShapeError, r"\(2, 2\)"),
        (lambda: dk.nn.ConcreteDropout(nn.Linear(2, 2))(torch.ones(3, 4)), ShapeError, r"\(B, \*, 2\)"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        call()


def test_the_same_place_twice_is_refused() -> None:
    x, logit = torch.ones(2, 3), torch.tensor(0.0)
    with dk.masks():
        concrete_dropout(x, logit, site="here")
        with pytest.raises(AddressError, match="twice"):
            concrete_dropout(x, logit, site="here")
