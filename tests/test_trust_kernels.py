"""Kernels that no function shows whole: runs that begin anywhere in a mask, and work shared out to threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropkit as dk
from dropkit.masks import runs_cpu
from dropkit.masks import threads as threads_of
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep, lanes, survivor_scale, threshold

RATES = [0.0, 0.1, 0.5, 0.99999, 1.0, 2.0**-16, 1e-5, 2.0**-17]


def kept_runs(key, member, ids, firsts, step, length, p):
    """The definition of runs: of each row's mask, the elements from `first` on."""
    count = int(firsts.max()) + length
    keep = bernoulli_keep(
        torch.tensor(int(np.uint64(key).view(np.int64))), torch.tensor(member),
        torch.from_numpy(ids.view(np.int64)), step, count, torch.tensor(p, dtype=torch.float64),
    ).numpy()  # fmt: skip
    return np.concatenate([keep[u, first : first + length] for u, first in enumerate(firsts)])


def run_addresses(seed, length):
    draw = np.random.default_rng(seed)
    runs = int(draw.integers(1, 4))
    ids = draw.integers(0, 2**40, runs).astype(np.uint64)
    firsts = draw.integers(0, 3000, runs) * draw.integers(0, 2, runs)
    key, member, step = draw.integers(0, 2**63), int(draw.integers(0, 2**24)), int(draw.integers(0, 2**32))
    return draw, (ids, firsts), (np.uint64(2 * int(key) + 1), np.uint64(member), step), length * runs


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("length", [1, 7, 8, 300, 1500])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_runs_are_pieces_of_the_mask(p, length, dtype):
    for seed in range(4):
        draw, (ids, firsts), (key, member, step), size = run_addresses([seed, length], length)
        x = draw.normal(size=size).astype(dtype)
        x[:: max(size // 3, 1)] = np.nan  # dropped, it must be 0
        rate = torch.tensor(p, dtype=torch.float64)
        t, fine = (int(number) for number in threshold(rate))
        y = x.copy()
        runs_cpu.drop_runs(y, length, ids, firsts, key, member, step, t, fine)
        keep = kept_runs(key, int(member), ids, firsts, step, length, p)
        assert np.array_equal(y, np.where(keep, x, 0), equal_nan=True)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize(("width", "rows"), [(1, 5), (7, 3), (64, 20), (1100, 2)])
def test_softmax_runs_are_the_formula(p, width, rows):
    length = width * rows
    for seed in range(3):
        draw, (ids, firsts), (key, member, step), size = run_addresses([seed, width], length)
        weight, gradient = draw.random(size), draw.normal(size=size)
        delta = draw.normal(size=size // width)
        rate = torch.tensor(p, dtype=torch.float64)
        t, fine = (int(number) for number in threshold(rate))
        scale = float(survivor_scale(rate))
        w, g = weight.copy(), gradient.copy()
        runs_cpu.drop_softmax_runs(w, g, delta, width, scale, length, ids, firsts, key, member, step, t, fine)
        keep = kept_runs(key, int(member), ids, firsts, step, length, p)
        expected = weight * (np.where(keep, gradient * scale, 0) - np.repeat(delta, width))
        np.testing.assert_allclose(g, expected, rtol=1e-14, atol=0)
        assert np.array_equal(w, np.where(keep, weight, 0))


@pytest.mark.parametrize("name", ["dropout", "sum", "layer norm", "rms norm"])
def test_at_the_smallest_rate_of_one_lane_zeros_alone_fall(name):
    """t = 1, forward and backward; the rows are looked for in which a lane is 0."""
    key = torch.tensor(signed(site_key(1, site_hash("a"))))
    lane = lanes(key, torch.tensor(0), torch.arange(10_000), 0, 40)
    rows = (lane == 0).any(dim=1).nonzero().flatten()[:4]
    falls = lane[rows] == 0
    assert falls.shape == (4, 40)
    x = torch.linspace(1, 2, 160).reshape(4, 40).requires_grad_()
    with dk.masks(seed=1, samples=rows):
        y = BORDERS[name](x, 2.0**-16)
    y, total = y if isinstance(y, tuple) else (y, y)
    assert torch.equal(total == 0, falls)
    gradient = torch.autograd.grad((y * torch.linspace(-1, 3, 160).sin().reshape(4, 40)).sum(), x)[0]
    assert torch.equal(gradient == 0, falls)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.99])
def test_an_exact_mask_is_exact_in_every_one_of_many_rows(p):
    """A border that is off by one place in a row now and then, as a half-sorted row gives, shows in many rows alone."""
    width = 700
    with dk.masks(seed=1):
        y = dk.functional.exact_dropout(torch.ones(3000, width), p)
    assert ((y == 0).sum(dim=1) == round(p * width)).all()


F = dk.functional
BORDERS = {
    "dropout": lambda x, p: F.dropout(x, p, site="a"),
    "shared": lambda x, p: F.dropout(x[..., None].expand(4, 40, 3), p, shared=(2,), site="a").sum(-1),
    "sum": lambda x, p: F.dropout_add(x, torch.zeros_like(x), p, site="a"),
    "layer norm": lambda x, p: F.dropout_add_layer_norm(x, torch.zeros_like(x), p=p, site="a", prenorm=True),
    "rms norm": lambda x, p: F.dropout_add_rms_norm(x, torch.zeros_like(x), p=p, site="a", prenorm=True),
    # Values that are units show the weights themselves, (4, 5, 8).
    "attention": lambda x, p: (
        F.scaled_dot_product_attention(
            torch.zeros(4, 5, 2), torch.zeros(4, 8, 2), torch.eye(8).expand(4, 8, 8), dropout_p=p, site="a"
        ).flatten(1)
        * x
    ),
}


@pytest.mark.parametrize("name", BORDERS)
def test_a_lane_at_the_threshold_stays_and_one_below_falls(name):
    """Where `<` and `<=` differ, one element in 65 536: rates are chosen that put a lane at the border."""
    key = torch.tensor(signed(site_key(1, site_hash("a"))))
    lane = lanes(key, torch.tensor(0), torch.arange(4), 0, 40)
    for row, k in ((0, 0), (1, 7), (2, 8), (2, 21), (3, 39)):
        for above in (0, 1):
            x = torch.linspace(1, 2, 160).reshape(4, 40).requires_grad_()
            p = (int(lane[row, k]) + above) / 65536
            with dk.masks(seed=1):
                y = BORDERS[name](x, p)
            y, total = y if isinstance(y, tuple) else (y, y)
            assert bool(total[row, k] != 0) == (above == 0)
            gradient = torch.autograd.grad((y * torch.linspace(-1, 3, 160).reshape(4, 40)).sum(), x)[0]
            assert bool(gradient[row, k] != 0) == (above == 0)


@settings(max_examples=100)
@given(
    units=st.integers(1, 3000),
    grain=st.sampled_from([1, 2, 64, 128]),
    threads=st.integers(1, 7),
    elements=st.sampled_from(
        [
            1,
            threads_of.PARALLEL_ELEMENTS - 1,
            threads_of.PARALLEL_ELEMENTS,
            3 * threads_of.PARALLEL_ELEMENTS,
            1 << 30,
        ]
    ),
)
def test_every_unit_is_worked_on_once(units, grain, threads, elements):
    done, seen = [], set()

    def run(start, stop):
        seen.add(threading.get_ident())
        done.append((start, stop))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        threads_of.in_parallel(run, units, elements, grain)
    finally:
        torch.set_num_threads(before)
    done.sort()
    assert [start for start, _ in done] == [0, *(stop for _, stop in done[:-1])]
    assert done[-1][1] == units
    assert all(start < stop and start % grain == 0 for start, stop in done)
    # As many shares as there are threads asked for, units to share, and elements worth the waking of one.
    worth = min(threads, elements // threads_of.PARALLEL_ELEMENTS + 1, max(units // grain, 1))
    assert len(done) <= worth
    assert len(done) > worth // 2
    assert len(done) > 1 or worth == 1
    if worth == 1:
        assert seen == {threading.get_ident()}


def test_a_mistake_in_another_thread_is_raised_here():
    def run(start, stop):
        if start > 0:
            raise ArithmeticError("of a share")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ArithmeticError, match="of a share"):
            threads_of.in_parallel(run, 1000, 1 << 30)
    finally:
        torch.set_num_threads(before)
