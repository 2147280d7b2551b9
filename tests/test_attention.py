"""Attention with dropout: the definition, whatever the blocks, and nothing of the size of the scores kept."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import dropkit as dk
from dropkit.errors import AddressError, OptionError, ProbabilityError, ShapeError
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, survivor_scale
from dropkit.nn import attention

attend = dk.functional.scaled_dot_product_attention
SEED, STEP = 5, 7


def keep_of(shape, p, ids=None, member=0, site="here"):
    """(B, ..., H, L, S) bool by the readable definition."""
    key = torch.tensor(signed(site_key(SEED, site_hash(site))))
    ids = torch.arange(shape[0]) if ids is None else ids
    rate = torch.tensor(p, dtype=torch.float64)
    keep = bernoulli_keep(key, torch.tensor(member), ids, STEP, math.prod(shape[1:]), rate)
    return keep.reshape(len(ids), *shape[1:])


def definition(q, k, v, keep, p, mask=None, causal=False, scale=None):
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    weights = torch.softmax(torch.where(blind, 0.0, scores), -1) * ~blind
    return (weights * keep * survivor_scale(torch.tensor(p, dtype=torch.float64)).to(q.dtype)) @ v


def draw_inputs(b, h, n, s, e, v, dtype=torch.float64, seed=0, grad=True):
    source = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, e), (b, h, s, e), (b, h, s, v))
    return [
        torch.randn(x, generator=source, dtype=torch.float64).to(dtype).requires_grad_(grad) for x in shapes
    ]


def blocks_of(scores):
    """Blocks so small that tiny inputs have several, which begin anywhere among eight lanes; 0: the default."""
    if not scores:
        return contextlib.nullcontext()
    return mock.patch.multiple(attention, BLOCK=scores, MIN_ROWS=2, GROUP=scores, CAUSAL_KEYS=4)


sizes = st.integers(1, 13)
block_sizes = st.sampled_from([0, 12, 60])
rates = st.sampled_from([2.0**-20, 0.1, 0.5, 0.9, 1.0])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), sizes, sizes, rates, st.booleans(), block_sizes,
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_mask_is_exactly_that_of_its_address(b, h, n, s, p, causal, size, dtype):
    q, k, _ = draw_inputs(b, h, n, s, 3, 1, dtype, grad=False)
    values = torch.eye(s, dtype=dtype).expand(b, h, s, s)  # so that the output is the weights themselves
    with blocks_of(size), dk.masks(seed=SEED, step=STEP):
        weights = attend(q, k, values, None, p, causal, site="here")
    keep = keep_of((b, h, n, s), p)
    seen = torch.ones(n, s, dtype=torch.bool).tril() if causal else torch.ones(n, s, dtype=torch.bool)
    assert torch.equal(weights != 0, keep & seen)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bool of rows", "float", "scale"])
@pytest.mark.parametrize("p", [0.1, 1.0])
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), sizes, sizes, st.integers(0, 99), block_sizes)
def test_values_and_gradients_are_those_of_the_definition(kind, p, b, h, n, s, seed, size):
    q, k, v = draw_inputs(b, h, n, s, 4, 3, seed=seed)
    source = torch.Generator().manual_seed(seed)
    mask = {
        "bool": torch.rand(n, s, generator=source) < 0.6,
        "bool of rows": torch.rand(b, 1, 1, s, generator=source) < 0.6,
        "float": torch.randn(b, h, n, s, generator=source, dtype=torch.float64),
    }.get(kind)
    causal, scale = kind == "causal", 0.3 if kind == "scale" else None
    with blocks_of(size), dk.masks(seed=SEED, step=STEP):
        out = attend(q, k, v, mask, p, causal, scale, site="here")
        upstream = torch.randn(out.shape, generator=source, dtype=torch.float64)
        gradients = torch.autograd.grad(out, (q, k, v), upstream)
    expected = definition(q, k, v, keep_of((b, h, n, s), p), p, mask, causal, scale)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, (q, k, v), upstream), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("shape", [(2, 2, 150, 301), (1, 1, 3, 5), (3, 2, 40, 600)])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_and_16_bits_come_close_to_float64(dtype, tolerance, shape, causal):
    q, k, v = draw_inputs(*shape, 16, 8, dtype)
    with dk.masks(seed=SEED, step=STEP):
        out = attend(q, k, v, None, 0.2, causal, site="here")
    upstream = torch.ones_like(out)
    found = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = definition(*exact, keep_of(shape, 0.2), 0.2, causal=causal)
    wanted = (expected, *torch.autograd.grad(expected, exact, upstream.double()))
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == dtype
        assert (have.double() - want).abs().max() <= tolerance * want.abs().max()


def test_large_scores_neither_overflow_nor_lose_a_row():
    q, k, v = (x * 30 for x in draw_inputs(1, 2, 9, 11, 8, 3, torch.float32, grad=False))
    with dk.masks(seed=SEED, step=STEP):
        out = attend(q, k, v, None, 0.25, site="here")
    expected = definition(q.double(), k.double(), v.double(), keep_of((1, 2, 9, 11), 0.25), 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.data())
def test_a_split_of_the_batch_changes_no_mask(b, data):
    cut = data.draw(st.integers(0, b))
    order = torch.tensor(data.draw(st.permutations(range(b))))
    q, k, v = draw_inputs(b, 2, 5, 6, 4, 3, grad=False)

    def run(rows, **where):
        with dk.masks(seed=SEED, step=STEP, **where):
            return attend(q[rows], k[rows], v[rows], None, 0.4)

    whole = run(slice(None))
    parts = torch.cat([run(slice(cut)), run(slice(cut, None), row_offset=cut)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(order, samples=order), whole[order], rtol=1e-12, atol=1e-12)


def test_a_member_has_one_mask_for_all_rows():
    q, k, v = (x[:1].expand(3, -1, -1, -1) for x in draw_inputs(1, 2, 5, 6, 4, 3, grad=False))
    outs = []
    for member in (3, 4):
        with dk.masks(seed=SEED, step=STEP, member=member):
            outs.append(attend(q, k, v, None, 0.4, site="here"))
        keep = keep_of((1, 2, 5, 6), 0.4, ids=torch.zeros(1, dtype=torch.int64), member=member)
        torch.testing.assert_close(outs[-1], definition(q, k, v, keep, 0.4))
    assert not torch.equal(*outs)


def test_a_committee_in_one_pass_is_its_members_one_by_one():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, grad=False)

    def run(member):
        with dk.masks(seed=SEED, member=member):
            return attend(q, k, v, None, 0.4, is_causal=True)

    together = torch.func.vmap(run)(torch.arange(4))
    for member in range(4):
        torch.testing.assert_close(together[member], run(member))


def test_rates_in_one_pass_are_rates_one_by_one():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, grad=False)
    rates = torch.tensor([0.1, 0.5, 0.9])
    with dk.masks(seed=SEED):
        together = torch.func.vmap(lambda p: attend(q, k, v, None, p))(rates)
    for i, p in enumerate(rates.tolist()):
        with dk.masks(seed=SEED):
            torch.testing.assert_close(together[i], attend(q, k, v, None, p))


def test_outside_a_context_torch_seeds_the_mask():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, grad=False)

    def run(seed):
        torch.manual_seed(seed)
        return attend(q, k, v, None, 0.5), attend(q, k, v, None, 0.5)

    first, second = run(1)
    assert torch.equal(first, run(1)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(2)[0])


def attend_here(q, k, v, p=0.3, **options):
    with dk.masks(seed=SEED, step=STEP):
        return attend(q, k, v, None, p, site="here", **options)


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_of_first_and_second_order(causal):
    inputs = draw_inputs(2, 1, 4, 3, 2, 2)

    def run(q, k, v):
        return attend_here(q, k, v, is_causal=causal)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_gradient_of_one_input_alone_has_derivatives():
    q, k, v = draw_inputs(1, 1, 4, 3, 2, 2)
    k, v = k.detach(), v.detach()
    assert torch.autograd.gradgradcheck(lambda q: attend_here(q, k, v), (q,))


def test_function_transforms_see_the_same_masks():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3)
    out = attend_here(q, k, v)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    q, k, v = (x.detach() for x in (q, k, v))
    transformed = torch.func.grad(lambda q: attend_here(q, k, v).sum())(q)
    torch.testing.assert_close(transformed, gradient)
    value, slope = torch.func.jvp(lambda q: attend_here(q, k, v), (q,), (torch.ones_like(q),))
    torch.testing.assert_close(value, out)
    torch.testing.assert_close(slope.sum(), gradient.sum())


def test_a_float_mask_has_a_gradient():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3)
    mask = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    with dk.masks(seed=SEED, step=STEP):
        out = attend(q, k, v, mask, 0.3, site="here")
    expected = definition(q, k, v, keep_of((2, 2, 5, 6), 0.3), 0.3, mask)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), mask), torch.autograd.grad(expected.sum(), mask)
    )


def test_a_compiled_graph_has_the_same_masks():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, grad=False)
    compiled = torch.compile(
        lambda q: attend(q, k, v, None, 0.3, site="here"), backend="eager", fullgraph=True
    )
    with dk.masks(seed=SEED, step=STEP):
        torch.testing.assert_close(compiled(q), attend_here(q, k, v))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_number(threads):
    q, k, v = draw_inputs(2, 3, 200, 301, 8, 8, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, 2):
            torch.set_num_threads(count)
            out = attend_here(q, k, v)
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result has."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_the_size_of_the_scores_is_made_or_kept(causal):
    L, S = 1024, 1100
    q, k, v = draw_inputs(1, 1, L, S, 8, 8, torch.float32)
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with LargestTensor() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attend_here(q, k, v, is_causal=causal)
    assert sum(x.numel() for x in kept) <= q.numel() + k.numel() + v.numel() + out.numel() + L
    with seen:
        out.sum().backward()
    assert 0 < seen.largest <= attention.BLOCK < L * S


def test_a_query_that_sees_no_key_gets_zero_and_no_gradient():
    q, k, v = draw_inputs(1, 2, 4, 5, 3, 3, torch.float32)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    out = attend(q, k, v, mask, 0.2)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(out[:, :, 2], torch.zeros(1, 2, 3))
    assert torch.equal(out[:, :, 2], F.scaled_dot_product_attention(q, k, v, mask)[:, :, 2])
    assert torch.equal(gradient[:, :, 2], torch.zeros(1, 2, 3))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_keys_may_hold_nan(dtype):
    q, k, v = draw_inputs(2, 2, 4, 5, 3, 3, dtype, grad=False)
    mask = torch.tensor([True, False, True, True, False])
    clean = attend_here_masked(q, k, v, mask)
    k[..., ~mask, :] = torch.nan
    torch.testing.assert_close(attend_here_masked(q, k, v, mask), clean)


def attend_here_masked(q, k, v, mask):
    with dk.masks(seed=SEED, step=STEP):
        return attend(q, k, v, mask, 0.3, site="here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_that_is_seen_stays_nan(dtype):
    q, k, v = draw_inputs(1, 1, 3, 4, 2, 2, dtype, grad=False)
    q[0, 0, 1] = torch.nan
    out = attend(q, k, v, None, 0.1)
    assert torch.isnan(out[0, 0, 1]).all()
    assert torch.isfinite(out[0, 0, [0, 2]]).all()


@pytest.mark.parametrize("options", [{"dropout_p": 0.0}, {"dropout_p": 0.5, "training": False}])
def test_without_dropout_it_is_torchs_own(options):
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, torch.float32)
    assert torch.equal(attend(q, k, v, **options), F.scaled_dot_product_attention(q, k, v))


def test_everything_dropped_is_zero():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3)
    out = attend(q, k, v, None, 1.0)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_heads_of_keys_may_serve_several_heads_of_queries():
    q, _, _ = draw_inputs(2, 6, 5, 7, 4, 3)
    _, k, v = draw_inputs(2, 2, 5, 7, 4, 3)
    out = attend_here(q, k, v, enable_gqa=True)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    expected = attend_here(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (q, k, v)))


def test_leading_dims_broadcast_and_layout_does_not_matter():
    q, k, v = draw_inputs(3, 2, 5, 7, 4, 3)
    out = attend_here(q, k[:1, :1], v[:1, :1])
    keep = keep_of((3, 2, 5, 7), 0.3)
    torch.testing.assert_close(out, definition(q, k[:1, :1], v[:1, :1], keep, 0.3))
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attend_here(*strided), attend_here(q, k, v))


def test_without_leading_dims_it_is_one_row():
    q, k, v = draw_inputs(1, 1, 5, 7, 4, 3)
    out = attend_here(q[0, 0], k[0, 0], v[0, 0])
    assert out.shape == (5, 3)
    torch.testing.assert_close(out, attend_here(q, k, v)[0, 0])
    torch.testing.assert_close(out, attend_here(q[0], k[0], v[0])[0])


def test_autocast_works_in_its_dtype():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_here(q, k, v)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend_here(q, k, v), rtol=0.05, atol=0.05)
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_empty_inputs_have_empty_or_zero_results():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, grad=False)
    assert attend(q[:0], k[:0], v[:0], None, 0.5).shape == (0, 2, 5, 3)
    assert not attend(q, k[:, :, :0], v[:, :, :0], None, 0.5).any()


def test_mistakes_are_named():
    q, k, v = draw_inputs(2, 2, 5, 6, 4, 3, grad=False)
    with pytest.raises(ProbabilityError, match=r"dropout_p=1.5 was given"):
        attend(q, k, v, None, 1.5)
    with pytest.raises(ShapeError, match=r"same last dim, here 4 and 3"):
        attend(q, k[..., :3], v, None, 0.5)
    with pytest.raises(ShapeError, match=r"value \(2, 2, 5, 3\) were given; allowed"):
        attend(q, k, v[:, :, :5], None, 0.5)
    with pytest.raises(ShapeError, match=r"leading dims must broadcast"):
        attend(torch.cat([q, q[:1]]), k, v, None, 0.5)
    with pytest.raises(
        ShapeError, match=r"attn_mask \(5, 5\) was given; it must broadcast to \(2, 2, 5, 6\)"
    ):
        attend(q, k, v, torch.ones(5, 5, dtype=torch.bool), 0.5)
    with pytest.raises(ShapeError, match=r"the query a multiple of it"):
        attend(q[:, :1], k, v, None, 0.5, enable_gqa=True)
    with pytest.raises(OptionError, match=r"put both into attn_mask"):
        attend(q, k, v, torch.ones(5, 6, dtype=torch.bool), 0.5, is_causal=True)
    with pytest.raises(OptionError, match=r"attn_mask of torch.int64"):
        attend(q, k, v, torch.ones(5, 6, dtype=torch.int64), 0.5)
    with pytest.raises(OptionError, match=r"one floating dtype"):
        attend(q, k.float(), v, None, 0.5)
    with (
        dk.masks(samples=torch.arange(3)),
        pytest.raises(ShapeError, match=r"3 sample ids were given for 2 rows"),
    ):
        attend(q, k, v, None, 0.5)
    with dk.masks():
        attend(q, k, v, None, 0.5, site="here")
        with pytest.raises(AddressError, match=r"drawn twice"):
            attend(q, k, v, None, 0.5, site="here")
