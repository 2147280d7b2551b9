"""The kernels against the definition, bit for bit; golden masks; the operator's derivatives and transforms."""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import dropkit as dk
from dropkit.errors import ShapeError
from dropkit.masks import cpu, ops
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, survivor_scale

GOLDEN = Path(__file__).parent / "vectors" / "masks.txt"
rates = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-5, 3e-6]), st.floats(0, 1))


def definition(x, key, member, samples, step, p, shared=()):
    """Dropout by the reference: the mask made whole, then applied."""
    mask_shape = [1 if dim in shared else size for dim, size in enumerate(x.shape)]
    if 0 in shared or not mask_shape:
        samples, width = (
            (samples[:1] if not mask_shape else torch.zeros(1, dtype=torch.int64)),
            math.prod(mask_shape),
        )
    else:
        width = math.prod(mask_shape[1:])
    keep = bernoulli_keep(key, member, samples, step, width, p).reshape(mask_shape)
    wide = torch.promote_types(
        x.real.dtype if x.is_complex() else x.dtype, torch.float32
    )  # 16 bits round once
    scaled = (x * survivor_scale(p).to(wide).reshape(1)).to(x.dtype).reshape(x.shape)
    return torch.where(keep, scaled, torch.zeros((), dtype=x.dtype))


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(0, 9), max_size=5).map(tuple)
    | st.tuples(st.integers(1, 70), st.integers(1, 300)),
    data=st.data(),
    p=rates,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]),
    key=st.integers(-(2**63), 2**63 - 1),
    member=st.integers(0, 2**24 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_the_definition(shape, data, p, dtype, key, member, step):
    shared = tuple(dim for dim in range(len(shape)) if data.draw(st.booleans(), label=f"shared {dim}"))
    rows = shape[0] if shape else 1
    samples = torch.tensor([data.draw(st.integers(0, 2**40 - 1)) for _ in range(rows)], dtype=torch.int64)
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    x = x.permute(order).contiguous().permute([order.index(dim) for dim in range(len(shape))])
    fields = (torch.tensor(key), torch.tensor(member)), torch.tensor(p, dtype=torch.float64)
    result = ops.dropout(x, *fields[0], fields[1], samples, step, 0, list(shared))
    assert torch.equal(result, definition(x, *fields[0], samples, step, fields[1], shared))
    if x.numel():
        assert result.stride() == torch.empty_like(x).stride()  # the memory format is kept


def test_many_dims_that_alternate_fall_back_and_agree():
    x = torch.rand(2, 3, 2, 3, 2, 3, 2)
    zero, p = torch.tensor(0), torch.tensor(0.4, dtype=torch.float64)
    result = ops.dropout(x, zero, zero, p, None, 0, 0, [1, 3, 5])
    assert torch.equal(result, definition(x, zero, zero, torch.arange(2), 0, p, (1, 3, 5)))


@pytest.mark.parametrize("shared", [(), (1,), (0,)])
def test_threads_change_nothing(shared):
    x, layer = torch.rand(700, 1000), dk.functional.dropout
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with dk.masks(seed=1):
                results.append(layer(x, 0.3, shared=shared))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def _dropped_ones() -> bytes:
    # numpy makes the input: torch's own OpenMP loops hang in a child forked after they have run.
    with dk.masks(seed=1):
        return (
            dk.functional.dropout(torch.from_numpy(np.ones((700, 1000), np.float32)), 0.3).numpy().tobytes()
        )


def _in_child(queue):
    queue.put(_dropped_ones())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_have_the_same_masks(method):
    here = _dropped_ones()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    there = queue.get(timeout=120)
    child.join(timeout=30)
    assert there == here


def golden_lines() -> list[list[str]]:
    return [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]


def test_there_are_128_golden_masks():
    assert len(golden_lines()) >= 128


@pytest.mark.parametrize("line", golden_lines(), ids=lambda line: line[0])
def test_golden_masks(line):
    """The same address gives the same mask in every release: these digests are added to, never edited."""
    _, seed, site, call, step, sample, member, width, p, digest = line
    key = torch.tensor(signed(site_key(int(seed), site_hash(site, int(call)))))
    address = key, torch.tensor(int(member)), torch.tensor([int(sample)])
    rate = torch.tensor(float(p), dtype=torch.float64)
    reference = bernoulli_keep(*address, int(step), int(width), rate).numpy()
    kernel = (
        ops.dropout(torch.ones(1, int(width)), *address[:2], rate, address[2], int(step), 0, []).numpy() != 0
    )
    for keep in (reference, kernel):
        assert hashlib.sha256(np.packbits(keep).tobytes()).hexdigest()[:16] == digest


def test_each_position_is_dropped_at_the_rate():
    """False alarms: 64 positions at 1e-9 / 64 each, 1e-9 in all."""
    rows, width, p = 20_000, 64, 0.3
    with dk.masks(seed=11, step=3):
        dropped = (dk.functional.dropout(torch.ones(rows, width), p) == 0).sum(dim=0)
    assert all(binomtest(int(count), rows, p).pvalue > 1e-9 / width for count in dropped)


def test_a_rate_below_one_lane_is_drawn_at_32_bits():
    """False alarms 1e-9. One 16-bit lane could only give rate 0 or 1.5e-5 here."""
    n, p = 1 << 22, 5e-6
    with dk.masks(seed=2):
        dropped = int((dk.functional.dropout(torch.ones(64, n // 64), p) == 0).sum())
    assert 0 < dropped
    assert binomtest(dropped, n, p).pvalue > 1e-9


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_mean_is_kept_exactly_over_all_lane_values(p):
    """Summed over every value a lane can take, inverted dropout is unbiased to rounding: no chance is left."""
    rate = torch.tensor(p, dtype=torch.float64)
    lane = np.arange(1 << 16, dtype=np.uint16)
    t, _, scale = ops._quantised(float(rate))
    out = np.empty(1 << 16)
    cpu._apply(np.full(1 << 16, 1.5), out, lane, t, scale)
    assert out.mean() == pytest.approx(1.5, rel=1e-14)


def test_what_is_dropped_is_zero_whatever_it_was():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]]).repeat(50, 1).requires_grad_()
    with dk.masks(seed=0):
        y = dk.functional.dropout(x, 0.5)
    y.nan_to_num().sum().backward()
    with dk.masks(seed=0):
        keep = dk.functional.dropout(torch.ones(50, 4), 0.5) > 0
    assert (y[~keep] == 0).all()
    assert (x.grad[~keep] == 0).all()
    assert y[:, 0].isnan().equal(keep[:, 0])


def in_context(x, shared=(), **fields):
    with dk.masks(seed=1, **fields):
        return dk.functional.dropout(x, 0.3, shared=shared)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch.func.jvp's own
@pytest.mark.parametrize("shared", [(), (0,), (1,)])
def test_derivatives_of_first_and_second_order(shared):
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    f = lambda x: in_context(x, shared) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)
    expected = torch.autograd.grad(f(x).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).sum())(x.detach()), expected)
    torch.testing.assert_close(
        torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),))[1].sum(), expected.sum()
    )


