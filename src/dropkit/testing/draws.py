"""Checks of chance itself: seeds and generators, and that no draw knows of another."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.testing.registry import check
from dropkit.testing.subject import NotApplicable, Subject, expect

LAGS = (1, 2, 3, 4, 8, 16, 32)


@check()
def manual_seed_reproduces(s: Subject) -> None:
    """torch.manual_seed gives the same masks again."""
    expect(s.seeded, "it does not")


@check()
def fork_rng_restores(s: Subject) -> None:
    """What is drawn inside torch.random.fork_rng changes nothing after it."""
    if not s.seeded:
        raise NotApplicable("torch.manual_seed does not fix its masks")
    call, shape, masks = s.build(), s.wide(), []
    for drawn_within in (False, True):
        torch.manual_seed(5)
        s.mask(call=call, shape=shape)
        if drawn_within:
            with torch.random.fork_rng(devices=[]):
                s.mask(call=call, shape=shape)
        masks.append(s.mask(call=call, shape=shape))
    expect(torch.equal(*masks), "the next mask is another one")


@check()
def generator_state_can_be_put_back(s: Subject) -> None:
    """torch.get_rng_state and set_rng_state resume the masks where they were, after an odd number of elements too."""
    if not s.seeded:
        raise NotApplicable("torch.manual_seed does not fix its masks")
    call, shape = s.build(), s.wide()
    s.mask(call=call, shape=s.lattice(3, 7))
    state = torch.get_rng_state()
    first = s.mask(call=call, shape=shape)
    torch.set_rng_state(state)
    expect(torch.equal(first, s.mask(call=call, shape=shape)), "another mask came")


@check()
def two_calls_differ(s: Subject) -> None:
    """Each call draws a mask of its own, from one layer and from two."""
    call, shape = s.build(), s.wide()
    first = s.mask(call=call, shape=shape)
    expect(not torch.equal(first, s.mask(call=call, shape=shape)), "one layer drew the same mask twice")
    expect(not torch.equal(first, s.mask(shape=shape)), "a second layer drew the mask of the first")


def judge_pairs(s: Subject, keep: Tensor, axis: int, decisions: int, what: str) -> None:
    """Count both-dropped among disjoint pairs along an axis, at several distances: Binomial(pairs, p**2)."""
    dropped = ~(keep if axis == 0 else keep.T)
    for lag in LAGS:
        if 2 * lag <= len(dropped):
            blocks = dropped[: len(dropped) // (2 * lag) * 2 * lag].unflatten(0, (-1, 2, lag))
            both = blocks[:, 0] & blocks[:, 1]
            s.judge(int(both.sum()), both.numel(), s.p**2, decisions, f"{what} {lag} apart, both dropped")


@check(statistical=True)
def neighbours_in_a_row_are_independent(s: Subject) -> None:
    """Whether an element is dropped says nothing about the elements 1, 2, 3, 4, 8, 16 or 32 further."""
    judge_pairs(s, s.field(4096, 256), 1, len(LAGS), "elements")


@check(statistical=True)
def rows_are_independent(s: Subject) -> None:
    """Whether an element is dropped in one row says nothing about the same element in other rows."""
    judge_pairs(s, s.field(4096, 256), 0, len(LAGS), "rows")


@check(statistical=True)
def calls_are_independent(s: Subject) -> None:
    """Successive calls of one layer have independent masks."""
    call, shape = s.build(), s.wide()
    judge_pairs(s, torch.stack([s.mask(call=call, shape=shape).flatten() for _ in range(64)]), 0, 6, "calls")


@check(statistical=True)
def seeds_are_independent(s: Subject) -> None:
    """Neighbouring seeds have independent masks."""
    call, shape, masks = s.build(), s.wide(), []
    for seed in range(64):
        with s.fixed(seed):
            masks.append(s.mask(call=call, shape=shape).flatten())
    judge_pairs(s, torch.stack(masks), 0, 6, "seeds")


@check(statistical=True)
def row_totals_vary_as_they_should(s: Subject) -> None:
    """The number of dropped elements in a row is binomial: neither fixed nor clumped."""
    keep = s.field(4096, 256)
    width = keep.shape[1]
    totals = (~keep).sum(dim=1)
    # The chance to lie within half a standard deviation of the mean, summed exactly.
    low, high = (
        width * s.p - 0.5 * (width * s.p * (1 - s.p)) ** 0.5,
        width * s.p + 0.5 * (width * s.p * (1 - s.p)) ** 0.5,
    )
    k = torch.arange(width + 1, dtype=torch.float64)
    log_choose = (
        torch.lgamma(torch.tensor(width + 1.0)).double() - torch.lgamma(k + 1) - torch.lgamma(width - k + 1)
    )
    weights = (
        log_choose + k * torch.tensor(s.p).double().log() + (width - k) * torch.tensor(1 - s.p).double().log()
    ).softmax(0)
    near = float(weights[(k >= low) & (k <= high)].sum())
    inside = int(((totals >= low) & (totals <= high)).sum())
    s.judge(inside, len(totals), near, 1, "rows with a total within half a standard deviation of the mean")
