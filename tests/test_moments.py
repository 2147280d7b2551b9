"""Mean and variance in one pass: exact where the network is a straight line, said and measured where it bends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee.enumeration import Enumeration, enumerate_masks
from dropkit.committee.graph import Graph, record
from dropkit.committee.moments import moments
from dropkit.committee.moments.gaussian import gauss_hermite, larger, through, two_slopes
from dropkit.committee.moments.record import Check, Factors, Figure, Moments, compare
from dropkit.committee.moments.values import Spread, added, multiplied
from dropkit.errors import MomentsError, OptionError, ShapeError

Module = Callable[[], nn.Module]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ready(model: nn.Module) -> nn.Module:
    model = model.double().eval()
    dk.nn.name_sites(model)
    return model


def one_row(model: nn.Module, x: Tensor) -> Graph:
    return record(ready(model), x[:1])


def truth(model: nn.Module, x: Tensor) -> Enumeration:
    return enumerate_masks(record(ready(model), x), x)


def covariance_of(every: Enumeration) -> Tensor:
    apart = (every.values.double() - every.mean).flatten(2)
    return torch.einsum("k,kbi,kbj->bij", every.weights, apart, apart)


class Residual(nn.Module):
    """Two branches that meet again: what one mask did to both must not be counted as two chances."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.a, self.b = dk.nn.Dropout(0.3), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        return self.b(h + 2 * self.a(h)) - 1.5


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.path, self.second = nn.Linear(4, 4), dk.nn.DropPath(0.4), nn.Linear(4, 2)
        self.drop = dk.nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.path(self.first(self.drop(x)))) * torch.tensor([-2.0, 0.5]).to(x)


