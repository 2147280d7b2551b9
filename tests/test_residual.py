"""The fused tails: the masks of dropout, the sums and norms of torch, gradients of both, in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import dropkit as dk
from dropkit.errors import AddressError, ProbabilityError, ShapeError
from dropkit.masks import residual_cpu

NORMS = ["none", "layer", "rms"]
EPS = 1e-5
every_norm = pytest.mark.parametrize("norm", NORMS)


def fused(norm, x, residual, p=0.3, bias=None, weight=None, norm_bias=None, training=True, **fields):
    """Output and sum of the function under test; without a norm both are the sum."""
    with dk.masks(seed=5, **fields):
        if norm == "none":
            total = dk.functional.dropout_add(x, residual, p, training, bias=bias)
            return total, total
        if norm == "layer":
            return dk.functional.dropout_add_layer_norm(
                x, residual, weight, norm_bias, p, training, bias=bias, eps=EPS, prenorm=True
            )
        return dk.functional.dropout_add_rms_norm(
            x, residual, weight, p, training, bias=bias, eps=EPS, prenorm=True
        )


def separate(norm, x, residual, p=0.3, bias=None, weight=None, norm_bias=None, training=True, **fields):
    """The same in torch's operations and our dropout."""
    with dk.masks(seed=5, **fields):
        total = residual + dk.functional.dropout(x if bias is None else x + bias, p, training)
    if norm == "none":
        return total, total
    if norm == "layer":
        return F.layer_norm(total, x.shape[-1:], weight, norm_bias, EPS), total
    return F.rms_norm(total, x.shape[-1:], weight, EPS), total


def inputs(shape, dtype, bias=True, weight=True, norm_bias=True):
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()

    width = shape[-1]
    return {
        "x": draw(*shape),
        "residual": draw(*shape),
        "bias": draw(width) if bias else None,
        "weight": draw(width) if weight else None,
        "norm_bias": draw(width) if norm_bias else None,
    }


def gradients(results, given, which):
    """Of a sum in which every output element has a factor of its own; `which` outputs take part."""
    leaves = [t for t in given.values() if t is not None]
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in results[which])
    return torch.autograd.grad(loss, leaves, allow_unused=True)


@settings(max_examples=150)
@given(
    norm=st.sampled_from(NORMS),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).flatmap(
        lambda lead: st.integers(1, 70).map(lambda width: (*lead, width))
    )
    | st.sampled_from([(600, 24), (3, 1100), (2, 300, 8), (5, 4097), (70, 96)]),
    p=st.sampled_from([0.0, 1e-6, 1.0]) | st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    training=st.sampled_from([True, True, True, False]),
    which=st.sampled_from([slice(0, 1), slice(1, 2), slice(0, 2)]),
    where=st.sampled_from(["plain", "offset", "samples", "member", "member and samples"]),
)
def test_fused_is_separate_with_the_same_mask(norm, shape, p, dtype, parts, training, which, where):
    bias, weight, norm_bias = parts
    given = inputs(shape, dtype, bias, weight, norm_bias and weight and norm == "layer")
    samples = torch.arange(shape[0]).flip(0) * 2**30
    fields = {
        "plain": {"step": 9},
        "offset": {"row_offset": 2**33},
        "samples": {"samples": samples},
        "member": {"member": 6},
        "member and samples": {"member": 2**24 - 1, "samples": samples},
    }[where]
    ours = fused(norm, **given, p=p, training=training, **fields)
    theirs = separate(norm, **given, p=p, training=training, **fields)
    assert torch.equal(ours[1], theirs[1])  # the mask bit for bit, and with it the sum
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(ours[0], theirs[0], **close)
    if shape[-1] == 1 and norm == "layer" and dtype == torch.float32:
        return  # a variance of 0 leaves nothing but rounding to compare
    for mine, other in zip(gradients(ours, given, which), gradients(theirs, given, which), strict=True):
        if other is None or mine is None:
            assert mine is None or not mine.any()
            assert other is None or not other.any()
        else:
            scale = max(float(other.abs().max()), 1.0)
            torch.testing.assert_close(mine / scale, other / scale, **close)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_norm
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 8)])
def test_derivatives_of_first_and_second_order(norm, shape):
    given = inputs(shape, torch.float64, norm_bias=norm == "layer")
    if norm == "none":
        given["weight"] = None
    names = [name for name, tensor in given.items() if tensor is not None]
    leaves = tuple(given[name] for name in names)

    def f(*tensors):
        y, total = fused(norm, **dict(zip(names, tensors, strict=True)))
        return y**2, total

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


@every_norm
def test_threads_change_no_bit(norm):
    given = inputs((3000, 100), torch.float32, norm_bias=norm == "layer")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = fused(norm, **given)
            results.append([*outputs, *gradients(outputs, given, slice(0, 1))])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_what_is_kept_for_backward():
    given = inputs((64, 128), torch.float32)
    kept = {}
    for norm in NORMS:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            fused(norm, **{**given, "norm_bias": given["norm_bias"] if norm == "layer" else None})
        kept[norm] = sum(sizes)
    one_sum_two_numbers_a_row_and_the_weight = 64 * 128 + 2 * 64 + 128
    assert kept == {
        "none": 0,
        "layer": one_sum_two_numbers_a_row_and_the_weight,
        "rms": one_sum_two_numbers_a_row_and_the_weight,
    }


