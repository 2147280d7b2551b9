"""Thinned members are the members: the same numbers from fewer units."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import dropkit as dk
from dropkit.committee.graph import Graph, halve, record
from dropkit.committee.look import committee_copy, every_layer_runs
from dropkit.committee.thinning import Thinning, thin, thin_module
from dropkit.committee.thinning import units as u
from dropkit.committee.thinning.reading import Reading

SEED = 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up, self.down, self.leave = (
            nn.Linear(*s) for s in ((5, 16), (16, 24), (24, 16), (16, 2))
        )
        self.stream, self.inner = dk.nn.Dropout(0.4), dk.nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stream(torch.relu(self.enter(x)))
        for _ in range(2):
            h = self.stream(h + self.down(self.inner(F.gelu(self.up(h)))))
        return self.leave(h)


class Block(nn.Module):
    def __init__(self, enter: int, leave: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(enter, leave, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(leave, leave, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(leave) for _ in range(3))
        self.short = nn.Conv2d(enter, leave, 1, stride, bias=False) if enter != leave else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(self.relu(self.norms[0](self.first(x)))))
        y += x if self.short is None else self.norms[2](self.short(x))
        return self.relu(y)


class Images(nn.Module):
    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        parts = (
            Block(8, 8),
            nn.Dropout2d(p),
            Block(8, 16, 2),
            nn.Dropout2d(p),
            Block(16, 16),
            nn.Dropout2d(p),
        )
        self.blocks = nn.Sequential(*parts)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(F.relu(self.stem(x))), 1).flatten(1))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.before, self.heads, self.after = (
            dk.nn.LockedDropout(0.4),
            dk.nn.HeadDropout(0.5),
            dk.nn.LockedDropout(0.3),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.before(x)).view(x.shape[0], x.shape[1], 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        )
        heads = self.heads(F.scaled_dot_product_attention(q, k, v))
        return self.after(self.out(heads.transpose(1, 2).flatten(-2)))


class HandMade(nn.Module):
    """Attention from matrix products, split by chunk, with units of the values dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 3)
        self.drop = dk.nn.LockedDropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(torch.matmul((q @ k.mT / 3).softmax(-1), self.drop(v)))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = dk.nn.MultiheadAttention(8, 4, batch_first=True, dropout=0.2)
        self.drop, self.out = dk.nn.LockedDropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(x)
        return self.out(self.drop(self.attention(y, y, y)[0]))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent = kind(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.before, self.after, self.out = (
            dk.nn.LockedDropout(0.4),
            dk.nn.LockedDropout(0.5),
            nn.Linear(16, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.after(self.recurrent(self.before(x))[0]))


class Both(nn.Module):
    """The masked tensor is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.drop, self.leave = nn.Linear(5, 7), dk.nn.Dropout(0.5), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.drop(self.enter(x))
        return h, self.leave(h)


class Twice(nn.Module):
    """One dropout layer and one weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.drop, self.again = nn.Linear(5, 9), dk.nn.Dropout(0.5), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.drop(self.again(self.drop(torch.tanh(self.enter(x))))))


class Pieces(nn.Module):
    """Joined, sliced, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both, self.one = (
            nn.Linear(5, 6),
            nn.Linear(5, 4),
            nn.Linear(10, 3),
            nn.Linear(6, 4),
        )
        self.first, self.second = dk.nn.Dropout(0.5), dk.nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.first(torch.relu(self.left(x))), self.second(self.right(x))], dim=1)
        a, b = joined[:, :6], joined[:, 6:]
        gate = self.one(a) * b.sigmoid() + b
        return self.both(joined) + gate.sum(1, keepdim=True) * a.mean(1, keepdim=True)


class Shared(nn.Module):
    """A product that two operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.drop, self.middle, self.leave = (
            nn.Linear(5, 9),
            dk.nn.Dropout(0.5),
            nn.Linear(9, 8),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.drop(self.enter(x)))
        return self.leave(self.drop(torch.relu(h) + h.tanh() + torch.relu(h + h)))


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers))