class Exact(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.head(dk.functional.exact_dropout(x, 0.4, True, site="exact"))
        return h


class Views(nn.Module):
    """Elements that are moved, cut and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = dk.nn.Dropout(0.5), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x).view(len(x), 2, 3).transpose(1, 2)
        left, right = h.chunk(2, -1)
        y: Tensor = self.head(torch.cat((left.flatten(1), x[:, :1], right.flatten(1) / 2), dim=1))
        return y


def images() -> Tensor:
    return normal(3, 2, 4, 4, seed=1)


def last_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), dk.nn.Dropout(0.4), nn.Linear(6, 3))


def pooled_channels() -> nn.Module:
    drop = dk.nn.ChannelDropout2d(0.3)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), drop, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    )


def convolved_channels() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([0.3, -0.2]), torch.tensor([1.7, 0.4])
    body = (nn.Conv2d(2, 3, 3), dk.nn.ChannelDropout2d(0.3), nn.Conv2d(3, 2, 2), norm)
    return nn.Sequential(*body, nn.AvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def overlapping_pools() -> nn.Module:
    pool = nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False)
    return nn.Sequential(nn.Conv2d(2, 1, 2), dk.nn.Dropout(0.3), pool, nn.Flatten(), nn.Linear(16, 2))


def two_masks() -> nn.Module:
    return nn.Sequential(dk.nn.Dropout(0.4), nn.Linear(4, 5), dk.nn.Dropout(0.1), nn.Linear(5, 2))


def locked() -> nn.Module:
    return nn.Sequential(dk.nn.LockedDropout(0.3), nn.Linear(4, 2), nn.Flatten(), nn.Linear(6, 2))


# Straight lines from the masks on: whether variances are exact without carrying covariances, and the rows.
STRAIGHT: dict[str, tuple[Module, bool, Tensor]] = {
    "last layer": (last_layer, True, normal(3, 4)),
    "mask alone": (lambda: nn.Sequential(nn.Linear(4, 6), dk.nn.Dropout(0.4)), True, normal(3, 4)),
    "two masks": (two_masks, False, normal(3, 4)),
    "residual": (Residual, False, normal(3, 4)),
    "paths": (Paths, False, normal(3, 4)),
    "exact count": (Exact, True, normal(3, 5)),
    "views": (Views, True, normal(3, 6)),
    "locked": (locked, True, normal(3, 3, 4)),
    "channels, pooled": (pooled_channels, True, images()),
    "channels, convolved": (convolved_channels, True, images()),
    "average pool": (overlapping_pools, False, images()),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    build, _, rows = STRAIGHT[name]
    return build(), rows


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_lines_are_exact(name: str) -> None:
    model, x = built(name)
    every, graph = truth(model, x), one_row(model, x)
    full, diagonal = moments(graph, x, covariance="full"), moments(graph, x)
    assert full.left == ()
    assert full.standard_error is None
    torch.testing.assert_close(full.covariance(), covariance_of(every), rtol=1e-9, atol=1e-12)
    for found in (full, diagonal):
        torch.testing.assert_close(found.mean, every.mean, rtol=1e-10, atol=1e-12)
        if found.exact:
            torch.testing.assert_close(found.variance, every.variance, rtol=1e-9, atol=1e-12)
    assert diagonal.exact == STRAIGHT[name][1], (
        "independence was assumed, and nothing was said, or the other way round"
    )


@pytest.mark.parametrize("name", ["last layer", "channels, pooled", "exact count"])
def test_a_last_layer_gives_its_covariance_when_asked(name: str) -> None:
    model, x = built(name)
    found = moments(one_row(model, x), x)
    expected = covariance_of(truth(model, x))
    torch.testing.assert_close(found.covariance(slice(1, 3)), expected[1:3], rtol=1e-9, atol=1e-12)


def test_the_formula_of_the_last_layer() -> None:
    """p / (1 - p) W diag(h**2) W^T, for each law of that variance; what stands behind the layer scales it."""
    x = normal(3, 6)
    for layer, variance in (
        (dk.nn.Dropout(0.25), 1 / 3),
        (dk.nn.GaussianDropout(0.2), 0.25),
        (dk.nn.UniformDropout(0.2), 0.25),
    ):
        head = nn.Linear(6, 4)
        found = moments(one_row(nn.Sequential(layer, head, Scaled()), x), x)
        W = head.weight.detach() * -3.0
        torch.testing.assert_close(found.covariance(), variance * torch.einsum("ij,bj,kj->bik", W, x**2, W))
        torch.testing.assert_close(found.variance, variance * x**2 @ (W**2).T)
        assert found.exact


class Pooled(nn.Module):
    """Noise that is shared by a map, and its average."""

    def forward(self, x: Tensor) -> Tensor:
        h = dk.functional.gaussian_dropout(x, 0.2, True, shared=(2, 3), site="maps")
        return h.mean((2, 3))


def test_noise_shared_by_what_is_averaged_costs_no_sources() -> None:
    x = images()
    found = moments(one_row(Pooled(), x), x)
    torch.testing.assert_close(found.variance, 0.25 * x.mean((2, 3)) ** 2)
    assert found.exact
    assert found.sources == 0


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 - 3.0 * x


@given(data=st.data())
@settings(max_examples=10)
def test_any_straight_network_is_exact(data: st.DataObject) -> None:
    """Masks and linear layers in any order, with branches, all covariances carried."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    width, masked = data.draw(st.integers(1, 3)), 0
    layers: list[nn.Module] = []
    for kind in data.draw(st.lists(st.sampled_from(["drop", "linear", "residual"]), min_size=1, max_size=5)):
        if kind == "drop" and masked + width <= 8:
            layers.append(dk.nn.Dropout(data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))))
            masked += width
        else:
            layers.append(nn.Linear(width, width) if kind == "linear" else Skip(width))
    model, x = nn.Sequential(*layers), normal(2, width)
    every = truth(model, x)
    found = moments(one_row(model, x), x, covariance="full")
    torch.testing.assert_close(found.mean, every.mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.variance, every.variance, rtol=1e-9, atol=1e-10)
    assert found.exact


