"""Instruments of weights, units, training and time, against their closed forms.

Statistical checks ask for 3.5 standard errors at fixed seeds (one right value in 2000 fails, and then always).
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import MeasurementError, MissingPackageError, OptionError
from dropkit.measure import flatness as flatness_function
from test_measure_penalty import ERRORS, RATE, linear, one_thread, table

__all__ = ["one_thread"]


def test_importing_dropkit_or_the_instruments_loads_nothing_optional() -> None:
    code = (
        "import sys, dropkit; before = set(sys.modules); assert 'dropkit.measure' not in before; "
        "dropkit.measure.penalty; "
        "print(sorted({'curvlinops', 'sklearn', 'pandas', 'scipy.sparse', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_of_public_names_is_what_is_there() -> None:
    for name in dk.measure.__all__:
        thing = getattr(dk.measure, name)
        assert thing.__doc__, name
        assert (isinstance(thing, type) and thing.__dataclass_params__.frozen) or callable(thing)  # type: ignore[attr-defined]


# Flatness


def test_the_hessian_of_a_linear_model_is_known() -> None:
    x, y = table()
    model = linear()
    found = dk.measure.flatness(model, x, y, members=64)
    wide = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), dim=1)
    hessian = 2 / len(x) * wide.T @ wide
    weights = torch.cat((model[1].weight.detach()[0], model[1].bias.detach()))
    assert found.top == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)
    assert abs(found.trace - float(hessian.trace())) < ERRORS * found.trace_error
    invariant = float((weights.square() * hessian.diagonal()).sum())
    assert abs(found.invariant - invariant) < ERRORS * found.invariant_error
    # Both ways along each step: the loss is quadratic, so prediction and measurement agree step by step.
    assert found.predicted is not None
    torch.testing.assert_close(found.predicted, found.measured, rtol=1e-6, atol=1e-12)
    lengths = torch.cat(
        (weights[:4].norm().expand(4) / 2, weights[4:].abs())
    )  # a filter of 4 weights, and the bias
    expected = 0.5 * 0.05**2 * float((lengths.square() * hessian.diagonal()).sum())
    assert abs(float(found.measured) - expected) < ERRORS * float(found.standard_error)
    assert found.adversarial > float(found.measured) > 0


def test_rescaling_moves_the_eigenvalue_and_not_the_invariant() -> None:
    x, y = table()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.ReLU(), dk.nn.Dropout(0.2), nn.Linear(8, 1, bias=False)
    )
    model.double()
    before = dk.measure.flatness(model, x, y, members=32)
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[3].weight.div_(8)
    after = dk.measure.flatness(model, x, y, members=32)
    assert after.plain == pytest.approx(before.plain)
    assert after.top > 2 * before.top
    assert after.invariant == pytest.approx(before.invariant)  # the same directions: equal to rounding
    assert float(after.measured) == pytest.approx(float(before.measured))


def test_a_fixed_mask_is_another_network_and_is_measured_without_chance() -> None:
    x, y = table()
    one, same, other = (dk.measure.flatness(linear(), x, y, members=4, member=k) for k in (3, 3, 4))
    assert one.top == same.top
    assert one.plain != other.plain


def test_without_curvlinops_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    x, y = table()
    with pytest.raises(MissingPackageError, match=r"pip install 'dropkit\[measure\]'"):
        flatness_function(linear(), x, y)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="size=0"):
        flatness_function(linear(), x, y, size=0)


# Units, training, time


def test_taking_units_from_a_linear_model_costs_what_its_square_says() -> None:
    x, y = table()
    model = linear()
    found = dk.measure.coadaptation(model, x, y, members=4)
    residual = (x @ model[1].weight.detach().T + model[1].bias.detach()).squeeze(1) - y
    part = x * model[1].weight.detach()
    expected = ((residual[:, None] - part).square() - residual[:, None].square()).mean(dim=0)
    torch.testing.assert_close(found.measured, expected)
    assert found.predicted is not None
    torch.testing.assert_close(found.predicted, expected)
    rise = ((residual[:, None] - part).square() - residual[:, None].square()).std(dim=0) / math.sqrt(len(x))
    torch.testing.assert_close(found.standard_error, rise)
    correlation = torch.corrcoef(x.T).abs()
    assert found.sites[0].correlation == pytest.approx((float(correlation.sum()) - 4) / 12)


def test_the_gap_of_a_fitted_linear_model_is_mallows() -> None:
    """Mean over fresh targets; the standard error of that mean is of the 2000 tables drawn."""
    generator = torch.Generator().manual_seed(0)
    x, _ = table(rows=30)
    truth = x @ torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    model = linear()
    penalty = RATE / (1 - RATE) * torch.cat((x.square().sum(dim=0), torch.zeros(1)))
    wide = torch.cat((x, torch.ones(30, 1, dtype=torch.float64)), dim=1)
    hat = torch.linalg.inv(wide.T @ wide + torch.diag(penalty)) @ wide.T
    gaps, forms = [], []
    for turn in range(2000):
        y, new = (truth + torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(2))
        fitted = wide @ hat @ y
        gaps.append(float((new - fitted).square().mean() - (y - fitted).square().mean()))
        if turn < 3:
            with torch.no_grad():
                model[1].weight.copy_((hat @ y)[None, :4])
                model[1].bias.copy_((hat @ y)[4:])
            found = dk.measure.generalization_gap(model, x, y, new_x=x, new_y=new, members=2)
            assert float(found.measured) == pytest.approx(gaps[-1])
            assert found.predicted is not None
            degrees = float((wide @ hat).trace())
            noise = float((y - fitted).square().sum()) / (30 - degrees)
            forms.append(float(found.predicted) / noise)
    mean, error = torch.tensor(gaps).mean(), torch.tensor(gaps).std() / math.sqrt(2000)
    assert forms[0] == pytest.approx(forms[2])
    assert abs(float(mean) - forms[0]) < ERRORS * float(error)  # the noise has variance 1


def test_too_few_rows_are_told_how_many_are_needed() -> None:
    x, y = table()
    with pytest.raises(MeasurementError, match=r"Give about [0-9]+ new rows"):
        dk.measure.generalization_gap(linear(), x, y, new_x=x[:5], new_y=y[:5], tolerance=1e-3)


def test_random_labels_are_learned_by_heart_as_far_as_degrees_of_freedom_go() -> None:
    """For the linear model the two losses after convergence are known, in the mean over labels."""
    x, y = table(rows=20)
    found = dk.measure.capacity(linear(), x - x.mean(dim=0), y, members=8, epochs=250, learning_rate=0.05)
    assert found.degrees is not None
    assert found.full_degrees == 4
    gram = (x - x.mean(dim=0)).T @ (x - x.mean(dim=0))
    ridge = torch.linalg.inv(gram + RATE / (1 - RATE) * torch.diag(gram.diagonal()))
    assert found.degrees == pytest.approx(float((ridge @ gram).trace()))
    assert found.deviation is not None
    assert abs(float(found.deviation)) < ERRORS
    assert found.with_dropout > found.without


def test_a_replaced_row_moves_a_linear_fit_as_its_closed_form_does() -> None:
    x, y = table(rows=20)
    model = linear(rate=0.5)
    found = dk.measure.stability(model, x, y, members=2, epochs=500, learning_rate=0.05)
    assert found.without_predicted is not None
    assert found.without == pytest.approx(found.without_predicted, rel=0.02)
    assert found.predicted is not None
    # What is left is that masks are drawn: 250 averaged steps, whose masks both fits share.
    assert float(found.measured) == pytest.approx(float(found.predicted), rel=0.25)


def test_copies_share_the_weight_and_the_bound_holds() -> None:
    x, y = table()
    x[:, 2] = x[:, 0]
    found = dk.measure.grouping(linear(), x, y)
    assert found.predicted is not None
    assert float(found.predicted[0]) == pytest.approx(float(found.predicted[2]))
    (pair,) = found.pairs
    assert (pair.first, pair.second) == (0, 2)
    assert pair.apart <= pair.bound + 1e-9
    near = x.clone()
    near[:, 2] += 0.1 * torch.randn(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (pair,) = dk.measure.grouping(linear(), near, y, threshold=0.9).pairs
    assert 0 < pair.apart <= pair.bound
    with pytest.raises(MeasurementError, match="one output"):
        dk.measure.grouping(nn.Sequential(linear(), nn.Tanh()).double(), x, y)


class Memory(nn.Module):
    """Keeps its state, multiplied by a mask in every step: fresh, or one for all."""

    def __init__(self, locked: bool) -> None:
        super().__init__()
        self.drop = dk.nn.LockedDropout(0.25) if locked else dk.nn.Dropout(0.25)
        self.locked = locked

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        masks = self.drop(torch.ones_like(x)) if self.locked else None
        for t in range(x.shape[1]):
            state = state + x[:, t]
            state = self.drop(state) if masks is None else state * masks[:, t]
        return state


@pytest.mark.parametrize("locked", [False, True])
def test_a_linear_memory_keeps_or_blows_up_its_signal_as_the_formula_says(locked: bool) -> None:
    """Fresh: mean 1, power q^-k. Locked: mean q^(1-k), power q^(1-2k)."""
    found = dk.measure.attenuation(Memory(locked), torch.randn(32, 4, 3), torch.zeros(32, 3))
    k = torch.arange(4, 0, -1, dtype=torch.float64)
    mean, power = (0.75 ** (1 - k), 0.75 ** (1 - 2 * k)) if locked else (torch.ones(4).double(), 0.75**-k)
    assert found.locked is locked
    assert found.predicted is not None
    assert found.square_predicted is not None
    torch.testing.assert_close(found.predicted, mean)
    torch.testing.assert_close(found.square_predicted, power)
    assert bool(((found.measured - mean).abs() < ERRORS * found.standard_error).all())
    assert bool(((found.square - power).abs() < ERRORS * found.square_error).all())
    assert found.unscaled is not None
    torch.testing.assert_close(found.unscaled, torch.full((4,), 0.75).double() if locked else 0.75**k)
