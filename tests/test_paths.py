"""Paths: whole branches and layers are dropped, by row or for all; the graph stays the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dropkit as dk
from dropkit.errors import OptionError, ProbabilityError, ShapeError

FALSE_ALARM = 1e-9


# Drop path, stochastic depth


@pytest.mark.parametrize("scale", [True, False])
@settings(max_examples=30)
@example(shape=[8, 2, 3], p=0.5, seed=0)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), p=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_row_goes_or_stays_as_a_whole(scale, shape, p, seed):
    x = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    with dk.masks(seed=seed):
        y = dk.functional.drop_path(x, p, scale_by_keep=scale, site="a")
    with dk.masks(seed=seed):
        gate = dk.functional.dropout(torch.ones(shape[0]), p, site="a").view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(y, x * gate if scale else x * (gate > 0), rtol=0, atol=0)


def test_without_its_scale_the_layer_is_timms_scale_by_keep_false():
    layer = dk.nn.DropPath(0.4, False)  # the second argument stands where timm has it
    x = torch.full((300, 2), math.inf)
    with dk.masks(seed=0):
        y = layer(x)
    assert set(y.unique().tolist()) == {0.0, math.inf}
    assert torch.equal(layer.eval()(x), x)
    assert repr(layer) == "DropPath(p=0.4, scale_by_keep=False)"
    assert dk.nn.DropPath().p == 0.0


def test_a_batch_falls_as_one_and_its_parts_agree():
    layer, x = dk.nn.StochasticDepth(0.5, mode="batch"), torch.ones(8, 3)
    seen = set()
    for step in range(20):
        with dk.masks(seed=0, step=step):
            whole = layer(x)
        with dk.masks(seed=0, step=step, row_offset=4):
            half = layer(x[4:])
        assert torch.equal(half, whole[4:])
        assert len(whole.unique()) == 1
        seen.add(float(whole[0, 0]))
    assert seen == {0.0, 2.0}
    with dk.masks(seed=0):
        rows = dk.functional.stochastic_depth(torch.ones(50, 3), 0.5, "row")
    assert len(rows.unique()) == 2
    assert (rows == rows[:, :1]).all()


def test_rates_rise_with_depth():
    rates = dk.nn.schedules.ramp(0.6, 4)
    layers = [dk.nn.DropPath(p) for p in rates]
    with dk.masks(seed=1):
        dropped = [int((layer(torch.ones(2000, 1)) == 0).sum()) for layer in layers]
    assert dropped[0] == 0
    assert dropped == sorted(dropped)
    bound = 2000 * math.sqrt(math.log(2 * 4 / FALSE_ALARM) / 2 / 2000)  # Hoeffding, four counts
    assert all(abs(count - 2000 * p) < bound for count, p in zip(dropped, rates, strict=True))


def test_paths_refuse_what_they_cannot_do():
    with pytest.raises(ShapeError, match="rows"):
        dk.functional.drop_path(torch.tensor(1.0), 0.5)
    with pytest.raises(OptionError, match="mode='image'"):
        dk.nn.StochasticDepth(0.1, "image")
    with pytest.raises(ProbabilityError, match=r"write 0\.2"):
        dk.functional.drop_path(torch.ones(2), 20, training=False, scale_by_keep=False)


# LayerDrop


class Counted(nn.Module):
    """x + W x, counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.inner(x)


def test_the_layers_that_are_left_are_the_network():
    stack, x = dk.nn.LayerDrop([Counted() for _ in range(5)], 0.5), torch.randn(4, 3)
    sets = set()
    for step in range(30):
        for layer in stack.children():
            layer.calls = 0
        with dk.masks(seed=0, step=step):
            y = stack(x)
        kept = [layer for layer in stack.children() if layer.calls]
        assert {layer.calls for layer in kept} <= {1}
        sets.add(tuple(layer.calls for layer in stack.children()))
        expected = x
        for layer in kept:
            expected = layer(expected)
        assert torch.equal(y, expected)
    assert len(sets) > 10
    for layer in stack.children():
        layer.calls = 0
    stack.eval()(x)
    assert [layer.calls for layer in stack.children()] == [1] * 5


def test_skipped_layers_have_gradients_of_zero_and_not_none():
    stack = dk.nn.LayerDrop([Counted() for _ in range(6)], 0.5)
    stack.get_submodule("3").inner.bias.requires_grad_(False)
    with torch.no_grad():
        for layer in stack.children():
            layer.inner.weight[0, 0] = math.nan  # a product with 0 would not be 0
    skipped = 0
    for step in range(10):
        stack.zero_grad()
        for layer in stack.children():
            layer.calls = 0
        with dk.masks(seed=1, step=step):
            stack(torch.zeros(2, 3)).sum().backward()
        for index, layer in enumerate(stack.children()):
            assert layer.inner.weight.grad is not None
            assert (layer.inner.bias.grad is None) == (index == 3)
            if not layer.calls:
                assert not layer.inner.weight.grad.any()
                skipped += 1
    assert skipped > 10