class Skip(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


# Elementary steps against numerical integration.


def numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def law(mean: float, variance: float) -> Spread:
    return Spread(numbers([mean]), {}, numbers([variance]))


def expectation(f: Callable[[float], float], mean: float, variance: float) -> float:
    s = math.sqrt(variance)
    density = stats.norm(mean, s).pdf
    parts = [mean - 12 * s, min(max(0.0, mean - 12 * s), mean + 12 * s), mean + 12 * s]
    return sum(
        integrate.quad(lambda t: f(t) * density(t), a, b, limit=200)[0] for a, b in itertools.pairwise(parts)
    )


@pytest.mark.parametrize("mean", [-3.0, -0.4, 0.0, 0.7, 5.0])
@pytest.mark.parametrize("below", [0.0, 0.1])
def test_rectifiers_of_a_gaussian_are_in_closed_form(mean: float, below: float) -> None:
    def f(t: float) -> float:
        return t if t > 0 else below * t

    y = two_slopes(law(mean, 0.8), below)
    first = expectation(f, mean, 0.8)
    assert float(y.mean) == pytest.approx(first, abs=1e-9)
    assert float(y.variance) == pytest.approx(expectation(lambda t: (f(t) - first) ** 2, mean, 0.8), abs=1e-9)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu", "silu", "elu", "softplus"])
def test_smooth_curves_of_a_gaussian_are_integrated(name: str) -> None:
    f = getattr(torch.nn.functional, name) if name not in ("tanh", "sigmoid") else getattr(torch, name)

    def scalar(t: float) -> float:
        return float(f(torch.tensor(t, dtype=torch.float64)))

    y = through(f, law(0.4, 1.5))
    first = expectation(scalar, 0.4, 1.5)
    assert float(y.mean) == pytest.approx(first, abs=1e-3)
    assert float(y.variance) == pytest.approx(
        expectation(lambda t: (scalar(t) - first) ** 2, 0.4, 1.5), abs=1e-3
    )


def test_a_value_that_does_not_vary_goes_through_curves_as_itself() -> None:
    x = Spread(torch.tensor([-1.0, 0.0, 2.0]), {1: torch.zeros(2, 3)}, torch.zeros(3))
    for y in (two_slopes(x, 0.1), through(torch.tanh, x)):
        assert not y.variance.any()
        assert bool(y.factors[1].isfinite().all())
    assert torch.equal(two_slopes(x, 0.0).mean, torch.tensor([0.0, 0.0, 2.0]))
    torch.testing.assert_close(through(torch.tanh, x).mean, x.mean.tanh())


def test_a_large_mean_does_not_eat_the_variance_of_a_rectifier() -> None:
    y = two_slopes(Spread(torch.tensor([1e4]), {}, torch.tensor([1e-4])), 0.0)
    assert float(y.variance) == pytest.approx(1e-4, rel=1e-5)


def test_products_and_maxima_of_correlated_gaussians() -> None:
    """Against a product rule in two dimensions; x = 1 + 0.6 s + rest, y = -0.5 + 0.9 s + rest."""

    def spread(mean: float, factor: float, own: float) -> Spread:
        return Spread(numbers([mean]), {1: numbers([[factor]])}, numbers([own]))

    x, y = spread(1.0, 0.6, 0.3), spread(-0.5, 0.9, 0.2)
    z, w = (torch.as_tensor(a) for a in gauss_hermite(64))
    weight = w[:, None, None] * w[None, :, None] * w[None, None, :]
    s, u, v = z[:, None, None], z[None, :, None], z[None, None, :]
    a, b = 1 + 0.6 * s + math.sqrt(0.3) * u, -0.5 + 0.9 * s + math.sqrt(0.2) * v
    for found, values, tolerance in (
        (multiplied(x, y), a * b, 1e-10),
        (larger(x, y), torch.maximum(a, b), 3e-3),
    ):
        mean = float((weight * values).sum())
        assert float(found.mean) == pytest.approx(mean, abs=tolerance)
        assert float(found.variance) == pytest.approx(
            float((weight * (values - mean) ** 2).sum()), abs=tolerance
        )
        covariance = float((weight * (values - mean) * s).sum())
        assert float(found.factors[1]) == pytest.approx(covariance, abs=tolerance)
    total = added(x, y, -2.0)
    assert float(total.variance) == pytest.approx((0.6 - 1.8) ** 2 + 0.3 + 4 * 0.2)
    assert float(added(replace(x, own=None), y, -2.0).variance) == pytest.approx((0.6 - 1.8) ** 2 + 4 * 0.2)


# Networks that bend: against members, in units of what they spread.


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = dk.nn.Dropout(0.2)
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True, bidirectional=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.drop(x))[0][:, -1])
        return y


