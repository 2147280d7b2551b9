"""The laws beside Bernoulli: kernels against the definition, moments, invariances, derivatives, golden noise."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import dropkit as dk
from dropkit.errors import AddressError, ProbabilityError, ShapeError
from dropkit.masks import noise, noise_cpu, noise_ops
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import survivor_scale

GOLDEN = Path(__file__).parent / "vectors" / "noise.txt"
F = dk.functional
LAWS = {"gaussian": F.gaussian_dropout, "uniform": F.uniform_dropout, "exact": F.exact_dropout}
ALL = {**LAWS, "alpha": F.alpha_dropout, "feature alpha": F.feature_alpha_dropout}
every_law = pytest.mark.parametrize("law", ALL)


def in_context(law, x, p=0.3, **fields):
    options = {"shared": fields.pop("shared")} if "shared" in fields else {}
    with dk.masks(seed=1, **fields):
        return ALL[law](x, p, **options)


def factor(law, where, count, p, dtype):
    """What the definition multiplies x with, (B, count); an exact mask as 0 and n / (n - k)."""
    if law == "exact":
        drop = round(p * count)
        keep = noise.exact_keep(*where, count, drop)
        return keep.to(dtype) * (count / (count - drop) if drop < count else 0.0)
    eps = (noise.gaussian_noise if law == "gaussian" else noise.uniform_noise)(*where, count)
    spread = math.sqrt(p / (1 - p)) if law == "gaussian" else math.sqrt(3 * p / (1 - p))
    return (1 + spread * eps).to(dtype)


@settings(max_examples=200)
@given(
    law=st.sampled_from(sorted(LAWS)),
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple)
    | st.tuples(st.integers(1, 40), st.integers(1, 600)),
    data=st.data(),
    p=st.floats(0, 0.99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    key=st.integers(-(2**63), 2**63 - 1),
    member=st.integers(0, 2**24 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_the_definition(law, shape, data, p, dtype, key, member, step):
    shared = tuple(dim for dim in range(len(shape)) if data.draw(st.booleans(), label=f"shared {dim}"))
    rows = shape[0] if shape else 1
    samples = torch.tensor([data.draw(st.integers(0, 2**40 - 1)) for _ in range(rows)], dtype=torch.int64)
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    key, member = torch.tensor(key), torch.tensor(member)
    rate = torch.tensor(p, dtype=torch.float64)
    y = noise_ops.noise(x, key, member, rate, samples, step, 0, list(shared), law)
    mask_shape = [1 if dim in shared else size for dim, size in enumerate(shape)]
    ids = torch.zeros(1, dtype=torch.int64) if 0 in shared else samples
    where = key, member, ids, step
    expected = factor(law, where, math.prod(mask_shape) // len(ids), p, dtype).reshape(mask_shape)
    assert torch.equal(y, x * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("law", LAWS)
def test_other_dtypes_and_layouts_have_the_same_noise(law, dtype):
    x = torch.rand(6, 5, 7)
    expected = in_context(law, torch.ones(6, 5, 7))
    y = in_context(law, x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y, (x.to(dtype) * expected).to(dtype), rtol=1e-2, atol=1e-2)
    turned = x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert torch.equal(in_context(law, turned), in_context(law, x))
    assert in_context(law, turned).stride() == turned.stride()


def test_box_and_muller_is_as_exact_as_it_says():
    """Against the mathematics library at 64 bits of mantissa."""
    edges = [0, 1, 2, 2**32 - 1, 2**32 - 2, *(2**k + d for k in (28, 29, 30, 31) for d in (-1, 0, 1))]
    edges += [k * 2**29 + d for k in range(1, 8) for d in (-1, 0, 1)]
    pairs = np.array(list(itertools.product(edges, edges)), dtype=np.int64)
    pairs = np.concatenate([pairs, np.random.default_rng(0).integers(0, 2**32, (20_000, 2))])
    first, second = pairs.astype(np.longdouble).T
    radius = np.sqrt(-2 * np.log1p(((2 * first + 1) - 2**33) / np.longdouble(2**33)))
    angle = second / np.longdouble(2**32) * 8 * np.arctan(np.longdouble(1))
    truth = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    ours = noise.gaussian(torch.from_numpy(pairs)).numpy()
    assert np.finfo(np.longdouble).nmant >= 63
    assert (np.abs(ours - truth) < 1e-15 * (1 + np.abs(truth))).all()
    assert np.abs(ours).max() == pytest.approx(math.sqrt(-2 * math.log(2.0**-33)))


def test_uniform_noise_is_symmetric_and_exact():
    word = torch.tensor([0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1, 123456789])
    v = noise.uniform(word)
    assert torch.equal(v, -noise.uniform(2**32 - 1 - word))
    assert ((v + 1) * 2**31 - 0.5).tolist() == word.tolist()


def golden_lines() -> list[list[str]]:
    return [line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]


def test_there_are_48_golden_lines():
    assert len(golden_lines()) >= 48


@pytest.mark.parametrize("line", golden_lines(), ids=lambda line: line[0])
def test_golden_noise(line):
    """The same address gives the same noise in every release: these digests are added to, never edited."""
    _, law, seed, site, call, step, sample, member, width, drop, digest = line
    width, drop, step = int(width), int(drop), int(step)
    key = site_key(int(seed), site_hash(site, int(call)), noise_ops.PURPOSES[law])
    tensors = torch.tensor(signed(key)), torch.tensor(int(member)), torch.tensor([int(sample)])
    numbers = np.uint64(key), np.uint64(int(member)), np.array([int(sample)], np.uint64)
    if law == "exact":
        both = (
            noise.exact_keep(*tensors, step, width, drop).numpy(),
            noise_cpu.exact_keep_rows(*numbers, step, width, drop),
        )
    else:
        reference = (noise.gaussian_noise if law == "gaussian" else noise.uniform_noise)(
            *tensors, step, width
        )
        rounded = np.empty(width)
        # The kernel gives 1 + spread noise; 2**-60 of the noise would be lost to the 1, so it is compared rounded.
        noise_cpu.noise_rows(
            np.ones(width), rounded, *numbers, step, 1.0, law == "gaussian", width, 0, -(-width // 4)
        )
        assert np.array_equal(rounded, 1 + reference.numpy()[0])
        both = (reference.numpy(),)
    for values in both:
        assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == digest


def test_every_exact_mask_is_equally_likely(monkeypatch):
    """All orders that four different words can have: each set of two is dropped in 4 of the 24."""
    orders = torch.tensor(list(itertools.permutations([5, 6, 7, 2**32 - 1])))
    zero = torch.tensor(0)
    monkeypatch.setattr(noise, "words", lambda *_: orders)
    keep = noise.exact_keep(zero, zero, zero, 0, 4, 2)
    monkeypatch.setattr(
        noise_cpu, "word_rows", lambda out, *_: out.__setitem__(slice(None), orders.numpy().reshape(-1))
    )
    ids = np.zeros(24, np.uint64)
    assert np.array_equal(noise_cpu.exact_keep_rows(0, 0, ids, 0, 4, 2), keep.numpy())
    patterns, counts = keep.unique(dim=0, return_counts=True)
    assert len(patterns) == 6
    assert counts.tolist() == [4] * 6


def test_of_equal_words_the_first_goes_first(monkeypatch):
    zero, row = torch.tensor(0), np.array([9, 4, 9, 4, 4], np.uint32)
    monkeypatch.setattr(noise, "words", lambda *_: torch.from_numpy(row.astype(np.int64))[None])
    monkeypatch.setattr(noise_cpu, "word_rows", lambda out, *_: out.__setitem__(slice(None), row))
    for drop, kept in ((1, [0, 2, 3, 4]), (2, [0, 2, 4]), (4, [2])):
        assert noise.exact_keep(zero, zero, zero, 0, 5, drop)[0].nonzero().flatten().tolist() == kept
        kernel = noise_cpu.exact_keep_rows(0, 0, np.zeros(1, np.uint64), 0, 5, drop)
        assert kernel[0].nonzero()[0].tolist() == kept


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_an_exact_mask_drops_what_it_says_and_keeps_the_sum(p):
    y = in_context("exact", torch.ones(50, 10, dtype=torch.float64), p)
    assert ((y == 0).sum(dim=1) == round(p * 10)).all()
    torch.testing.assert_close(y.sum(dim=1), torch.full((50,), 10.0 if p < 1 else 0.0, dtype=torch.float64))


def test_each_position_is_dropped_at_the_exact_rate():
    """False alarms: 30 positions at 1e-9 / 30 each."""
    rows = 20_000
    dropped = (in_context("exact", torch.ones(rows, 30), 0.3) == 0).sum(dim=0)
    assert all(stats.binomtest(int(count), rows, 0.3).pvalue > 1e-9 / 30 for count in dropped)


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_the_noise_has_its_law(law):
    """Kolmogorov and Smirnov at each of 8 positions, the correlation of each two: false alarms 36 times 1e-10."""
    rows, p = 20_000, 0.4
    y = in_context(law, torch.ones(rows, 8, dtype=torch.float64), p).numpy()
    eps = (y - 1) / math.sqrt(p / (1 - p))
    expected = stats.norm() if law == "gaussian" else stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))
    assert all(stats.kstest(eps[:, i], expected.cdf).pvalue > 1e-10 for i in range(8))
    for i, j in itertools.combinations(range(8), 2):
        # Squares too: the two values of a pair share their radius, and must be independent all the same.
        assert stats.pearsonr(eps[:, i], eps[:, j]).pvalue > 0.5e-10
        assert stats.pearsonr(eps[:, i] ** 2, eps[:, j] ** 2).pvalue > 0.5e-10


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.1, 0.5, 0.95])
def test_alpha_dropout_keeps_mean_and_variance_exactly(p):
    """From its three values (kept 0, kept 1, dropped) and the rate in use: no chance is left."""
    x = torch.cat([torch.zeros(1, 1 << 12), torch.ones(1, 1 << 12)]).double()
    y = in_context("alpha", x, p)
    q = 1 / float(survivor_scale(torch.tensor(p, dtype=torch.float64)))
    with dk.masks(seed=1):
        keep = F.dropout(torch.ones_like(x), p) > 0
    a_and_b, b = y[1][keep[1]][0], y[0][keep[0]][0]
    a = a_and_b - b
    dropped = y[~keep][0] if (~keep).any() else b - a * 1.7580993408473766
    assert float(q * b + (1 - q) * dropped) == pytest.approx(0, abs=1e-12)
    assert float(q * (a * a + b * b) + (1 - q) * dropped**2) == pytest.approx(1, rel=1e-12)
    assert torch.allclose(y[keep], a * x[keep] + b, rtol=0, atol=1e-12)
    assert torch.allclose(y[~keep], dropped, rtol=0, atol=1e-12)


def test_alpha_dropout_keeps_what_selu_gives():
    """Mean and variance of 2**20 SELU activations, each within 6 standard errors: false alarms 4e-9."""
    x = torch.selu(torch.randn(1 << 10, 1 << 10, generator=torch.Generator().manual_seed(0)).double())
    x = (x - x.mean()) / x.std(correction=0)
    y = in_context("alpha", x, 0.2)
    error = 6 / math.sqrt(y.numel())
    assert abs(y.mean()) < error * y.std()
    assert abs((y**2).mean() - 1) < error * (y**2).std()


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_alpha_dropout_has_torchs_values(p):
    x = torch.full((1, 4096), 0.7)
    ours, theirs = in_context("alpha", x, p), nn.functional.alpha_dropout(x, p, training=True)
    torch.testing.assert_close(ours.unique(), theirs.unique(), rtol=1e-6, atol=1e-6)


def test_alpha_dropouts_mask_is_dropouts():
    x = torch.full((5, 6, 7), 3.0)
    for law, shared in (("alpha", ()), ("feature alpha", (2,))):
        with dk.masks(seed=1):
            keep = F.dropout(torch.ones(5, 6, 7), 0.3, shared=shared) > 0
        assert torch.equal(in_context(law, x) > 0, keep)


def test_laws_have_bits_of_their_own():
    x = torch.ones(1, 1000, dtype=torch.float64)
    gaussian, uniform, exact, bernoulli = (
        in_context("gaussian", x), in_context("uniform", x), in_context("exact", x), in_context("alpha", x)
    )  # fmt: skip
    for one, other in itertools.combinations((gaussian, uniform, exact, bernoulli), 2):
        assert abs(np.corrcoef(one[0], other[0])[0, 1]) < 6 / math.sqrt(1000)


@every_law
@given(data=st.data())
@settings(max_examples=25)
def test_a_row_keeps_its_noise_in_any_batch(law, data):
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=8)))
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    cut = data.draw(st.integers(0, len(ids)))
    x = torch.rand(len(ids), 3, 5)
    together = in_context(law, x, samples=ids, step=3)
    assert torch.equal(in_context(law, x[order], samples=ids[order], step=3), together[order])
    assert torch.equal(in_context(law, x[:cut], samples=ids[:cut], step=3), together[:cut])
    whole = in_context(law, x)
    assert torch.equal(in_context(law, x[cut:], row_offset=cut), whole[cut:])


@every_law
def test_a_member_is_one_function_of_the_row(law):
    x = torch.rand(1, 40, 3).expand(9, 40, 3)
    y = in_context(law, x, member=4)
    assert torch.equal(y, y[:1].expand(9, 40, 3))
    assert not torch.equal(y, in_context(law, x, member=5))


@pytest.mark.parametrize("law", LAWS)
def test_shared_dims_have_one_value(law):
    x = torch.ones(3, 4, 5)
    for shared in [(1,), (2,), (-1,), (1, 2), (0,)]:
        y = in_context(law, x, shared=shared)
        for dim in shared:
            assert torch.equal(y, y.select(dim, 0).unsqueeze(dim).expand_as(y))
    with pytest.raises(ShapeError, match="-3 to 2"):
        in_context(law, x, shared=(3,))


@every_law
def test_threads_change_nothing(law):
    x, before = torch.rand(700, 1001), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(in_context(law, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@every_law
def test_a_rate_of_zero_and_no_training_are_the_identity(law):
    x = torch.rand(3, 4, 5)
    assert torch.equal(in_context(law, x, 0.0), x)
    assert ALL[law](x, 0.5, training=False) is x
    zero = torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(in_context(law, x, zero), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("p", [1.0, torch.tensor(1.0)])
def test_infinite_variance_is_refused(law, p):
    with pytest.raises(ProbabilityError, match="without the 1"):
        LAWS[law](torch.ones(2, 3), p)
    with pytest.raises(ProbabilityError, match="without the 1"):
        dk.nn.GaussianDropout(1.0)


@every_law
@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, "half"])
def test_a_wrong_rate_is_said(law, p):
    with pytest.raises(ProbabilityError, match=r"p=.* was given"):
        ALL[law](torch.ones(2, 3), p)


def test_one_site_draws_once():
    x = torch.ones(2, 3)
    with dk.masks(seed=0):
        F.gaussian_dropout(x, site="here")
        with pytest.raises(AddressError, match="drawn twice"):
            F.gaussian_dropout(x, site="here")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_law
def test_derivatives_of_first_and_second_order(law):
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    f = lambda x: in_context(law, x) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("law", LAWS)
def test_nothing_is_kept_for_backward(law):
    x = torch.randn(64, 128, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LAWS[law](x, 0.5).sum().backward()
    assert sum(kept) <= 3  # key, member, p


@every_law
def test_vmap_over_members_and_rates_is_a_loop(law):
    x = torch.randn(6, 10, 2, dtype=torch.float64, requires_grad=True)
    batched = torch.func.vmap(lambda m: in_context(law, x, member=m))(torch.arange(4))
    loop = torch.stack([in_context(law, x, member=m) for m in range(4)])
    assert torch.equal(batched, loop)
    torch.testing.assert_close(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (batched, loop)))
    rates = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    batched = torch.func.vmap(lambda p: in_context(law, x, p))(rates)
    torch.testing.assert_close(batched, torch.stack([in_context(law, x, p) for p in rates.tolist()]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@every_law
def test_a_compiled_law_is_the_eager_one(law):
    torch._dynamo.reset()
    x = torch.randn(5, 6, 2, dtype=torch.float64, requires_grad=True)
    run = torch.compile(lambda x: ALL[law](x, 0.3), fullgraph=True, backend="aot_eager")
    for fields in ({"step": 1}, {"step": 2}, {"member": 3}, {"samples": torch.tensor([4, 0, 1, 9, 2])}):
        results = []
        for f in (run, lambda x: ALL[law](x, 0.3)):
            with dk.masks(seed=1, **fields):
                y = f(x)
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_the_operators_keep_torchs_contract(law):
    rate, zero = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0)
    arguments = (torch.rand(4, 5), zero, zero, rate, None, 0, 0, [1], law)
    torch.library.opcheck(torch.ops.dropkit.noise.default, arguments)
    where = torch.tensor([7, 0, 1, 0, 0])
    x = torch.rand(4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.dropkit.noise_at.default, (x, where, rate, [1], law))


LAYERS = [
    (dk.nn.AlphaDropout, nn.AlphaDropout),
    (dk.nn.FeatureAlphaDropout, nn.FeatureAlphaDropout),
    (dk.nn.GaussianDropout, nn.Dropout),
]


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_layers_take_torchs_place(ours, theirs):
    layer, twin = ours(0.3, inplace=True), theirs(0.3, inplace=True)
    assert repr(layer).partition("(")[2] == repr(twin).partition("(")[2]
    assert layer.state_dict() == {}
    x = torch.ones(3, 40, 2)
    assert layer(x) is x
    assert not torch.equal(x, torch.ones(3, 40, 2))
    x = torch.ones(3, 40, 2)
    assert layer.eval()(x) is x
    with dk.masks(seed=0, member=1):
        assert not torch.equal(ours(0.3).eval()(x), x)


@every_law
def test_empty_and_0d_inputs_pass(law):
    assert ALL[law](torch.ones(0, 3), 0.5).shape == (0, 3)
    assert ALL[law](torch.ones(3, 0), 0.5).shape == (3, 0)
    assert ALL[law](torch.tensor(2.0), 0.5).shape == ()


def test_what_an_exact_mask_drops_is_zero_whatever_it_was():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]]).repeat(50, 1).requires_grad_()
    y = in_context("exact", x, 0.5)
    assert ((y == 0).sum(dim=1) == 2).all()


@pytest.mark.parametrize("layer", [dk.nn.GaussianDropout, dk.nn.UniformDropout, dk.nn.ExactDropout])
def test_noise_of_one_rate_says_so_when_given_many(layer):
    rates = torch.tensor([0.1, 0.2, 0.3])
    with pytest.raises(ProbabilityError, match=r"shape \(3,\) was given; this noise has one rate"):
        layer(rates)
    one = layer(torch.tensor(0.2))
    with dk.masks(seed=0):
        y = one(torch.ones(2, 3))
    with dk.masks(seed=0):
        torch.testing.assert_close(y, layer(0.2)(torch.ones(2, 3)))
    with pytest.raises(ProbabilityError, match="one rate"):
        dk.functional.gaussian_dropout(torch.ones(2, 3), rates)