L, D = nn.Linear, dk.nn.Dropout
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (sequential(L(5, 20), nn.ReLU(), D(0.5), L(20, 30), nn.ReLU(), D(0.3), L(30, 3)), (5,)),
    "corrected": (sequential(L(5, 20), D(0.1), L(20, 30), nn.BatchNorm1d(30), nn.ReLU(), L(30, 3)), (5,)),
    "norms": (
        sequential(L(5, 20), D(0.5), L(20, 30), nn.BatchNorm1d(30), nn.GELU(), D(0.3), L(30, 8), nn.LayerNorm(8),
                   nn.Sigmoid(), D(0.3), nn.ELU(), nn.Softplus(), L(8, 3)),
        (5,),
    ),
    "wide": (sequential(L(5, 300), nn.ReLU(), D(0.5), L(300, 270), nn.Sigmoid(), D(0.2), L(270, 3)), (5,)),
    "input": (sequential(D(0.3), L(5, 8), nn.Tanh(), L(8, 2)), (5,)),
    "residual": (Residual, (5,)),
    "images": (Images, (3, 8, 8)),
    "flattened": (
        sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.4), nn.Conv2d(6, 8, 3, padding=1),
                   nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout2d(0.5), nn.Flatten(), L(32, 12), nn.ReLU(),
                   D(0.5), L(12, 3)),
        (3, 11, 11),
    ),
    "signals": (
        sequential(nn.Conv1d(3, 8, 3), nn.Dropout1d(0.4), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 6, 3, groups=2),
                   nn.GroupNorm(3, 6), nn.Dropout1d(0.4), nn.Flatten(), L(24, 2)),
        (3, 10),
    ),
    "heads": (Heads, (5, 8)),
    "hand-made attention": (HandMade, (5, 6)),
    "packed attention": (Packed, (5, 8)),
    "lstm": (functools.partial(Recurrent, nn.LSTM), (4, 6)),
    "gru": (functools.partial(Recurrent, nn.GRU), (4, 6)),
    "recurrent masks": (
        lambda: dk.nn.LSTM(6, 8, batch_first=True, recurrent_dropout=0.3, dropout=0.2, input_dropout=0.4, num_layers=2),
        (4, 6),
    ),
    "output": (Both, (5,)),
    "twice": (Twice, (5,)),
    "pieces": (Pieces, (5,)),
    "shared": (Shared, (5,)),
    "rates": (sequential(L(5, 8), D(torch.linspace(0.0, 1.0, 8)), L(8, 2)), (5,)),
    "none and all": (sequential(L(5, 6), D(0.0), L(6, 7), D(1.0), L(7, 5), nn.ReLU(), D(0.2), D(0.4), L(5, 2)), (5,)),
    "paths": (sequential(L(5, 6), dk.nn.DropPath(0.5), L(6, 7), nn.ReLU(), D(0.4), L(7, 5)), (5,)),
    "other laws": (
        sequential(L(5, 6), nn.SELU(), dk.nn.AlphaDropout(0.5), L(6, 7), dk.nn.GaussianDropout(0.2), L(7, 5), D(0.3)),
        (5,),
    ),
    "weights": (sequential(dk.nn.DropConnect(L(5, 8), 0.3), nn.ReLU(), D(0.4), L(8, 1)), (5,)),
    "positions": (
        sequential(nn.Conv2d(3, 6, 3), D(0.3), nn.Conv2d(6, 4, 1), nn.Dropout2d(0.4), nn.Conv2d(4, 2, 1)),
        (3, 6, 6),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (5, 16)),
}  # fmt: skip