def perceptron() -> nn.Module:
    first = (nn.Linear(6, 30), nn.ReLU(), dk.nn.Dropout(0.1))
    return nn.Sequential(*first, nn.Linear(30, 30), nn.Tanh(), dk.nn.Dropout(0.1), nn.Linear(30, 2))


def network_for_images() -> nn.Module:
    first = (
        nn.Conv2d(2, 6, 3, padding=1),
        nn.LeakyReLU(),
        dk.nn.ChannelDropout2d(0.2),
        nn.Conv2d(6, 6, 3, padding=1),
    )
    then = (nn.MaxPool2d(3, 2, padding=1), nn.GELU(), dk.nn.Dropout(0.2), nn.Flatten(), nn.Linear(24, 3))
    return nn.Sequential(*first, *then)


def transformer() -> nn.Module:
    layers = [dk.nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 2))


def normalised() -> nn.Module:
    first = (nn.Linear(6, 32), dk.nn.Dropout(0.2), nn.Linear(32, 16), nn.LayerNorm(16), nn.SiLU())
    return nn.Sequential(*first, nn.Linear(16, 8), nn.Softmax(-1), nn.Linear(8, 2))


BENT: dict[str, tuple[Module, Tensor]] = {
    "perceptron": (perceptron, normal(4, 6)),
    "images": (network_for_images, images()),
    "transformer": (transformer, normal(4, 3, 8)),
    "torch's LSTM": (Sequence, normal(4, 5, 4)),
    "normalised": (normalised, normal(4, 6)),
}
MEMBERS = 600


def asked(model: nn.Module, x: Tensor, members: int = MEMBERS) -> Tensor:
    """(M, B, *out): each row M times, with masks of its own each time; in one pass."""
    with torch.no_grad(), dk.masks(seed=2, member=0, samples=torch.arange(members * len(x))):
        output: Tensor = model(x.repeat(members, *[1] * (x.ndim - 1)))
    return output.unflatten(0, (members, len(x)))


@pytest.mark.parametrize("name", BENT)
def test_networks_that_bend_are_near(name: str) -> None:
    """Full: the standard deviation within 8 % beyond sampling, the mean within 0.15 standard deviations."""
    torch.manual_seed(5)
    build, x = BENT[name]
    model = build()
    graph = one_row(model, x)
    samples = asked(model, x)
    full = moments(graph, x, covariance="full").checked(samples)
    check = full.check
    assert check is not None
    assert not full.exact
    assert full.left
    assert abs(check.std_ratio.value - 1) < 0.08 + 3 * check.std_ratio.standard_error, str(full)
    assert check.mean_error < 0.15, str(full)
    diagonal = moments(graph, x).checked(samples).check
    assert diagonal is not None
    assert abs(diagonal.std_ratio.value - 1) < 0.35
    assert diagonal.mean_error < 0.3