def steps_under_ddp(stack: nn.Module, folder) -> None:
    """Three steps in a group of one process, which complains as a larger one would hang."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1
    )
    try:
        model = DistributedDataParallel(stack)
        for step in range(6):
            with dk.masks(seed=0, step=step):
                model(torch.ones(2, 3)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


class Naive(nn.Module):
    """Layers that are skipped as in a plain loop: their parameters get no gradient."""

    def __init__(self, layers: dk.nn.LayerDrop) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = dk.functional.dropout(torch.ones(1, len(self.layers)), 0.5, shared=(0,))[0].tolist()
        for layer, gate in zip(self.layers.children(), gates, strict=True):
            x = layer(x) if gate else x
        return x


def test_distributed_training_does_not_wait_for_skipped_layers(tmp_path):
    stack = dk.nn.LayerDrop([Counted() for _ in range(6)], 0.5)
    steps_under_ddp(stack, tmp_path)


def test_distributed_training_would_wait_for_layers_skipped_in_a_plain_loop(tmp_path):
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        steps_under_ddp(Naive(dk.nn.LayerDrop([Counted() for _ in range(6)], 0.5)), tmp_path)


def test_keys_are_those_of_a_sequential():
    layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
    stack, chain = dk.nn.LayerDrop(layers, 0.1), nn.Sequential(*layers)
    assert list(stack.state_dict()) == list(chain.state_dict())
    stack.load_state_dict(chain.state_dict())
    assert len(stack) == 2
    x = torch.randn(2, 3)
    assert torch.equal(stack.eval()(x), chain(x))


def test_each_layer_may_have_its_own_rate():
    stack = dk.nn.LayerDrop([Counted() for _ in range(3)], [0.0, 0.5, 1.0])
    for step in range(20):
        with dk.masks(seed=0, step=step):
            stack(torch.ones(1, 3))
    calls = [layer.calls for layer in stack.children()]
    assert calls[0] == 20
    assert 0 < calls[1] < 20
    assert calls[2] == 0
    assert list(stack.state_dict()) == [f"{i}.inner.{name}" for i in range(3) for name in ("weight", "bias")]


def test_further_arguments_reach_every_layer_and_shapes_must_stay():
    class Add(nn.Module):
        def forward(self, x, y, *, times):
            return x + times * y

    x = torch.zeros(2, 3)
    assert torch.equal(dk.nn.LayerDrop([Add(), Add()], 0.0)(x, x + 1, times=3.0), x + 6)
    with pytest.raises(ShapeError, match=r"Linear made \(2, 4\) of \(2, 3\)"):
        dk.nn.LayerDrop([nn.Linear(3, 4)], 0.0)(x)
    with pytest.raises(OptionError, match="no layers"):
        dk.nn.LayerDrop([])
    with pytest.raises(OptionError, match="2 layers"):
        dk.nn.LayerDrop([Add(), Add()], [0.1, 0.2, 0.3])
    with pytest.raises(ProbabilityError):
        dk.nn.LayerDrop([Add(), Add()], [0.1, 1.2])


@pytest.mark.parametrize("member", [None, 1])
def test_a_compiled_graph_and_torch_func_choose_the_same_layers(member):
    """There every layer is computed and chosen after; with the same address the same ones stay."""
    stack, x = nn.Sequential(dk.nn.LayerDrop([Counted() for _ in range(5)], 0.5)), torch.randn(4, 3)
    dk.nn.name_sites(stack)
    compiled = torch.compile(stack, backend="eager", fullgraph=True)
    for step in range(4):
        with dk.masks(seed=0, step=step, member=member):
            plain = stack(x)
        with dk.masks(seed=0, step=step, member=member):
            torch.testing.assert_close(compiled(x), plain)
        with dk.masks(seed=0, step=step, member=member):
            loss = torch.func.grad(lambda v: stack(v).square().sum())(x)
        again = x.clone().requires_grad_()
        with dk.masks(seed=0, step=step, member=member):
            (gradient,) = torch.autograd.grad(stack(again).square().sum(), again)
        torch.testing.assert_close(loss, gradient)


# ShakeDrop


def shaken(layer: dk.nn.ShakeDrop, shape: tuple[int, ...], **address):
    """Factors of the output and of the gradient, of an input of ones."""
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    with dk.masks(**address):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("level", ["batch", "row", "channel", "element"])
def test_forward_and_backward_have_one_gate_and_two_noises(level):
    layer, shape = dk.nn.ShakeDrop(0.5, level=level), (64, 3, 5)
    ahead, back = shaken(layer, shape, seed=4)
    kept = ahead == 1
    assert torch.equal(kept, back == 1)  # the same gate, and nothing else is 1
    assert (kept.flatten(1) == kept[:, :1, 0]).all()
    assert -1 < float(ahead.min()) <= float(ahead.max()) <= 1
    assert 0 < float(back.min()) <= float(back.max()) <= 1
    assert kept.all() or not torch.equal(ahead, back)
    reach = {"batch": (0, 1, 2), "row": (1, 2), "channel": (2,), "element": ()}[level]
    for dim, size in enumerate(shape):
        constant = bool((ahead == ahead.narrow(dim, 0, 1)).all())
        assert constant == (dim in reach), (dim, size)
        assert bool((back == back.narrow(dim, 0, 1)).all()) == (dim in reach)


def test_forward_and_backward_noises_are_independent_and_uniform():
    """Means and the mean product of 20 000 rows, each within Hoeffding's bound."""
    rows = 20_000
    ahead, back = shaken(dk.nn.ShakeDrop(1.0), (rows, 1), seed=5)
    a, b = ahead[:, 0], 2 * back[:, 0] - 1  # both U(-1, 1)
    bound = 2 * math.sqrt(
        math.log(2 * 5 / FALSE_ALARM) / 2 / rows
    )  # values in an interval of length 2, five sums
    for values, mean in ((a, 0), (b, 0), (a * b, 0), (a * a, 1 / 3), (b * b, 1 / 3)):
        assert abs(float(values.mean()) - mean) < bound