def network(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose every weight, bias and statistic matters."""
    torch.manual_seed(0)
    model = make().to(dtype)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and not name.endswith(".p"):
                value.add_(torch.rand_like(value) * 0.3)
    return model.eval()


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    with every_layer_runs(model):
        return record(committee_copy(model)[0], x)


@functools.cache
def example(name: str) -> tuple[nn.Module, Graph, Tensor]:
    make, shape = MODELS[name]
    model = network(make)
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, graph_of(model, x), x


def dense(graph: Graph, x: Tensor, member: int) -> list[Tensor]:
    with dk.masks(seed=SEED, member=member):
        return list(tree_leaves(graph.module(x)))


def run(thinning: Thinning, graph: Graph, x: Tensor, member: int) -> list[Tensor]:
    ready = thinning.prepare(*halve(graph).prefix(x))
    return list(thinning.suffix(*ready, *thinning.arguments(SEED, member)))


def compare(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = float(b.detach().abs().max()) or 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_thinned_member_is_the_member(name: str) -> None:
    _, graph, x = example(name)
    for thinning in (thin(graph), thin(graph, fold=False, delta=False)):
        for k in range(4):
            compare(run(thinning, graph, x, k), dense(graph, x, k))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_member_as_a_module_is_the_member(name: str) -> None:
    _, graph, x = example(name)
    for k in (0, 5):
        module = thin_module(graph, SEED, k)
        compare(tree_leaves(module(x)), dense(graph, x, k))


@pytest.mark.parametrize(
    "name", ["mlp", "corrected", "images", "heads", "lstm", "flattened", "wide", "residual"]
)
@torch.no_grad()
def test_the_number_of_rows_is_open(name: str) -> None:
    _, graph, x = example(name)
    many = torch.cat((x, x[:3] * 0.5))
    thinning, module = thin(graph), thin_module(graph, SEED, 2)
    compare(run(thinning, graph, many, 2), dense(graph, many, 2))
    compare([module(many)], dense(graph, many, 2))
    compare([module(many[2:3])], [module(many)[2:3]])


@pytest.mark.parametrize("name", ["mlp", "corrected", "norms", "images", "heads", "wide"])
@torch.no_grad()
def test_single_precision_is_the_same_to_rounding(name: str) -> None:
    make, shape = MODELS[name]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    graph = graph_of(network(make, torch.float32), x)
    thinning = thin(graph)
    for k in range(4):
        compare(run(thinning, graph, x, k), dense(graph, x, k), 1e-5)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_small_network_is_the_same_thinned(data: st.DataObject) -> None:
    width = 5
    layers: list[nn.Module] = []
    for _ in range(data.draw(st.integers(2, 6))):
        kind = data.draw(
            st.sampled_from(
                ["linear", "drop", "relu", "sigmoid", "tanh", "batch", "layer", "path", "skip", "residual"]
            )
        )
        if kind == "linear":
            new = data.draw(st.integers(1, 7))
            layers.append(nn.Linear(width, new, bias=data.draw(st.booleans())))
            width = new
        elif kind == "drop":
            layers.append(dk.nn.Dropout(data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.8, 1.0]))))
        elif kind == "batch":
            layers.append(nn.BatchNorm1d(width, affine=data.draw(st.booleans())))
        elif kind == "residual":
            inner = nn.Sequential(nn.Linear(width, 4), nn.GELU(), dk.nn.Dropout(0.4), nn.Linear(4, width))
            layers.append(Sum(inner, dk.nn.Dropout(0.3)))
        elif kind == "skip":
            layers.append(Sum(dk.nn.Dropout(0.5), nn.Identity()))
        else:
            layers.append(
                {"relu": nn.ReLU(inplace=True), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
                 "layer": nn.LayerNorm(width), "path": dk.nn.DropPath(0.5)}[kind]
            )  # fmt: skip
    model = network(lambda: nn.Sequential(*layers, dk.nn.Dropout(0.3), nn.Linear(width, 2)))
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    graph = graph_of(model, x)
    for k in range(3):
        expected = dense(graph, x, k)
        compare(run(thin(graph), graph, x, k), expected)
        compare([thin_module(graph, SEED, k)(x)], expected)


class Sum(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def kept(graph: Graph, member: int) -> list[int]:
    """How many units each dropout of an MLP keeps, from its masks alone."""
    counts = []
    with dk.masks(seed=SEED, member=member):
        for draw in graph.draws:
            (node,) = draw.users
            address = draw.target(*draw.args)  # type: ignore[operator]
            ones = torch.ones(1, node.meta["val"].shape[1], dtype=torch.float64)
            rate = Reading(graph).constant(node.args[2])
            counts.append(int((torch.ops.dropkit.dropout_at(ones, address, rate, []) != 0).sum()))
    return counts


def test_the_module_has_just_the_units_that_its_masks_keep() -> None:
    _, graph, _ = example("mlp")
    for k in range(3):
        first, second = kept(graph, k)
        shapes = {name: tuple(p.shape) for name, p in thin_module(graph, SEED, k).named_parameters()}
        assert shapes == {
            "0.weight": (first, 5), "0.bias": (first,), "3.weight": (second, first), "3.bias": (second,),
            "6.weight": (3, second), "6.bias": (3,),
        }  # fmt: skip


def test_two_sites_in_a_row_leave_what_both_keep() -> None:
    model = network(sequential(L(5, 60), D(0.5), nn.ReLU(), D(0.5), L(60, 2)))
    graph = graph_of(model, torch.randn(2, 5, dtype=torch.float64))
    for k in range(3):
        with dk.masks(seed=SEED, member=k):
            ones = torch.ones(1, 60, dtype=torch.float64)
            both = dk.functional.dropout(dk.functional.dropout(ones, 0.5, site="1"), 0.5, site="3")
        assert dict(thin_module(graph, SEED, k).named_parameters())["0.weight"].shape == (
            int((both != 0).sum()),
            5,
        )


class Multiplications(fx.Interpreter):
    """Runs a graph and counts the multiply-adds a row of its linear maps."""

    count = 0.0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.linear.default:
            weight = args[1]
            assert isinstance(weight, Tensor)
            self.count += weight.numel()
        return super().call_function(target, args, kwargs)


@torch.no_grad()
def test_the_work_is_what_is_predicted() -> None:
    model = network(sequential(L(5, 200), nn.ReLU(), D(0.5), L(200, 240), nn.ReLU(), D(0.25), L(240, 3)))
    x = torch.randn(2, 5, dtype=torch.float64)
    graph = graph_of(model, x)
    thinning = thin(graph)
    ready = thinning.prepare(*halve(graph).prefix(x))
    counted = []
    for k in range(20):
        runner = Multiplications(thinning.suffix)
        runner.run(*ready, *thinning.arguments(SEED, k))
        counted.append(runner.count)
    work = thinning.work()
    assert work.dense == 200 * 240 + 240 * 3
    assert work.thinned == pytest.approx(0.5 * 0.75 * 200 * 240 + 0.75 * 240 * 3)
    # Shares of 200 units have a standard deviation of 3.5 %: 20 members' mean lies within 5 % but for one seed in 10^9.
    assert np.mean(counted) == pytest.approx(work.thinned, rel=0.05)
    assert work.gathered == pytest.approx(work.thinned + 0.75 * 240, rel=1e-6)


def test_what_is_left_is_named_with_the_reason() -> None:
    cut = {name: thin(example(name)[1]).cut for name in MODELS}
    left = {name: dict(thin(example(name)[1]).left) for name in MODELS}
    assert cut["mlp"] == ("2", "5")
    assert not left["mlp"]
    assert cut["encoder"] == ()
    assert all("dims 1 and 2" in why for why in left["encoder"].values())
    assert len(left["encoder"]) == 4
    assert "never 0" in left["other laws"]["4"]
    assert "aten.add.Tensor" in left["other laws"]["2"]
    assert "dims 1 and 2 and 3 of (B, 6, 4, 4)" in left["positions"]["1"]
    assert cut["positions"] == ("3",)
    for name in MODELS:  # every site is named once
        assert {*cut[name], *left[name]} == set(example(name)[1].draws.values())


@torch.no_grad()
def test_a_rate_below_the_half_is_a_correction() -> None:
    _, graph, x = example("corrected")
    thinning, cutting = thin(graph), thin(graph, delta=False)
    frontier = halve(graph).prefix(x)
    assert len(thinning.prepare(*frontier)) == len(frontier) + 1
    assert len(cutting.prepare(*frontier)) == len(frontier)
    assert thinning.work().thinned < 0.5 * cutting.work().thinned
    assert thinning.work().once == 20 * 30
    assert len(thin(example("mlp")[1]).prepare(*halve(example("mlp")[1]).prefix(x))) == len(
        halve(example("mlp")[1]).prefix(x)
    )


def test_gradients_reach_the_rows_and_the_weights() -> None:
    for name in ("corrected", "images", "norms"):
        _, graph, x = example(name)
        x = x.clone().requires_grad_()
        weights = list(dict(graph.module.named_parameters()).values())
        expected = torch.autograd.grad(dense(graph, x, 1)[0].square().sum(), [x, *weights], allow_unused=True)
        for thinning in (thin(graph), thin(graph, fold=False, delta=False)):
            ours = torch.autograd.grad(
                run(thinning, graph, x, 1)[0].square().sum(), [x, *weights], allow_unused=True
            )
            for a, b in zip(ours, expected, strict=True):
                if a is None or b is None:
                    assert a is b
                else:
                    compare([a], [b], 1e-10)
        module = thin_module(graph, SEED, 1)
        out = module(x).square().sum()
        compare([torch.autograd.grad(out, x, retain_graph=True)[0]], [expected[0]], 1e-10)
        assert all(g is not None for g in torch.autograd.grad(out, list(module.parameters())))


@torch.no_grad()
def test_weights_are_followed_as_they_change() -> None:
    model = network(MODELS["corrected"][0])
    x = torch.randn(4, 5, dtype=torch.float64)
    graph = graph_of(model, x)
    thinning = thin(graph)
    before = run(thinning, graph, x, 1)[0]
    for value in (*model.parameters(), model[3].running_mean, model[3].running_var):  # type: ignore[index]
        value.data.mul_(1.5)
    after = run(thinning, graph, x, 1)
    compare(after, dense(graph, x, 1))
    assert not torch.allclose(before, after[0])


@torch.no_grad()
def test_weights_made_once_serve_all_members() -> None:
    for name in ("corrected", "images", "wide"):
        _, graph, x = example(name)
        thinning = thin(graph)
        whole = thinning.whole()
        ready = thinning.prepare(*halve(graph).prefix(x), whole=whole)
        for k in (4, 0, 4):
            compare(list(thinning.suffix(*ready, *thinning.arguments(SEED, k, whole))), dense(graph, x, k))


@torch.no_grad()
def test_the_module_stands_on_its_own() -> None:
    model = network(MODELS["images"][0])
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    graph = graph_of(model, x)
    module = thin_module(graph, SEED, 2)
    expected = module(x)
    state = module.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    assert set(state) <= set(model.state_dict()) | {n for n in state if n.startswith(("index", "factor"))}
    other = copy.deepcopy(module)
    for p in model.parameters():
        p.zero_()
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    for p in module.parameters():
        p.add_(1.0)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    module.load_state_dict(state)
    module.train()
    other.load_state_dict(copy.deepcopy(state))
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=0)
    program = torch.export.export(other, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    more = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(program.module()(more), other(more))


def test_members_differ_and_return() -> None:
    _, graph, x = example("mlp")
    thinning = thin(graph)
    first = [run(thinning, graph, x, k)[0] for k in range(3)]
    again = [run(thinning, graph, x, k)[0] for k in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[0], first[1])


def formulas(sizes: int, sites: int) -> st.SearchStrategy[u.Units]:
    leaf = st.one_of(
        st.integers(0, sites - 1).map(lambda i: u.kept(i, sizes)),
        st.integers(0, sites - 1).map(lambda i: u.dropped(i, sizes)),
        st.just(u.every(sizes)),
        st.just(u.nothing(sizes)),
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda p: u.both(*p)),
            st.tuples(inner, inner).map(lambda p: u.either(*p)),
            st.tuples(inner, inner).map(lambda p: u.part(u.concatenated(*p), sizes // 2, sizes)),
            inner.map(lambda a: u.factor(u.kron(a, u.every(3)), (sizes, 3), "left")),
            inner.map(lambda a: u.part(u.place(a, 2 * sizes, 1, 2), 1, sizes, 2)),
        ),
        max_leaves=6,
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_sets_of_units_are_what_their_formulas_say(data: st.DataObject) -> None:
    n, rng = 6, np.random.default_rng(data.draw(st.integers(0, 99)))
    keep = [rng.random(n) < 0.5 for _ in range(3)]
    value = u.Valuation(keep)
    a, b = data.draw(formulas(n, 3)), data.draw(formulas(n, 3))
    assert np.array_equal(value(u.both(a, b)), value(a) & value(b))
    assert np.array_equal(value(u.either(a, b)), value(a) | value(b))
    assert u.both(a, b) is u.both(b, a)
    joined = u.kron(a, b)
    assert np.array_equal(value(joined), (value(a)[:, None] & value(b)).reshape(-1))
    # A factor may hold more than the pairs need, never less.
    assert (value(u.factor(joined, (n, n), "left")) >= value(joined).reshape(n, n).any(1)).all()
    assert (value(u.factor(joined, (n, n), "right")) >= value(joined).reshape(n, n).any(0)).all()
    assert np.array_equal(value(u.concatenated(a, b)), np.concatenate((value(a), value(b))))
    indices = value.indices(a)
    assert set(np.flatnonzero(value(a))) <= set(indices)
    assert len(indices) > 0
    assert (np.diff(indices) > 0).all()


def test_large_sets_are_filled_up_to_whole_vectors() -> None:
    keep = np.random.default_rng(0).random(400) < 0.5
    value, units = u.Valuation([keep]), u.kept(0, 400)
    indices = value.indices(units)
    assert len(indices) % 16 == 0
    assert keep.sum() <= len(indices) < keep.sum() + 16
    assert set(np.flatnonzero(keep)) <= set(indices)
    assert u.expected(units, [0.25]).sum() == pytest.approx(300)