def test_carrying_covariances_is_nearer_than_leaving_them_out() -> None:
    """Equal weights make the units of a layer agree: taken as independent, their sum hardly varies."""
    torch.manual_seed(0)
    model = nn.Sequential(dk.nn.Dropout(0.3), nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
    with torch.no_grad():
        model[1].weight.fill_(0.3)  # type: ignore[union-attr, operator]
        model[3].weight.fill_(1.0)  # type: ignore[union-attr, operator]
    x = normal(3, 4).abs()
    every, graph = truth(model, x), one_row(model, x)
    full, diagonal = moments(graph, x, covariance="full"), moments(graph, x)
    assert bool(((full.variance / every.variance).log().abs() < 0.1).all())
    assert bool((diagonal.variance < 0.3 * every.variance).all())
    assert any("independent" in what for what in diagonal.left)
    assert not any("independent" in what for what in full.left)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = dk.nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        return h + 2 * h


def test_a_value_added_to_itself_is_not_two_chances() -> None:
    x = normal(3, 4)
    full, diagonal = moments(one_row(Twice(), x), x, covariance="full"), moments(one_row(Twice(), x), x)
    torch.testing.assert_close(full.variance, 9 * x**2)
    assert full.exact
    torch.testing.assert_close(diagonal.variance, 5 * x**2)
    assert diagonal.left == ("add: its two sides taken as independent of each other",)


class Operators(nn.Module):
    """One straight operator behind a mask on (B, 2, 4)."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.drop, self.run = dk.nn.Dropout(0.25), run
        self.weight = nn.Parameter(normal(4, 2, 3, seed=8))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.drop(x), self.weight)


OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv1d": lambda h, w: nn.functional.conv1d(h, w, stride=2, padding=1),
    "conv1d, groups": lambda h, w: nn.functional.conv1d(h, w[:, :1], w[:, 0, 0], groups=2, padding="same"),
    "conv2d": lambda h, w: nn.functional.conv2d(h[:, None], w[:, :1, None], padding=(0, 1), dilation=(1, 2)),
    "conv3d": lambda h, w: nn.functional.conv3d(h[:, None, None], w[:, :1, None, None]),
    "matmul": lambda h, w: h.mT @ w[0],
    "matmul from the left": lambda h, w: w[0].T @ h,
    "bmm": lambda h, w: torch.bmm(h.mT, w[:1]),
    "mean": lambda h, w: h.mean(-1),
    "mean of all": lambda h, w: h.mean((1, 2), keepdim=True),
    "sum": lambda h, w: h.sum(1),
    "avg_pool1d": lambda h, w: nn.functional.avg_pool1d(h, 2),
    "avg_pool2d": lambda h, w: nn.functional.avg_pool2d(h[:, None], (2, 2), 1),
    "adaptive_avg_pool1d": lambda h, w: nn.functional.adaptive_avg_pool1d(h, 2),
    "stack": lambda h, w: torch.stack((h[:, 0], w[:1, 0, :1].expand(1, 4) + 0 * h[:, 1], h[:, 1]), -1),
    "arithmetic": lambda h, w: (1.5 - h) / w[0, 0, 0] - 2 * w[0, :, :1] + -h.neg(),
    "difference": lambda h, w: torch.sub(h, h.flip(-1), alpha=2),
    "embedding": lambda h, w: nn.functional.embedding(torch.tensor([1, 0]), h[0])[None] * w[0, 0, 0],
    "masked_fill": lambda h, w: h.masked_fill(w[0, :, :1] > 0, 3.0),
    "where": lambda h, w: torch.where(w[0, :, :1] > 0, h, 2.0),
    "where, other side": lambda h, w: torch.where(w[0, :, :1] > 0, w[0, :, :1], h),
    "pieces": lambda h, w: torch.cat([h.permute(0, 2, 1).flatten(1)[:, 1::2], h.unbind(1)[0] * 3], dim=1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_straight_operator_meets_the_exact_law(name: str) -> None:
    model, x = Operators(OPERATORS[name]), normal(2, 2, 4)
    every, graph = (
        every_row(model, x) if name in ("bmm", "stack", "embedding") else truth(model, x),
        one_row(model, x),
    )
    full, diagonal = moments(graph, x, covariance="full"), moments(graph, x)
    assert full.exact, full.left
    torch.testing.assert_close(full.mean, every.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(full.covariance(), covariance_of(every), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(diagonal.mean, every.mean, rtol=1e-10, atol=1e-12)
    assert diagonal.exact == (name not in ("arithmetic", "difference"))  # where the value is used twice
    if diagonal.exact:
        torch.testing.assert_close(diagonal.variance, every.variance, rtol=1e-9, atol=1e-12)


def every_row(model: nn.Module, x: Tensor) -> Enumeration:
    """Of a model that takes one row alone."""
    rows = [truth(model, row[None]) for row in x]
    return Enumeration(torch.cat([row.outputs for row in rows], dim=1), rows[0].weights)


def test_noise_on_weights_is_exact() -> None:
    x = normal(3, 2)
    model = dk.nn.DropConnect(nn.Linear(2, 3), 0.4)
    found, every = moments(one_row(model, x), x), every_row(model, x)
    torch.testing.assert_close(found.mean, every.mean)
    torch.testing.assert_close(found.variance, every.variance)
    assert found.exact


class Attends(nn.Module):
    """Attention as torch's one operator, or written out."""

    def __init__(self, whole: bool, causal: bool, mask: Tensor | None) -> None:
        super().__init__()
        self.drop, self.whole, self.causal, self.mask = dk.nn.Dropout(0.2), whole, causal, mask
        self.key = nn.Parameter(normal(4, 4, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        q = self.drop(x)
        k, v = q @ self.key, q * 2
        if self.whole:
            return nn.functional.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal)
        scores = q @ k.mT / 2
        if self.causal:
            scores = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf)
        elif self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -math.inf)
        elif self.mask is not None:
            scores = scores + self.mask
        return scores.softmax(-1) @ v


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float"])
def test_attention_is_the_same_as_its_parts(kind: str) -> None:
    mask = {"bool": torch.tensor([True, False, True]).expand(3, 3), "float": normal(3, 3, seed=5)}.get(kind)
    x = normal(2, 3, 4)
    graphs = [one_row(Attends(whole, kind == "causal", mask), x) for whole in (True, False)]
    for covariance in ("diagonal", "full"):
        whole, parts = (moments(graph, x, covariance=covariance) for graph in graphs)  # type: ignore[arg-type]
        torch.testing.assert_close(whole.mean, parts.mean)
        torch.testing.assert_close(whole.variance, parts.variance)
        assert bool((whole.variance > 0).any())


