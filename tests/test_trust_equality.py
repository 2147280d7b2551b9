"""The kernels against the definition over thousands of sampled cases, and a batch cut in every way there is.

The cases are drawn from a fixed seed. DROPKIT_TRUST_SCALE=50 draws fifty times as many, as the nightly run does.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import dropkit as dk
from dropkit.masks import ops, threads
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, survivor_scale

SCALE = int(os.environ.get("DROPKIT_TRUST_SCALE", "1"))
F = dk.functional

# Sums and products of 16-bit types are rounded once, from float32.
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
RATES = (0.0, 1.0, 0.5, 0.1, 0.9, 2.0**-16, 3e-5, 1e-5, 3e-6, 2.0**-32, 0.99999)
LAYOUTS = ("contiguous", "permuted", "channels last", "strided", "narrowed", "expanded")


def definition(x, key, member, samples, step, p, shared):
    """Dropout by the reference: the mask made whole, then applied; shared dims have size 1 in it."""
    mask_shape = [1 if dim in shared else size for dim, size in enumerate(x.shape)]
    if 0 in shared or not mask_shape:
        samples = samples[:1] if not mask_shape and 0 not in shared else torch.zeros(1, dtype=torch.int64)
        width = math.prod(mask_shape)
    else:
        width = math.prod(mask_shape[1:])
    rate = torch.tensor(p, dtype=torch.float64)
    keep = bernoulli_keep(
        torch.tensor(signed(key)), torch.tensor(member), samples, step, width, rate
    ).reshape(mask_shape)
    wide = torch.promote_types(x.real.dtype if x.is_complex() else x.dtype, torch.float32)
    scaled = (x * survivor_scale(rate).to(wide).reshape(1)).to(x.dtype).reshape(x.shape)
    return torch.where(keep, scaled, torch.zeros((), dtype=x.dtype))


class Cases:
    """Draws cases, one after another, from a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)

    def number(self, bits: int) -> int:
        """Any number of so many bits; often a small one or one at an edge."""
        kind = self.draw.integers(4)
        if kind == 0:
            return int(self.draw.integers(4))
        if kind == 1:
            return (1 << bits) - 1 - int(self.draw.integers(3))
        return (
            int(self.draw.integers(1 << bits, dtype=np.uint64))
            if bits < 64
            else int.from_bytes(self.draw.bytes(8))
        )

    def choice(self, options):
        return options[int(self.draw.integers(len(options)))]

    def rate(self) -> float:
        return self.choice(RATES) if self.draw.integers(2) else float(self.draw.random())

    def shape(self, dims: int) -> tuple[int, ...]:
        if self.draw.integers(3) == 0 and dims == 2:
            return int(self.draw.integers(1, 70)), int(self.draw.integers(1, 1200))
        return tuple(
            int(self.draw.integers(0 if self.draw.integers(20) == 0 else 1, 10)) for _ in range(dims)
        )

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
        """Values that differ from each other, in one of the ways a tensor can lie in memory."""

        def fill(sizes):
            return torch.from_numpy(self.draw.normal(size=sizes)).to(dtype)

        if layout == "permuted":
            order = [int(i) for i in self.draw.permutation(len(shape))]
            return fill([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
        if layout == "channels last" and len(shape) in (4, 5):
            memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            return fill(shape).to(memory_format=memory)
        if layout == "strided" and shape:
            return fill([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
        if layout == "narrowed" and shape:
            return fill([n + 3 for n in shape])[tuple(slice(1, 1 + n) for n in shape)]
        if layout == "expanded" and shape:
            dim = int(self.draw.integers(len(shape)))
            return fill([1 if i == dim else n for i, n in enumerate(shape)]).expand(shape)
        return fill(shape)


@pytest.fixture
def many_threads(monkeypatch):
    """Small tensors are shared out to threads as large ones are."""
    monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 64)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(10 * SCALE))
def test_a_call_is_the_definition(seed, many_threads):
    """200 cases a seed: kind (shared dims) x rate x shape x layout x dtype x threads x address, inplace or not."""
    cases = Cases(seed)
    for _ in range(200):
        dims = cases.choice((0, 1, 2, 2, 3, 3, 4, 4, 5))
        shape, dtype, layout, p = cases.shape(dims), cases.choice(DTYPES), cases.choice(LAYOUTS), cases.rate()
        shared = tuple(dim for dim in range(dims) if cases.draw.random() < cases.choice((0, 0, 0.5, 1)))
        x = cases.tensor(shape, dtype, layout)
        fields = {"seed": cases.number(64), "step": cases.number(32)}
        rows = shape[0] if shape else 1
        member = cases.choice((None, None, 0, cases.number(24)))
        ids, offset = None, 0
        if cases.draw.integers(2):
            ids = torch.tensor([cases.number(40) for _ in range(rows)], dtype=torch.int64)
        else:
            offset = max(cases.number(40) - rows, 0)
        torch.set_num_threads(cases.choice((1, 2, 3)))
        name = cases.choice(("", "encoder.0", "Größe"))
        inplace = layout != "expanded" and bool(cases.draw.integers(2))
        before = x.clone()
        with dk.masks(**fields, member=member, row_offset=offset, samples=ids):
            y = F.dropout(
                x, p, shared=[cases.choice((dim, dim - dims)) for dim in shared], site=name, inplace=inplace
            )
        key = site_key(fields["seed"], site_hash(name))
        if member is not None and ids is None and dims:
            shared = (0, *shared)
        ids = torch.arange(offset, offset + rows) if ids is None else ids
        expected = definition(before, key, member or 0, ids, fields["step"], p, shared)
        what = f"{shape} {dtype} {layout} p={p} shared={shared} {fields} member={member} inplace={inplace}"
        assert torch.equal(y, expected), what
        assert y.dtype == x.dtype, what
        if inplace:
            assert y is x, what
        elif p and y.numel():
            assert y.stride() == torch.empty_like(before).stride() or layout == "expanded", what
            assert torch.equal(x, before), what


@pytest.mark.parametrize("seed", range(2 * SCALE))
def test_several_networks_at_once_are_one_after_another(seed, many_threads):
    """100 cases a seed of the operator with a leading axis: any of x, key, member, rate and ids may differ in it."""
    cases = Cases(1000 + seed)
    for _ in range(100):
        dims, networks = cases.choice((1, 2, 3, 4)), cases.choice((1, 2, 5))
        shape, dtype, step = cases.shape(dims), cases.choice(DTYPES), cases.number(32)
        shared = [dim for dim in range(dims) if cases.draw.random() < cases.choice((0, 0, 0.5, 1))]
        many = [networks if cases.draw.integers(2) else 1 for _ in range(5)]
        many[cases.choice(range(4))] = networks
        x = cases.tensor((many[0], *shape), dtype, cases.choice(LAYOUTS))
        key = [cases.number(64) for _ in range(many[1])]
        member = [cases.number(24) for _ in range(many[2])]
        p = [cases.rate() for _ in range(many[3])]
        ids = torch.tensor(
            [[cases.number(40) for _ in range(shape[0])] for _ in range(many[4])], dtype=torch.int64
        )
        torch.set_num_threads(cases.choice((1, 2, 3)))
        y = ops.dropout(
            x, torch.tensor([signed(k) for k in key]), torch.tensor(member), torch.tensor(p, dtype=torch.float64),
            ids.reshape(many[4], shape[0]), step, 0, shared,
        )  # fmt: skip
        for k in range(networks):
            one, key_k, member_k, p_k, ids_k = (
                values[k if len(values) > 1 else 0] for values in (x, key, member, p, ids)
            )
            expected = definition(one, key_k, member_k, ids_k, step, p_k, shared)
            what = f"{shape} {dtype} shared={shared} networks={many} network {k}"
            assert torch.equal(y[k], expected), what


@pytest.mark.parametrize("shape", [(3, 200_001), (130_000, 5), (700, 600), (1, 1 << 18)])
def test_large_tensors_on_any_number_of_threads(shape):
    """Where threads are really woken: every split of the work gives what the definition gives."""
    x = torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
    kept = (
        definition(torch.ones(shape), site_key(3, site_hash("a")), 0, torch.arange(shape[0]), 4, 0.3, ()) > 0
    )
    scale = survivor_scale(torch.tensor(0.3, dtype=torch.float64))
    before = torch.get_num_threads()
    try:
        for threads, dtype in itertools.product((1, 2, 3, 5), (torch.float32, torch.float64, torch.bfloat16)):
            torch.set_num_threads(threads)
            values = x.to(dtype)
            with dk.masks(seed=3, step=4):
                y = F.dropout(values, 0.3, site="a")
            wide = torch.promote_types(dtype, torch.float32)
            assert torch.equal(y, torch.where(kept, (values.to(wide) * scale.to(wide)).to(dtype), 0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(SCALE))
def test_the_gradient_has_the_mask_of_the_definition(seed):
    cases = Cases(2000 + seed)
    for _ in range(50):
        dims = cases.choice((1, 2, 3, 4))
        shape, layout, p = cases.shape(dims), cases.choice(LAYOUTS), cases.rate()
        shared = [dim for dim in range(dims) if cases.draw.integers(2)]
        x = cases.tensor(shape, torch.float32, layout).detach().requires_grad_()
        gradient = cases.tensor(shape, torch.float32, cases.choice(LAYOUTS))
        seed_, step = cases.number(64), cases.number(32)
        with dk.masks(seed=seed_, step=step):
            y = F.dropout(x, p, shared=shared, site="a")
        got = torch.autograd.grad(y, x, gradient)[0]
        key = site_key(seed_, site_hash("a"))
        assert torch.equal(got, definition(gradient, key, 0, torch.arange(shape[0]), step, p, shared))


# Whatever draws in rows: split, shuffled, chunked, each row keeps what it had.

ROWS = {
    "elements": lambda x: F.dropout(x, 0.4),
    "channels": lambda x: F.dropout(x, 0.4, shared=(2,)),
    "rows": lambda x: F.dropout(x, 0.4, shared=(1, 2)),
    "tiny rate": lambda x: F.dropout(x, 1e-5),
    "gaussian": lambda x: F.gaussian_dropout(x, 0.4),
    "uniform": lambda x: F.uniform_dropout(x, 0.4),
    "exact": lambda x: F.exact_dropout(x, 0.4),
    "alpha": lambda x: F.alpha_dropout(x, 0.4),
    "feature alpha": lambda x: F.feature_alpha_dropout(x, 0.4),
    "residual": lambda x: F.dropout_add(x, x.flip(1), 0.4),
    "rms norm": lambda x: F.dropout_add_rms_norm(x, x.flip(1), p=0.4),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
}
every_kind = pytest.mark.parametrize("kind", ROWS)


def output_and_gradient(kind, x, **fields):
    x = x.detach().clone().requires_grad_()
    with dk.masks(seed=9, step=3, **fields):
        y = ROWS[kind](x)
    y.square().sum().backward()
    return y.detach(), x.grad


def assert_same(kind, one, other):
    """Bit for bit; matrix products alone may sum in another order for another number of rows."""
    if kind == "attention":
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(one, other)


@every_kind
@pytest.mark.parametrize("by", ["offset", "samples"])
def test_every_composition_of_a_batch_of_eight(kind, by):
    """All 128 ways to cut eight rows into runs of neighbours: outputs and gradients are those of the whole."""
    x = torch.randn(8, 3, 11, dtype=torch.float64)
    first = 2**33
    whole = output_and_gradient(kind, x, row_offset=first)
    runs = {}
    for start, stop in itertools.combinations(range(9), 2):
        fields = (
            {"row_offset": first + start}
            if by == "offset"
            else {"samples": first + torch.arange(start, stop)}
        )
        runs[start, stop] = output_and_gradient(kind, x[start:stop], **fields)
    compositions = 0
    for cuts in itertools.product([False, True], repeat=7):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 8]
        for part in (0, 1):
            assert_same(kind, torch.cat([runs[run][part] for run in itertools.pairwise(edges)]), whole[part])
        compositions += 1
    assert compositions == 128


@every_kind
def test_random_splits_of_257_shuffled_rows(kind):
    draw = np.random.default_rng(257)
    x = torch.randn(257, 3, 5, dtype=torch.float64)
    whole = output_and_gradient(kind, x)
    for _ in range(6 * SCALE):
        order = torch.from_numpy(draw.permutation(257))
        cuts = np.sort(draw.choice(np.arange(1, 257), int(draw.integers(1, 12)), replace=False)).tolist()
        for start, stop in itertools.pairwise([0, *cuts, 257]):
            ids = order[start:stop]
            part = output_and_gradient(kind, x[ids], samples=ids)
            for mine, all_of_it in zip(part, whole, strict=True):
                assert_same(kind, mine, all_of_it[ids])


def train(model, optimizer, first, last, micro_batches=1):
    """Steps `first` to `last` on data that depend on the step alone; a batch may come in parts."""
    for step in range(first, last):
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        size = 12 // micro_batches
        for start in range(0, 12, size):
            with dk.masks(seed=1, step=step, row_offset=start):
                (model(x[start : start + size]).square().sum() / 12).backward()
        optimizer.step()


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        dk.nn.Dropout(0.5),
        nn.Linear(16, 16),
        dk.nn.GaussianDropout(0.3),
        nn.Linear(16, 1),
    ).double()
    dk.nn.name_sites(model)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def test_ten_steps_are_six_and_four_after_resuming():
    model, optimizer = network()
    train(model, optimizer, 0, 10)
    before, its_optimizer = network()
    train(before, its_optimizer, 0, 6)
    saved = copy.deepcopy((before.state_dict(), its_optimizer.state_dict()))
    torch.manual_seed(77)  # whatever else the resumed program has drawn
    after, new_optimizer = network()
    after.load_state_dict(saved[0])
    new_optimizer.load_state_dict(saved[1])
    train(after, new_optimizer, 6, 10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("micro_batches", [2, 3, 12])
def test_a_batch_in_parts_trains_as_a_whole(micro_batches):
    """The masks are the same; sums of gradients are rounded in another order."""
    results = []
    for parts in (1, micro_batches):
        model, optimizer = network()
        train(model, optimizer, 0, 5, parts)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_many_threads_each_with_a_context_of_its_own():
    """Sixteen callers at once get what each would get alone: contexts, keys and scratch are nobody else's."""

    def work(k):
        outputs = []
        for step in range(20):
            with dk.masks(seed=k, step=step, member=k % 3 or None):
                outputs += [
                    F.dropout(torch.ones(9, 300 + k), 0.3),
                    F.gaussian_dropout(torch.ones(9, 100), 0.3),
                ]
        return outputs

    alone = [work(k) for k in range(16)]
    barrier = threading.Barrier(16)

    def at_once(k):
        barrier.wait(timeout=60)
        return work(k)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(at_once, range(16)))
    for mine, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_many_threads_with_large_tensors():
    """Callers that share the kernels' own threads do not wait for each other for ever, nor mix their work."""

    def work(k):
        with dk.masks(seed=k):
            return F.dropout(torch.ones(300, 1500), 0.5)

    alone = [work(k) for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            together = list(pool.map(work, range(6)))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
