"""Weight scaling, arithmetic and geometric mean beside each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee.averages import averages, geometric_probabilities
from dropkit.committee.enumeration import enumerate_masks
from dropkit.committee.graph import record
from dropkit.errors import OptionError, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_for_one_softmax_layer_behind_one_mask_weight_scaling_is_the_geometric_mean() -> None:
    """Exactly: over all 2**6 masks with p = 1/2, each as probable as any other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), dk.nn.Dropout(0.5), nn.Linear(6, 3)).double().eval()
    dk.nn.name_sites(model)
    x = 2 * normal(5, 4)
    every = enumerate_masks(record(model, x), x)
    assert len(every.weights.unique()) == 1
    with torch.no_grad():
        found = averages(model(x), every.outputs, likelihood="categorical")
    torch.testing.assert_close(
        found.geometric.prediction, found.weight_scaling.prediction, rtol=1e-12, atol=1e-14
    )
    assert float((found.arithmetic.prediction - found.weight_scaling.prediction).abs().max()) > 1e-3


def test_behind_a_hidden_layer_weight_scaling_is_neither() -> None:
    torch.manual_seed(0)
    body = (nn.Linear(4, 6), nn.ReLU(), dk.nn.Dropout(0.5), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model = nn.Sequential(*body).double().eval()
    dk.nn.name_sites(model)
    x = 2 * normal(5, 4)
    every = enumerate_masks(record(model, x), x)
    with torch.no_grad():
        found = averages(model(x), every.outputs, likelihood="categorical")
    for other in (found.geometric, found.arithmetic):
        assert float((other.prediction - found.weight_scaling.prediction).abs().max()) > 1e-3


@settings(max_examples=25)
@given(
    members=st.integers(1, 4), classes=st.integers(2, 4), shift=st.floats(-50, 50), seed=st.integers(0, 99)
)
def test_the_geometric_mean_by_its_definition(members: int, classes: int, shift: float, seed: int) -> None:
    logits = 3 * normal(members, 2, classes, seed=seed)
    product = logits.softmax(-1).prod(dim=0) ** (1 / members)
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(geometric_probabilities(logits), expected)
    torch.testing.assert_close(geometric_probabilities(logits + shift), expected)


def test_losses_of_classes_are_means_over_rows_with_their_errors() -> None:
    plain, members = normal(7, 3), normal(4, 7, 3, seed=1)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    found = averages(plain, members, y, "categorical")
    loss = nn.functional.cross_entropy(plain, y, reduction="none")
    assert found.weight_scaling.loss is not None
    assert found.weight_scaling.loss.value == pytest.approx(float(loss.mean()))
    assert found.weight_scaling.loss.standard_error == pytest.approx(float(loss.std()) / math.sqrt(7))
    mean = members.softmax(-1).mean(0)
    assert found.arithmetic.loss is not None
    assert found.arithmetic.loss.value == pytest.approx(float(-mean[range(7), y].log().mean()))
    assert found.arithmetic.accuracy is not None
    assert found.arithmetic.accuracy.value == pytest.approx(float((mean.argmax(-1) == y).double().mean()))
    assert found.geometric.rmse is None
    assert str(found).splitlines()[0] == "4 members on 7 rows (+- standard error over rows)"
    assert "loss" in str(found)


def test_the_arithmetic_mean_never_loses_against_the_members_average_loss() -> None:
    """Jensen: for every row, -log of the mean <= mean of -log; the geometric mean too, by its normalisation."""
    members, y = 2 * normal(6, 20, 4, seed=3), torch.arange(20) % 4
    average = -members.log_softmax(-1).mean(0)[range(20), y]
    found = averages(members[0], members, likelihood="categorical")
    for each in (found.arithmetic, found.geometric):
        assert bool((-each.prediction[range(20), y].log() <= average + 1e-12).all())


def test_numbers_have_one_mean() -> None:
    plain, members, y = normal(5, 2), normal(3, 5, 2, seed=1), normal(5, 2, seed=2)
    found = averages(plain, members, y)
    torch.testing.assert_close(found.arithmetic.prediction, members.mean(0))
    assert torch.equal(found.geometric.prediction, found.arithmetic.prediction)
    assert found.arithmetic.loss is None
    squared = (y - members.mean(0)).square().mean(1)
    assert found.arithmetic.rmse is not None
    assert found.arithmetic.rmse.value == pytest.approx(math.sqrt(float(squared.mean())))
    error = float(squared.std()) / math.sqrt(5)
    assert found.arithmetic.rmse.standard_error == pytest.approx(error / (2 * found.arithmetic.rmse.value))


def test_gaussian_heads_are_a_mixture_or_a_product() -> None:
    """The product of the members' densities, taken to the power 1 / M and normalised by integration."""
    members, y = normal(3, 2, 2, seed=4), normal(2, seed=5)
    found = averages(members[0], members, y, "gaussian")
    means, stds = members[..., 0], (0.5 * members[..., 1]).exp()

    def density(m: int, row: int, t: float) -> float:
        s = float(stds[m, row])
        return math.exp(-0.5 * ((t - float(means[m, row])) / s) ** 2) / (s * math.sqrt(2 * math.pi))

    mixture, product = [], []
    for row in range(2):

        def powers(t: float, row: int = row) -> float:
            return math.prod(density(m, row, t) for m in range(3)) ** (1 / 3)

        whole = integrate.quad(powers, -40, 40, limit=400, points=[0.0])[0]
        product.append(-math.log(powers(float(y[row])) / whole))
        mixture.append(-math.log(sum(density(m, row, float(y[row])) for m in range(3)) / 3))
    assert found.geometric.loss is not None
    assert found.geometric.loss.value == pytest.approx(sum(product) / 2)
    assert found.arithmetic.loss is not None
    assert found.arithmetic.loss.value == pytest.approx(sum(mixture) / 2)
    torch.testing.assert_close(found.arithmetic.noise, (stds**2).mean(0) + means.var(0, unbiased=False))
    assert found.weight_scaling.loss is not None
    torch.testing.assert_close(found.weight_scaling.noise, stds[0] ** 2)


def test_one_member_is_every_average() -> None:
    output = normal(4, 2)
    truths = {"point": normal(4, 2), "gaussian": normal(4), "categorical": torch.tensor([0, 1, 1, 0])}
    for likelihood, y in truths.items():
        found = averages(output, output[None], y, likelihood)  # type: ignore[arg-type]
        for each in (found.arithmetic, found.geometric):
            torch.testing.assert_close(each.prediction, found.weight_scaling.prediction)
            if each.loss is not None and found.weight_scaling.loss is not None:
                assert each.loss.value == pytest.approx(found.weight_scaling.loss.value)


def test_a_single_row_has_no_standard_error() -> None:
    found = averages(normal(1, 3), normal(2, 1, 3), torch.tensor([1]), "categorical")
    assert found.arithmetic.loss is not None
    assert math.isnan(found.arithmetic.loss.standard_error)


@pytest.mark.parametrize(
    ("plain", "members", "y", "likelihood", "error"),
    [
        ((4, 3), (2, 4, 2), None, "categorical", ShapeError),
        ((4, 1), (2, 4, 1), None, "categorical", ShapeError),
        ((4, 3), (2, 4, 3), None, "gaussian", ShapeError),
        ((4, 3), (2, 4, 3), None, "poisson", OptionError),
        ((4, 1), (2, 4, 1), (4,), "point", ShapeError),
        ((4, 2), (2, 4, 2), (4, 2), "gaussian", ShapeError),
        ((4, 3), (2, 4, 3), (4,), "categorical", OptionError),
    ],
)
def test_what_does_not_fit_is_refused(
    plain: tuple[int, ...],
    members: tuple[int, ...],
    y: tuple[int, ...] | None,
    likelihood: str,
    error: type[Exception],
) -> None:
    truth = None if y is None else normal(*y)
    with pytest.raises(error, match="given"):
        averages(normal(*plain), normal(*members), truth, likelihood)  # type: ignore[arg-type]