SMALL: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda h: nn.functional.layer_norm(h, (4,), normal(4, seed=3), normal(4, seed=4)),
    "layer_norm over two dims": lambda h: nn.functional.layer_norm(h, (2, 4)),
    "softmax": lambda h: h.softmax(1),
    "group_norm": lambda h: nn.functional.group_norm(h, 2),
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "leaky_relu": lambda h: nn.functional.leaky_relu(h, 0.3),
    "product": lambda h: h[:, 0] * h[:, 1],
    "matrix product": lambda h: h @ h.mT,
    "quotient": lambda h: h[:, 0] / h[:, 1],
    "max_pool1d": lambda h: nn.functional.max_pool1d(h, 3, 1, padding=1),
    "cumprod": lambda h: h.cumprod(2),
    "square": lambda h: h * h,
}


@pytest.mark.parametrize("name", SMALL)
def test_little_noise_goes_by_the_slope(name: str) -> None:
    """variance = sum over inputs of (slope * x)**2 p / (1 - p), to first order in p = 1e-8, whatever the operator."""

    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return SMALL[name](dk.functional.gaussian_dropout(x, 1e-8, True, site="little"))

    x = normal(1, 2, 4, seed=6)
    slopes = torch.func.jacrev(SMALL[name])(x)
    slopes = slopes.flatten(slopes.ndim - 3)
    for covariance in ("full", "diagonal"):
        found = moments(one_row(Small(), x), x, covariance=covariance)  # type: ignore[arg-type]
        torch.testing.assert_close(found.mean, SMALL[name](x), rtol=1e-6, atol=1e-7)
        if covariance == "full" or name not in ("product", "matrix product", "square", "quotient"):
            expected = 1e-8 * (slopes * x.flatten()).square().sum(-1)
            torch.testing.assert_close(found.variance, expected, rtol=1e-4, atol=1e-16)