def test_nothing_is_kept_for_backward():
    x = torch.randn(64, 128, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        dk.functional.dropout(x, 0.5).sum().backward()
    assert sum(kept) == 0


def test_vmap_over_members_is_a_loop_over_members():
    x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    batched = torch.func.vmap(lambda m: in_context(x, member=m))(torch.arange(7))
    loop = torch.stack([in_context(x, member=m) for m in range(7)])
    assert torch.equal(batched, loop)
    assert torch.equal(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (batched, loop)))


def test_vmap_over_rates_shares_the_bits():
    x, p = torch.randn(4, 6, 16), torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    with dk.masks(seed=3):
        batched = torch.func.vmap(dk.functional.dropout)(x, p)
    for one, rate, expected in zip(x, p.tolist(), batched, strict=True):
        with dk.masks(seed=3):
            assert torch.equal(dk.functional.dropout(one, rate), expected)


@pytest.mark.parametrize("outer_first", [True, False])
def test_nested_vmap_of_members_and_rows(outer_first):
    x, members, ids = torch.randn(5, 8), torch.arange(3), torch.arange(5)
    plain = torch.stack([in_context(x, member=m, samples=ids) for m in range(3)])
    one = lambda m, row, i: ops.dropout(  # noqa: E731
        row[None], torch.tensor(signed(site_key(1, site_hash("#0")))), m, torch.tensor(0.3, dtype=torch.float64),
        i[None], 0, 0, [],
    )[0]  # fmt: skip
    over_rows = lambda f: torch.func.vmap(f, in_dims=(None, 0, 0))  # noqa: E731
    over_members = lambda f: torch.func.vmap(f, in_dims=(0, None, None))  # noqa: E731
    if outer_first:
        assert torch.equal(over_members(over_rows(one))(members, x, ids), plain)
    else:
        assert torch.equal(over_rows(over_members(one))(members, x, ids), plain.transpose(0, 1))


def test_vmap_outside_a_context_follows_torchs_randomness():
    x = torch.ones(3, 2, 40)
    same = torch.func.vmap(dk.functional.dropout, randomness="same")(x)
    different = torch.func.vmap(dk.functional.dropout, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dk.functional.dropout)(x)


@pytest.mark.parametrize("shape", list(itertools.product([3], [4], [5])))
def test_shared_dims_have_one_mask(shape):
    for shared in [(1,), (2,), (-1,), (1, 2), (0,)]:
        y = in_context(torch.ones(shape), shared)
        for dim in shared:
            assert torch.equal(y, y.select(dim, 0).unsqueeze(dim).expand_as(y))
    assert torch.equal(in_context(torch.ones(shape), (-1,)), in_context(torch.ones(shape), (2,)))


def test_errors_say_what_is_allowed():
    with pytest.raises(ShapeError, match="-2 to 1"):
        in_context(torch.ones(2, 2), (2,))
    with pytest.raises(ShapeError, match="3 sample ids were given for 2 rows"):
        in_context(torch.ones(2, 2), samples=torch.arange(3))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("scale", [1.0, 65536 / 58982, 2.0, 1.01171875, 1e4])
@pytest.mark.parametrize("masked", [True, False])
def test_every_bfloat16_is_scaled_in_float32_and_rounded_to_even_once(scale, masked):
    """All 65 536 values, NaN and infinities too; 1.01171875 makes ties, which few rates do."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    out = np.empty(1 << 16, np.uint16)
    if masked:
        cpu._apply(every.numpy(), out, np.ones(1 << 16, np.uint16), 1, scale)
    else:
        cpu._scale(every.numpy(), out, scale)
    expected = (every.view(torch.bfloat16).float() * torch.tensor(scale, dtype=torch.float32)).bfloat16()
    got = torch.from_numpy(out).view(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~expected.isnan()])
