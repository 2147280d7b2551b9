"""Rates that change by the step, two passes of one step, and training steps that are compiled or in mixed precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError
from dropkit.masks import address
from dropkit.nn import schedules
from dropkit.training import categorical_divergence, gaussian_divergence, gaussian_nll, r_drop, two_passes

probabilities = st.floats(0, 1)


# Schedules


@given(p=probabilities, cutoff=st.integers(1, 12), per_epoch=st.integers(1, 40), rest=st.integers(0, 5))
def test_early_and_late_are_the_tables_of_the_paper_at_every_step(p, cutoff, per_epoch, rest):
    """A row a step: epochs of so many steps, a cut-off epoch, and what comes behind it."""
    steps, behind = cutoff * per_epoch, rest * per_epoch
    tables = {
        schedules.early(p, steps): [p] * steps + [0.0] * behind,
        schedules.early(p, steps, shape="linear"): [*np.linspace(p, 0, steps), *[0.0] * behind],
        schedules.late(p, steps): [0.0] * steps + [p] * behind,
    }
    for schedule, table in tables.items():
        said = [schedule(step) for step in range(steps + behind)]
        np.testing.assert_allclose(said, table, rtol=0, atol=1e-15)
        # The masks' own grain sees no difference at all.
        assert [round(r * 65536) for r in said] == [round(float(r) * 65536) for r in table]
    assert schedules.early(p, steps, "linear").final == 0
    assert schedules.late(p, steps).final == p


@given(p=probabilities, steps=st.integers(1, 30_000), at=st.lists(st.integers(0, 40_000), max_size=50))
def test_curriculum_is_its_curve_within_half_of_the_masks_grain(p, steps, at):
    schedule = schedules.curriculum(p, steps)
    for step in at:
        exact = p * (1 - math.exp(-10 * step / steps)) if step < steps else p
        assert abs(schedule(step) - exact) <= 2**-17
    assert schedule(0) == 0


@given(p=probabilities, layers=st.integers(1, 20), step=st.integers(0, 120))
def test_a_ramp_of_schedules_is_a_schedule_of_ramps(p, layers, step):
    schedule = schedules.early(p, 100, "linear")
    by_layer = schedules.ramp(schedule, layers)
    assert len(by_layer) == layers
    for mine, wanted in zip(by_layer, schedules.ramp(schedule(step), layers), strict=True):
        assert mine(step) == pytest.approx(wanted, abs=1e-15)


def test_what_is_no_schedule_is_refused():
    with pytest.raises(OptionError, match="'constant', or falls as 'linear'"):
        schedules.early(0.1, 10, "cosine")
    for steps in (0, -1, 2.5, True):
        with pytest.raises(OptionError):
            schedules.curriculum(0.1, steps)
    with pytest.raises(OptionError, match="how many layers"):
        schedules.ramp(0.1, 0)
    for make in (schedules.early, schedules.late, schedules.curriculum, schedules.ramp):
        with pytest.raises(ProbabilityError):
            make(1.5, 10)
    with pytest.raises(ProbabilityError):
        schedules.linear(0.2, 0.6, 10).times(2)


def blocks() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), dk.nn.Dropout(0.1), dk.nn.DropPath(torch.tensor(0.2)))

    model = nn.ModuleDict({"body": nn.Sequential(block(), block(), block()), "lstm": dk.nn.LSTM(6, 4)})
    dk.nn.name_sites(model)
    return model


def test_rates_are_set_by_name_and_the_first_pattern_decides():
    model = blocks()
    rate = schedules.late(0.5, 3)
    changed = dk.nn.set_rates(model, {"body.0.*": 0.0, "body.*.1": rate, "lstm.recurrent_dropout": 0.3})
    assert changed == ("body.0.1", "body.0.2", "body.1.1", "body.2.1", "lstm.recurrent_dropout")
    rates = dk.nn.rates_of(model)
    assert (rates["body.0.1"], rates["body.0.2"]) == (0.0, 0.0)
    assert rates["body.1.1"] is rate
    assert float(rates["body.1.2"]) == pytest.approx(0.2)
    assert rates["lstm.recurrent_dropout"] == 0.3
    x = torch.ones(400, 6)
    for step, kept in ((2, 1.0), (3, 0.5)):
        with dk.masks(seed=0, step=step):
            share = (model["body"][1][1](x) != 0).double().mean()
        assert abs(share - kept) < 0.1  # 2400 elements: false alarms below 1e-20 (Hoeffding)
    keys = list(model.state_dict())
    assert dk.nn.set_rates(model, {"body.2.1": torch.full((6,), 0.25)}) == ("body.2.1",)
    assert torch.equal(dk.nn.rates_of(model)["body.2.1"], torch.full((6,), 0.25))
    assert list(model.state_dict()) == keys  # a rate is no weight


def test_rates_that_have_no_place_are_refused_and_nothing_is_changed():
    model = blocks()
    before = dk.nn.rates_of(model)
    with pytest.raises(OptionError, match=r"body.0.1"):
        dk.nn.set_rates(model, {"body.*": 0.5, "bodi.0.1": 0.2})
    with pytest.raises(ProbabilityError):
        dk.nn.set_rates(model, {"body.*": 0.5, "lstm.dropout": 30})
    with pytest.raises(OptionError, match=r"dropkit\.convert"):
        dk.nn.set_rates(nn.Linear(2, 2), {"*": 0.1})
    assert dk.nn.rates_of(model) == before


# R-Drop


def classifier() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), dk.nn.Dropout(0.5), nn.Linear(64, 3)).double()
    dk.nn.name_sites(model)
    return model


def kl(p, q):
    """Term by term, as the books have it."""
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 8), alpha=st.floats(0, 9))
def test_r_drop_is_its_equation(seed, size, alpha):
    generator = torch.Generator().manual_seed(seed)
    a, b = (size * torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(0, 3, (4,), generator=generator)
    p, q = a.softmax(1), b.softmax(1)
    apart = [(kl(p[i], q[i]) + kl(q[i], p[i])) / 2 for i in range(4)]
    losses = [-(math.log(p[i, y[i]]) + math.log(q[i, y[i]])) / 2 for i in range(4)]
    torch.testing.assert_close(
        categorical_divergence(a, b), torch.tensor(apart, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    expected = sum(losses) / 4 + alpha * sum(apart) / 4
    assert float(r_drop(a, b, y, alpha)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 10**6), apart=st.floats(0, 3))
def test_the_divergence_of_gaussians_is_that_of_the_books(seed, apart):
    generator = torch.Generator().manual_seed(seed)
    a, b = (apart * torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (torch.distributions.Normal(o[:, 0], (o[:, 1] / 2).exp()) for o in (a, b))
    both = [
        torch.distributions.kl_divergence(first, second),
        torch.distributions.kl_divergence(second, first),
    ]
    torch.testing.assert_close(gaussian_divergence(a, b), sum(both) / 2, rtol=1e-9, atol=1e-12)
    assert torch.equal(gaussian_divergence(a, a), torch.zeros(4, dtype=torch.float64))


def test_two_passes_have_masks_of_their_own_and_the_first_is_that_of_training():
    model = classifier()
    x = torch.ones(6, 5, dtype=torch.float64)
    ids = torch.tensor([9, 4, 0, 7, 3, 8])
    with dk.masks(seed=2, step=5, samples=ids):
        first, second = two_passes(model, x)
    with dk.masks(seed=2, step=5, samples=ids):
        assert torch.equal(model(x), first)
    assert not torch.isclose(first, second).any()
    # Both follow their rows through any batch.
    with dk.masks(seed=2, step=5, samples=ids[3:]):
        for whole, part in zip((first, second), two_passes(model, x[3:]), strict=True):
            torch.testing.assert_close(part, whole[3:], rtol=1e-12, atol=1e-12)
    with dk.masks(seed=2, step=5, row_offset=40):
        shifted = two_passes(model, x)
    with dk.masks(seed=2, step=5, samples=torch.arange(40, 46)):
        assert all(torch.equal(*pair) for pair in zip(shifted, two_passes(model, x), strict=True))
    torch.manual_seed(0)
    drawn = two_passes(model, x)
    assert not torch.equal(*drawn)
    assert address.current() is None


def test_r_drop_accumulates_to_the_big_batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (8,), generator=generator)
    gradients = []
    for parts in (1, 4):
        model = classifier()
        for ids in torch.arange(8).chunk(parts):
            with dk.masks(seed=0, step=1, samples=ids):
                loss = r_drop(*two_passes(model, x[ids]), y[ids], alpha=3.0)
            (loss / parts).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_r_drop_of_a_gaussian_network():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 16), dk.nn.Dropout(0.4), nn.Linear(16, 2)).double()
    dk.nn.name_sites(model)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def loss_of(run, alpha):
        with dk.masks(seed=1, step=2, samples=torch.arange(7)):
            return r_drop(*two_passes(run, x), y, alpha, loss=gaussian_nll, divergence=gaussian_divergence)

    assert loss_of(model, 2.0) > loss_of(model, 0.0)

    def checkpointed(z):
        return torch.utils.checkpoint.checkpoint(model, z, use_reentrant=False)

    loss = loss_of(checkpointed, 2.0)
    assert torch.equal(loss, loss_of(model, 2.0))
    with pytest.raises(AddressError, match="computed again in the backward pass"):
        loss.backward()


def test_r_drop_refuses_what_it_cannot_compare():
    model, x = classifier(), torch.ones(4, 5, dtype=torch.float64)
    with dk.masks(seed=0, member=3), pytest.raises(AddressError, match="member=3"):
        two_passes(model, x)
    with dk.masks(seed=0), pytest.raises(ShapeError, match="samples=ids"):
        two_passes(lambda n: n, 3)
    with pytest.raises(ShapeError, match="two passes give one shape"):
        r_drop(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4).long())
    with pytest.raises(ShapeError, match="mean and log variance"):
        gaussian_divergence(torch.zeros(4, 3), torch.zeros(4, 3))
    for alpha in (-1, math.nan, math.inf):
        with pytest.raises(OptionError, match="alpha"):
            r_drop(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4).long(), alpha)


# Multi-sample heads


def test_a_multi_sample_head_learns_from_the_mean_of_its_losses_in_any_batch():
    torch.manual_seed(5)
    head = dk.nn.MultiSampleDropout(nn.Linear(6, 3), p=0.5, samples=4).double()
    head.site = "head"
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    gradients = []
    for parts in (1, 2):
        head.zero_grad()
        for ids in torch.arange(8).chunk(parts):
            with dk.masks(seed=0, step=1, samples=ids):
                (head.loss(x[ids], y[ids], nn.functional.cross_entropy) / parts).backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    with dk.masks(seed=0, step=1, samples=torch.arange(8)):
        outputs = head.outputs(x)
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 4


# A step that is compiled, or in mixed precision


def scheduled() -> nn.Module:
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), dk.nn.Dropout(schedules.linear(0.0, 0.5, 4)), nn.Linear(32, 32),
        dk.nn.LockedDropout(schedules.early(0.5, 2)), nn.Linear(32, 2),
    )  # fmt: skip
    dk.nn.name_sites(model)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_step_follows_the_schedule_in_one_graph():
    model = scheduled()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x, outputs = torch.randn(5, 3, 6), []
    for step in range(6):
        found = []
        for run in (model, compiled):
            model.zero_grad()
            with dk.masks(seed=0, step=step, samples=torch.arange(5)):
                y = run(x)
            y.square().sum().backward()  # outside of the context: the graph asked for its rate once
            found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*found)
        outputs.append(found[0][0])
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[3])
    with pytest.raises(AddressError, match="which step this is"):
        compiled(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_has_the_masks_of_full_precision(dtype):
    layer = dk.nn.Dropout(0.5)
    layer.site = "drop"
    before, after = nn.Linear(8, 64), nn.Linear(64, 64)
    nn.init.ones_(before.weight)
    x = torch.ones(10, 8)
    zeros = []
    for mixed in (False, True):
        with torch.autocast("cpu", dtype, enabled=mixed), dk.masks(seed=1, step=4, samples=torch.arange(10)):
            hidden = layer(before(x))
            y = after(hidden)
        assert hidden.dtype == y.dtype == (dtype if mixed else torch.float32)
        (gradient,) = torch.autograd.grad(y.float().sum(), hidden, retain_graph=True)
        assert gradient.dtype == hidden.dtype
        zeros.append(hidden == 0)
    assert torch.equal(*zeros)
    assert 0 < zeros[0].sum() < zeros[0].numel()
