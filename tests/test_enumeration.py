"""Small networks whose every mask is visited: what a committee estimates meets the exact law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee import Committee
from dropkit.committee.enumeration import MOST, Enumeration, enumerate_masks
from dropkit.committee.graph import Graph, record
from dropkit.errors import EnumerationError, OptionError

FALSE_ALARM = 1e-6  # of one whole test, split among all that it compares


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers).double().eval()
    dk.nn.name_sites(model)
    return model


def recorded(model: nn.Module, x: Tensor) -> Graph:
    dk.nn.name_sites(model)
    return record(model.eval(), x)


def net(outputs: int, p: float = 0.4) -> nn.Module:
    torch.manual_seed(3)
    first = (nn.Linear(3, 5), nn.ReLU(), dk.nn.Dropout(p), nn.Linear(5, 4), nn.Tanh())
    return named(*first, dk.nn.Dropout(0.25), nn.Linear(4, outputs))


def test_every_mask_is_visited_once_with_its_chance() -> None:
    model, x = net(2), normal(4, 3)
    every = enumerate_masks(recorded(model, x), x)
    assert every.outputs.shape == (2**9, 4, 2)
    with torch.no_grad():
        hidden = model[1](model[0](x))
        expected: dict[tuple[float, ...], float] = {}
        for keep in itertools.product((0.0, 1.0), repeat=9):
            rates = [26214 / 65536] * 5 + [
                0.25
            ] * 4  # a kernel's rate is a multiple of 2**-16; this one is asked as 0.4
            chance = math.prod(1 - rate if k else rate for k, rate in zip(keep, rates, strict=True))
            noise = torch.tensor(keep, dtype=torch.float64) / (1 - torch.tensor(rates, dtype=torch.float64))
            y = model[6](noise[5:] * torch.tanh(model[3](hidden * noise[:5])))
            key = tuple(y.flatten().mul(1e6).round().tolist())
            expected[key] = expected.get(key, 0.0) + chance
    found: dict[tuple[float, ...], float] = {}
    for output, chance in zip(every.outputs, every.weights.tolist(), strict=True):
        key = tuple(output.flatten().mul(1e6).round().tolist())
        found[key] = found.get(key, 0.0) + chance
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[key], expected[key], rel_tol=1e-12) for key in found)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_rate_of_0_or_1_leaves_one_network(p: float) -> None:
    model, x = net(1, p), normal(2, 3)
    every = enumerate_masks(recorded(model, x), x)
    assert len(every.weights) == 2**4
    if p == 1.0:
        assert torch.equal(every.outputs, every.outputs[:, :1].expand_as(every.outputs))


def test_shared_masks_and_exact_counts_are_enumerated() -> None:
    x = normal(2, 3, 4)
    locked = named(dk.nn.LockedDropout(0.5), nn.Linear(4, 1))
    assert len(enumerate_masks(recorded(locked, x), x).weights) == 2**4
    every = enumerate_masks(recorded(Exact(), x[:, 0]), x[:, 0])
    assert len(every.weights) == math.comb(4, 2)
    torch.testing.assert_close(every.mean, x[:, 0])


class Exact(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return dk.functional.exact_dropout(x, 0.5, True, site="exact")


def test_too_many_masks_and_other_noise_are_refused() -> None:
    x = normal(2, 15)
    with pytest.raises(EnumerationError, match=r"32768 thinned networks.*\{'0': 15\}"):
        enumerate_masks(recorded(named(dk.nn.Dropout(0.5)), x), x)
    assert MOST == 2**14
    with pytest.raises(EnumerationError, match="gaussian noise"):
        enumerate_masks(recorded(named(dk.nn.GaussianDropout(0.5)), x), x)


def test_classes_are_not_asked_of_numbers() -> None:
    every = Enumeration(normal(2, 3, 2), torch.tensor([0.5, 0.5], dtype=torch.float64))
    with pytest.raises(OptionError, match="categorical"):
        _ = every.entropy
    with pytest.raises(OptionError, match="gaussian"):
        _ = every.aleatoric


# Of n statistics, each within z standard errors of the truth: a false alarm with chance below FALSE_ALARM.
def bound(comparisons: int) -> float:
    return float(stats.norm.isf(FALSE_ALARM / comparisons / 2))


def fourth(every: Enumeration) -> Tensor:
    """E (value - mean)**4 of each position, which says how far a sample variance may be off."""
    return torch.einsum("k,k...->...", every.weights, (every.values.double() - every.mean) ** 4)


MEMBERS = 4000


@pytest.mark.parametrize("likelihood", ["point", "gaussian", "categorical"])
def test_a_committee_meets_the_exact_law(likelihood: str) -> None:
    """Mean and variance of each position, by normal limits (4000 members of bounded outputs), Bonferroni."""
    model, x = net({"point": 2, "gaussian": 2, "categorical": 3}[likelihood]), normal(6, 3)
    every = enumerate_masks(recorded(model, x), x, likelihood)  # type: ignore[arg-type]
    prediction = Committee(model, members=MEMBERS, seed=5, likelihood=likelihood).predict(x)  # type: ignore[arg-type]
    mean = prediction.probabilities if likelihood == "categorical" else prediction.mean
    values = prediction.samples
    variance = values.var(dim=0)
    z = bound(2 * mean.numel())
    assert bool(((mean - every.mean).abs() <= z * (every.variance / MEMBERS).sqrt()).all())
    of_variance = ((fourth(every) - every.variance.square()) / MEMBERS).sqrt()
    # A sample variance is skewed: allow what the next order brings as well.
    assert bool(((variance - every.variance).abs() <= z * of_variance * 1.2).all())
    if likelihood == "gaussian":
        noise = model_noise(every)
        error = (torch.einsum("k,k...->...", every.weights, (noise - every.aleatoric) ** 2) / MEMBERS).sqrt()
        assert bool(((prediction.aleatoric - every.aleatoric).abs() <= z * error).all())
        torch.testing.assert_close(prediction.total, prediction.epistemic + prediction.aleatoric)


def model_noise(every: Enumeration) -> Tensor:
    return every.outputs[..., 1].exp()


def test_entropy_and_mutual_information_meet_the_exact_law() -> None:
    """Entropies are smooth functions of means: their error to first order, plus a bias of second order."""
    model, x = net(3), 2 * normal(6, 3)
    every = enumerate_masks(recorded(model, x), x, "categorical")
    prediction = Committee(model, members=MEMBERS, seed=6, likelihood="categorical").predict(x)
    p, mean = every.values.double(), every.mean
    entropies = torch.special.entr(p).sum(-1)
    slope = -(p * mean.log()).sum(-1)  # first order of H(mean) in each member, up to a constant
    statistics = {
        "entropy": (prediction.entropy, every.entropy, slope),
        "expected_entropy": (prediction.expected_entropy, every.expected_entropy, entropies),
        "mutual_information": (prediction.mutual_information, every.mutual_information, slope - entropies),
    }
    z = bound(3 * len(x))
    bias = every.variance.div(mean).sum(-1) / MEMBERS  # twice E of the second order
    for name, (estimate, truth, influence) in statistics.items():
        centred = influence - torch.einsum("k,kb->b", every.weights, influence)
        error = (torch.einsum("k,kb->b", every.weights, centred.square()) / MEMBERS).sqrt()
        assert bool(((estimate - truth).abs() <= z * error + z * bias).all()), name
    assert float(every.mutual_information.min()) > 100 * float(bias.max()), "nothing would be seen"


def test_fresh_masks_for_each_row_have_the_same_law() -> None:
    """The other kind of Monte Carlo dropout: with row ids each row has masks of its own, and the same law."""
    model, x = net(2), normal(1, 3).expand(MEMBERS, 3)
    every = enumerate_masks(recorded(model, x[:1]), x[:1])
    with torch.no_grad(), dk.masks(seed=7, member=0, samples=torch.arange(MEMBERS)):
        values = model(x)
    z = bound(4)
    error = (every.variance[0] / MEMBERS).sqrt()
    assert bool(((values.mean(0) - every.mean[0]).abs() <= z * error).all())
    of_variance = ((fourth(every) - every.variance.square()) / MEMBERS).sqrt()[0]
    assert bool(((values.var(0) - every.variance[0]).abs() <= z * of_variance * 1.2).all())


def test_a_committee_of_other_rates_is_told_apart() -> None:
    """The comparison has teeth: the law at p = 0.35 lies outside the bounds of that at 0.4."""
    x = normal(6, 3)
    every = enumerate_masks(recorded(net(2, 0.4), x), x)
    prediction = Committee(net(2, 0.35), members=MEMBERS, seed=5).predict(x)
    of_variance = ((fourth(every) - every.variance.square()) / MEMBERS).sqrt()
    z = bound(2 * every.mean.numel())
    assert bool(((prediction.epistemic - every.variance).abs() > z * of_variance * 1.2).any())


BUILDERS: dict[str, Callable[[], nn.Module]] = {"float32": lambda: net(2).float(), "float64": lambda: net(2)}


@pytest.mark.parametrize("kind", BUILDERS)
def test_outputs_keep_the_dtype_of_the_model_and_statistics_are_in_float64(kind: str) -> None:
    model = BUILDERS[kind]()
    x = normal(2, 3).to(next(model.parameters()).dtype)
    every = enumerate_masks(recorded(model, x), x)
    assert every.outputs.dtype == x.dtype
    assert every.mean.dtype == every.variance.dtype == torch.float64
    assert float(every.weights.sum()) == pytest.approx(1.0, abs=1e-12)