def test_an_operator_without_a_rule_is_taken_by_its_slope() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = dk.nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x).cumsum(1)

    x = normal(3, 4)
    found, every = moments(one_row(Sums(), x), x), truth(Sums(), x)
    torch.testing.assert_close(found.variance, every.variance)
    assert [what.partition(":")[0] for what in found.left] == ["cumsum"]


# What is said, and what is refused.


def net(p: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    return ready(
        nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), dk.nn.Dropout(p), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )
    )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_row_does_not_hang_on_the_others(covariance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), normal(7, 4)
    graph = one_row(model, x)
    whole = moments(graph, x, covariance=covariance)  # type: ignore[arg-type]
    monkeypatch.setattr("dropkit.committee.moments.CHUNK_VALUES", 2000)
    parts = moments(graph, x, covariance=covariance)  # type: ignore[arg-type]
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(parts.covariance(), whole.covariance(), rtol=1e-10, atol=1e-13)
    last = moments(graph, x[6:], covariance=covariance)  # type: ignore[arg-type]
    torch.testing.assert_close(last.variance, whole.variance[6:], rtol=1e-10, atol=1e-13)
    assert moments(graph, x[:0], covariance=covariance).mean.shape == (0, 3)  # type: ignore[arg-type]


def test_without_masks_nothing_varies() -> None:
    x = normal(3, 4)
    found = moments(one_row(nn.Linear(4, 2), x), x)
    assert found.exact
    assert not found.variance.any()
    assert found.sources == 0


def test_sources_that_run_out_are_said() -> None:
    model, x = net(), normal(2, 4)
    found = moments(one_row(model, x), x, covariance="full", sources=3)
    assert found.sources == 0
    assert any("more than 3 sources" in what for what in found.left)
    channels = nn.Sequential(dk.nn.ChannelDropout2d(0.5), nn.Conv2d(2, 1, 3), nn.Flatten())
    assert any("shared" in what for what in moments(one_row(channels, images()), images(), sources=1).left)


@pytest.mark.parametrize("wrong", [{"covariance": "some"}, {"sources": -1}, {"sources": True}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    x = normal(2, 4)
    with pytest.raises(OptionError, match="was given"):
        moments(one_row(net(), x), x, **wrong)  # type: ignore[arg-type]


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, dk.functional.dropout(x, 0.5, True, site="one")


class Sorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = dk.nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        return torch.where(h > 0.5, h, -h)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Two(), "several things"),
        (Sorts(), r"'gt' below the masks at 'drop'.*Sample instead"),
        (
            nn.Sequential(dk.nn.Dropout(0.5), nn.BatchNorm1d(4, track_running_stats=False)),
            "looks at the batch",
        ),
    ],
)
def test_what_has_no_moments_is_named(model: nn.Module, message: str) -> None:
    x = normal(3, 4)
    with pytest.raises(MomentsError, match=message):
        moments(record(ready(model), x[:1] if not isinstance(model, nn.Sequential) else x), x)


def test_rows_that_are_not_finite_are_named() -> None:
    x = normal(5, 4)
    x[3, 1] = math.nan
    with pytest.raises(MomentsError, match=r"1 rows, the first ones \[3\]"):
        moments(one_row(net(), x), x)


def test_covariances_that_were_not_carried_are_refused() -> None:
    x = normal(2, 4)
    model = nn.Sequential(dk.nn.Dropout(0.5), nn.Linear(4, 2), nn.ReLU())
    with pytest.raises(OptionError, match="covariance='full'"):
        moments(one_row(model, x), x).covariance()


# The comparison with members.