@pytest.mark.parametrize("alpha", [(-1.0, 1.0), (0.0, 1.0), (-0.5, -0.5)])
def test_evaluation_is_the_mean_of_training(alpha):
    layer, rows = dk.nn.ShakeDrop(0.3, alpha=alpha), 20_000
    ahead, _ = shaken(layer, (rows, 1), seed=6)
    rate = round(0.3 * 65536) / 65536
    expected = 1 - rate + rate * sum(alpha) / 2
    value = layer.eval()(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(value, torch.full((2,), expected, dtype=torch.float64), rtol=1e-15, atol=0)
    assert abs(float(ahead.mean()) - expected) < 2 * math.sqrt(math.log(2 / FALSE_ALARM) / 2 / rows)


def test_the_backward_noise_has_an_address_of_its_own():
    """Another interval behind changes nothing ahead; without one the gradient is the function's own."""
    first, back = shaken(dk.nn.ShakeDrop(0.5), (50, 2), seed=7)
    second, other = shaken(dk.nn.ShakeDrop(0.5, beta=(2.0, 3.0)), (50, 2), seed=7)
    assert torch.equal(first, second)
    torch.testing.assert_close(other[back != 1], back[back != 1] + 2)
    third, own = shaken(dk.nn.ShakeDrop(0.5, beta=None), (50, 2), seed=7)
    assert torch.equal(third, first)
    assert torch.equal(own, third)
    layer, x = dk.nn.ShakeDrop(0.5), torch.ones(50, 2, dtype=torch.float64)

    def run(v):
        with dk.masks(seed=7):
            return layer(v)

    _, tangent = torch.func.jvp(run, (x,), (x,))
    assert torch.equal(tangent, first)


@pytest.mark.parametrize("last", [dk.nn.ShakeDrop(0.5), dk.nn.LayerDrop([Counted() for _ in range(4)], 0.5)])
def test_several_draws_of_a_layer_can_be_made_again_in_backward(last):
    """Each has a name of its own, so that a call which checkpointing repeats is known."""
    layer = nn.Sequential(nn.Linear(3, 3), last)
    dk.nn.name_sites(layer)
    x = torch.randn(6, 3)
    gradients = []
    for again in (False, True):
        with dk.masks(seed=3):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            gradients.append(torch.autograd.grad(y.square().sum(), layer[0].weight)[0])
    torch.testing.assert_close(*gradients)


def test_shake_drop_refuses_what_it_cannot_do():
    with pytest.raises(OptionError, match="level='pixel'"):
        dk.nn.ShakeDrop(level="pixel")
    with pytest.raises(OptionError, match="low <= high"):
        dk.nn.ShakeDrop(alpha=(1.0, -1.0))
    with pytest.raises(ShapeError, match=r"\(B, C, \.\.\.\)"):
        dk.functional.shake_drop(torch.ones(3), level="channel")
