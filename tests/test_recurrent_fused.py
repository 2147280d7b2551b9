"""The quick recurrence against its definition: values, gradients, gradients of gradients, for every kind of noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dropkit as dk
from dropkit.nn import recurrent_layer
from dropkit.nn.recurrent_cells import StepNoise, Weights, gru_step, lstm_step, run_steps
from dropkit.nn.recurrent_fused import gru_fused, is_served, lstm_fused

KINDS = pytest.mark.parametrize("kind", ["lstm", "gru"])
FORMS = {"lstm": (lstm_step, lstm_fused, 4), "gru": (gru_step, gru_fused, 3)}
B, INPUTS, H = 4, 3, 5


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def keep(*shape: int) -> Tensor:
    return (torch.rand(shape) < 0.6).double()


def case(kind: str, bias: bool, sizes: list[int]) -> tuple[Tensor, tuple[Tensor, ...], Weights, list[Tensor]]:
    gates = FORMS[kind][2]
    x, state = leaf(sum(sizes), INPUTS), (leaf(B, H), leaf(B, H))[: 2 if kind == "lstm" else 1]
    biases = (leaf(gates * H), leaf(gates * H)) if bias else (None, None)
    weights = Weights(leaf(gates * H, INPUTS), leaf(gates * H, H), *biases, None)
    return x, state, weights, [x, *state, *(w for w in weights if w is not None)]


STATE: dict[str, Callable[[int, int], Tensor | None]] = {
    "none": lambda T, G: None,
    "locked": lambda T, G: keep(1, B, 1, H) / 0.6,
    "fresh": lambda T, G: keep(T, B, 1, H) / 0.6,
    "untied": lambda T, G: keep(T, B, G, H) / 0.6,
    "for-all-rows": lambda T, G: keep(T, 1, 1, H) / 0.6,
}
UPDATE: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda T: None,
    "locked": lambda T: keep(1, B, H) / 0.6,
    "fresh": lambda T: keep(T, 1, H) / 0.6,
}
ZONES: dict[str, Callable[[int], tuple[Tensor | None, Tensor | None]]] = {
    "none": lambda T: (None, None),
    "drawn": lambda T: (keep(T, B, H), keep(T, B, H)),
    "expected": lambda T: (torch.tensor(0.7).double(), torch.tensor(0.9).double()),
}


@KINDS
@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 3, 3, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_its_definition(kind: str, sizes: list[int], reverse: bool) -> None:
    torch.manual_seed(0)
    step, fused, gates = FORMS[kind]
    T = len(sizes)
    updates, zones = list(UPDATE.values()), list(ZONES.values())
    for i, state in enumerate([*STATE.values()] * 2):  # each state with two of the others
        update, zone = updates[i % 3], zones[(i + 1 + i // 5) % 3]
        cell, hidden = zone(T)
        noise = StepNoise(state(T, gates), update(T), cell if kind == "lstm" else None, hidden)
        x, start, weights, leaves = case(kind, bias=hidden is None, sizes=sizes)
        assert is_served(x, weights, noise)
        slow, slow_end = run_steps(step, x, sizes, start, weights, noise, reverse)
        quick, quick_end = fused(x, sizes, start, weights, noise, reverse)
        torch.testing.assert_close((quick, *quick_end), (slow, *slow_end), rtol=1e-10, atol=1e-12)
        outer = [torch.randn_like(y) for y in (slow, *slow_end)]
        wanted = torch.autograd.grad((slow, *slow_end), leaves, outer)
        ys = (quick, *quick_end)
        once = torch.autograd.grad(ys, leaves, outer, retain_graph=True)
        torch.testing.assert_close(once, wanted, rtol=1e-9, atol=1e-11)
        twice = torch.autograd.grad(
            ys, leaves, outer, retain_graph=True
        )  # nothing that was kept has been written to
        torch.testing.assert_close(twice, once, rtol=0, atol=0)
        again = torch.autograd.grad(ys, leaves, outer, create_graph=True)
        torch.testing.assert_close(again, wanted, rtol=1e-9, atol=1e-11)


@KINDS
def test_gradients_of_gradients_are_those_of_finite_differences(kind: str) -> None:
    torch.manual_seed(0)
    _, fused, gates = FORMS[kind]
    sizes = [4, 2, 1]
    noise = StepNoise(
        keep(3, B, gates, H), keep(3, B, H), keep(3, B, H) if kind == "lstm" else None, keep(3, B, H)
    )
    x, start, weights, leaves = case(kind, True, sizes)

    def f(*_: Tensor) -> Tensor:
        out, end = fused(x, sizes, start, weights, noise, False)
        return torch.cat([out, *end])

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@KINDS
def test_only_what_needs_a_gradient_gets_one(kind: str) -> None:
    _, fused, _ = FORMS[kind]
    x, start, weights, _ = case(kind, True, [4, 4])
    still = Weights(weights.ih.detach(), weights.hh, weights.bias_ih, weights.bias_hh.detach(), None)
    fixed = tuple(part.detach() for part in start)
    out, _ = fused(x.detach(), [4, 4], fixed, still, StepNoise(state=keep(1, B, 1, H)), False)
    out.sum().backward()
    assert x.grad is None
    assert weights.ih.grad is None
    assert weights.bias_hh.grad is None
    assert weights.hh.grad is not None
    assert weights.bias_ih.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_layer_takes_the_quick_way_with_a_mask_for_each_row(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = getattr(dk.nn, kind)(8, 16, recurrent_dropout=0.4, zoneout=0.1, bidirectional=True).to(dtype)
    x = torch.randn(9, 5, 8, dtype=dtype, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        with dk.masks(seed=0):
            y, _ = layer(x)
        return (y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))

    quick = run()
    monkeypatch.setattr(recurrent_layer, "is_served", lambda *_: False)
    slow = run()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for one, other in zip(quick, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise AssertionError("the definition was used")

    monkeypatch.setattr(recurrent_layer, "run_steps", refuse)
    run()


def test_a_dropped_nan_is_nothing() -> None:
    """A state that overflowed is seen by no gate that has dropped it."""
    x, (h, c), weights, _ = case("lstm", True, [4])
    h = h.detach()
    h[:, 0] = torch.nan
    mask = torch.ones(1, B, 1, H, dtype=torch.float64)
    mask[..., 0] = 0
    for run in (lstm_fused, lambda *a: run_steps(lstm_step, *a)):
        out, _ = run(x, [4], (h, c), weights, StepNoise(state=mask), False)
        assert not out.isnan().any()


@pytest.mark.parametrize("what", ["dtype", "projection", "empty", "mixed"])
def test_what_it_does_not_serve_it_says(what: str) -> None:
    x, _, weights, _ = case("lstm", True, [4])
    noise = StepNoise(state=keep(1, B, 1, H))
    if what == "dtype":
        x = x.bfloat16()
    elif what == "projection":
        weights = weights._replace(hr=leaf(2, H))
    elif what == "empty":
        x = x[:0]
    else:
        noise = StepNoise(state=keep(1, B, 1, H).float())
    assert not is_served(x, weights, noise)


def test_a_batch_without_rows_runs() -> None:
    layer = dk.nn.LSTM(3, 4, recurrent_dropout=0.5, batch_first=True)
    with dk.masks(seed=0):
        assert layer(torch.zeros(0, 5, 3))[0].shape == (0, 5, 4)


@KINDS
def test_memory_may_lie_in_any_order(kind: str) -> None:
    _, fused, _ = FORMS[kind]
    x, start, weights, leaves = case(kind, True, [4, 4])
    noise = StepNoise(state=keep(1, 1, B, H).transpose(1, 2), hidden=keep(B, 2, H).transpose(0, 1))
    strided = tuple(part.t().contiguous().t() for part in start)
    got, _ = fused(x.t().contiguous().t(), [4, 4], strided, weights, noise, False)
    wanted, _ = fused(x, [4, 4], start, weights, noise, False)
    torch.testing.assert_close(got, wanted)
    outer = torch.randn(H, 8, dtype=torch.float64).t()
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, outer), torch.autograd.grad(wanted, leaves, outer.contiguous())
    )