def test_exact_moments_agree_with_members() -> None:
    """Seeded; three standard errors by chance in less than 1 of 300 seeds."""
    model, x = built("last layer")
    found = moments(one_row(model, x), x).checked(asked(ready(model), x, 500))
    assert found.check is not None
    assert found.check.agrees, str(found)
    assert found.check.members == 500
    assert found.check.rows == 3
    assert "within sampling error" in str(found)
    assert "exact" in str(found)


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_a_wrong_variance_and_a_wrong_mean_are_found(scale: float) -> None:
    model, x = built("last layer")
    right, samples = moments(one_row(model, x), x), asked(ready(model), x, 500)
    wide = compare(replace(right, variance=right.variance * scale**2), samples)
    assert not wide.agrees
    assert wide.std_ratio.value == pytest.approx(scale, abs=0.05)
    assert "more than sampling explains" in str(wide)
    off = compare(replace(right, mean=right.mean + 0.3 * right.std), samples)
    assert not off.agrees
    assert off.mean_error == pytest.approx(0.3, abs=0.12)


def test_the_error_of_the_ratio_is_the_spread_over_committees() -> None:
    """Leaving one out: its standard error against the ratios of 40 committees of 60; within a factor of 1.6."""
    model, x = built("last layer")
    found, samples = moments(one_row(model, x), x), asked(ready(model), x, 2400)
    checks = [compare(found, part) for part in samples.split(60)]
    spread = torch.tensor([check.std_ratio.value for check in checks]).std()
    said = sum(check.std_ratio.standard_error for check in checks) / len(checks)
    assert 1 / 1.6 < float(spread) / said < 1.6


def test_no_spread_at_all_is_compared_too() -> None:
    still = Moments(torch.zeros(2, 1), torch.zeros(2, 1), True, (), 0)
    assert compare(still, torch.zeros(4, 2, 1)) == Check(0.0, 0.5, Figure(1.0, 0.0), 4, 2)
    assert not compare(replace(still, variance=torch.ones(2, 1)), torch.zeros(4, 2, 1)).agrees
    with pytest.raises(ShapeError, match="M >= 3 members"):
        compare(still, torch.zeros(2, 2, 1))


# Classes.


def test_probabilities_of_two_classes_are_those_of_a_logistic_unit() -> None:
    """Against integration: within 0.02 (the logistic function is taken as a normal distribution)."""
    for mean, variance in ((0.5, 0.3), (2.0, 4.0), (-1.0, 9.0)):
        logits = Moments(torch.tensor([[mean, 0.0]]), torch.tensor([[variance, 0.0]]), False, (), 0)
        exact = expectation(lambda t: 1 / (1 + math.exp(-t)), mean, variance)
        assert float(logits.probabilities()[0, 0]) == pytest.approx(exact, abs=0.02)


def test_logits_that_move_together_leave_probabilities_as_they_are() -> None:
    together = torch.ones(1, 1, 3) * 5.0
    mean, variance = torch.tensor([[0.3, -1.0, 2.0]]), torch.full((1, 3), 25.0)
    carried = Moments(mean, variance, False, (), 1, Factors(together, variance))
    torch.testing.assert_close(carried.probabilities(), mean.softmax(-1))
    alone = replace(carried, joint=None).probabilities()
    assert float(alone.max()) < 0.7 < float(mean.softmax(-1).max())
    assert float(alone.sum()) == pytest.approx(1.0)
    with pytest.raises(ShapeError, match="C >= 2"):
        Moments(mean[:, :1], variance[:, :1], False, (), 0).probabilities()


def test_probabilities_are_near_those_of_all_members() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), dk.nn.Dropout(0.4), nn.Linear(8, 3))
    x = 2 * normal(6, 4)
    every = enumerate_masks(record(ready(model), x), x, "categorical")
    found = moments(one_row(model, x), x).probabilities()
    assert float((found - every.mean).abs().max()) < 0.05
    plain = model(x).detach().softmax(-1)
    assert float((found - every.mean).abs().mean()) < float((plain - every.mean).abs().mean())