@every_norm
def test_the_kernels_are_used_where_they_can_be(norm, monkeypatch):
    calls = []
    kernel = residual_cpu.add_rows
    monkeypatch.setattr(residual_cpu, "add_rows", lambda *a: calls.append(1) or kernel(*a))
    x = torch.randn(4, 16)
    fused(norm, x, x)
    assert len(calls) == 1
    fused(norm, x.bfloat16(), x.bfloat16())
    fused(norm, x, x, p=torch.tensor(0.2))
    assert len(calls) == 1


@every_norm
def test_half_precision_and_rates_as_tensors_have_the_same_mask(norm):
    x, residual = torch.rand(6, 40) + 1, torch.zeros(6, 40)
    _, total = fused(norm, x, residual)
    for other in (
        fused(norm, x.bfloat16(), residual.bfloat16())[1],
        fused(norm, x, residual, p=torch.tensor(0.3))[1],
        fused(norm, x.t().contiguous().t(), residual)[1],
    ):
        assert torch.equal(other == 0, total == 0)


@every_norm
def test_vmap_over_members_is_a_loop(norm):
    x, residual = torch.randn(2, 5, 16, dtype=torch.float64)
    batched = torch.func.vmap(lambda m: fused(norm, x, residual, member=m)[0])(torch.arange(4))
    loop = torch.stack([fused(norm, x, residual, member=m)[0] for m in range(4)])
    torch.testing.assert_close(batched, loop, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@every_norm
def test_a_compiled_tail_is_the_eager_one(norm):
    torch._dynamo.reset()
    given = inputs((5, 16), torch.float64, norm_bias=norm == "layer")
    functions = {
        "none": lambda g: dk.functional.dropout_add(g["x"], g["residual"], 0.3, bias=g["bias"]),
        "layer": lambda g: dk.functional.dropout_add_layer_norm(
            g["x"], g["residual"], g["weight"], g["norm_bias"], 0.3, bias=g["bias"]
        ),
        "rms": lambda g: dk.functional.dropout_add_rms_norm(
            g["x"], g["residual"], g["weight"], 0.3, bias=g["bias"]
        ),
    }
    run = torch.compile(functions[norm], fullgraph=True, backend="aot_eager")
    with dk.masks(seed=5, step=2):
        ours = run(given)
    with dk.masks(seed=5, step=2):
        theirs = functions[norm](given)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(*(gradients((y,), given, slice(0, 1)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_what_is_dropped_is_gone_whatever_it_was():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]]).repeat(50, 1)
    _, total = fused("none", x, torch.full((50, 4), 2.0), p=0.5)
    with dk.masks(seed=5):
        keep = dk.functional.dropout(torch.ones(50, 4), 0.5) > 0
    assert (total[~keep] == 2).all()
    assert total[:, 0].isnan().equal(keep[:, 0])


def test_an_evaluation_draws_nothing_and_training_draws_once():
    x = torch.ones(3, 8)
    with dk.masks(seed=0) as here:
        assert torch.equal(dk.functional.dropout_add(x, x, 0.5, training=False), 2 * x)
        assert here.drawn == ()
        dk.functional.dropout_add(x, x, 0.5, site="a")
        assert here.drawn == ("a",)
        with pytest.raises(AddressError, match="drawn twice"):
            dk.functional.dropout_add(x, x, 0.0, site="a")


def test_without_prenorm_the_output_stands_alone():
    x = torch.randn(4, 8)
    for norm, f in (
        ("layer", dk.functional.dropout_add_layer_norm),
        ("rms", dk.functional.dropout_add_rms_norm),
    ):
        with dk.masks(seed=5):
            y = f(x, x, p=0.3, eps=EPS)
        assert torch.equal(y, fused(norm, x, x)[0])


def test_rms_norms_eps_is_torchs():
    x = torch.full((2, 8), 1e-4)
    ours = dk.functional.dropout_add_rms_norm(x, x, p=0.0)
    torch.testing.assert_close(ours, F.rms_norm(2 * x, (8,)))


def test_errors_say_what_is_allowed():
    x = torch.ones(3, 8)
    for wrong in (torch.ones(3, 7), torch.ones(8)):
        with pytest.raises(ShapeError, match="same shape"):
            dk.functional.dropout_add(x, wrong)
    with pytest.raises(ShapeError, match="two dims or more"):
        dk.functional.dropout_add(torch.ones(8), torch.ones(8))
    with pytest.raises(ShapeError, match=r"weight of shape \(3,\).*\(8,\)"):
        dk.functional.dropout_add_layer_norm(x, x, torch.ones(3))
    with pytest.raises(ShapeError, match="bias of shape"):
        dk.functional.dropout_add(x, x, bias=torch.ones(1))
    with pytest.raises(ShapeError, match="3 sample ids were given for 2 rows"):
        fused("none", x[:2], x[:2], samples=torch.arange(3))
    with pytest.raises(ProbabilityError, match=r"p=1\.5"):
        dk.functional.dropout_add(x, x, 1.5)
