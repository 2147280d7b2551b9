"""Checks of what a dropout does to numbers: how often it drops, what stays, the extremes of p."""

from __future__ import annotations

import math

import torch

from dropkit.testing.chance import bernstein_p_value
from dropkit.testing.registry import check
from dropkit.testing.subject import ENOUGH, MANY, Broken, NotApplicable, Subject, expect

RATES = (0.01, 0.1, 0.5, 0.9)
QUANTUM = (
    2.0**-16
)  # a rate may be rounded so far, as with 16 random bits an element, if its scale is rounded along
NARROW = 1 << 18  # rates are counted in calls of this size where one call for all would take much memory


@check(statistical=True)
def rate_is_p(s: Subject) -> None:
    """The share of dropped elements is p, at rates from 0.01 to 0.9."""
    rates = s.rates(*RATES)
    for p in rates:
        keep = s.mask(p, s.wide(MANY))
        s.judge(int((~keep).sum()), keep.numel(), p, len(rates), f"dropped at p={p}")


@check(statistical=True)
def rate_holds_at_every_position(s: Subject) -> None:
    """Each position in a row is dropped with chance p, and so is each row of a batch."""
    rows, width = 2048, 67  # a width that no block of random bits divides
    by_position = s.field(rows, width)
    by_row = s.field(width, rows)
    for what, dropped, trials in (
        ("dropped at position", (~by_position).sum(dim=0), len(by_position)),
        ("dropped in row", (~by_row).sum(dim=1), by_row.shape[1]),
    ):
        for index, count in enumerate(dropped.tolist()):
            s.judge(count, trials, s.p, 2 * width, f"{what} {index}")


@check(statistical=True)
def mean_is_as_promised(s: Subject) -> None:
    """The mean over masks is the one of its law: x itself for inverted dropout."""
    rates = s.rates(0.1, 0.9)
    x = s.values(s.wide(MANY), torch.float64)
    for p in rates:
        deviation = s.build(p)(x) - s.law.mean(x, p)
        step = (s.law.slope(p) * x + s.law.offset(p) - s.law.dropped(p)).abs()
        variance = float((p * (1 - p) * step**2).sum())
        p_value = bernstein_p_value(float(deviation.sum()), variance, float(step.max()) * max(p, 1 - p))
        if p_value < s.false_alarm / len(rates):
            raise Broken(f"at p={p} the mean is off by {float(deviation.mean()):.3g}; chance {p_value:.1g}")


@check(statistical=True)
def variance_is_as_promised(s: Subject) -> None:
    """The variance over masks is the one of its law: x² p / (1 - p) for inverted dropout."""
    rates = s.rates(0.1, 0.9)
    x = s.values(s.wide(MANY), torch.float64)
    for p in rates:
        step = (s.law.slope(p) * x + s.law.offset(p) - s.law.dropped(p)).abs()
        expected = p * (1 - p) * step**2
        excess = float(((s.build(p)(x) - s.law.mean(x, p)) ** 2 - expected).sum())
        # The square takes two values; rounding of the rate may move the sum by a little without any chance.
        variance = float((p * (1 - p) * ((1 - 2 * p) * step**2) ** 2).sum())
        beyond = max(0.0, abs(excess) - 2 * QUANTUM / (1 - p) * float(expected.sum()))
        p_value = bernstein_p_value(beyond, variance, float(step.max()) ** 2) if beyond else 1.0
        if p_value < s.false_alarm / len(rates):
            relative = excess / float(expected.sum())
            raise Broken(f"at p={p} the variance is off by {relative:+.3g} of itself; chance {p_value:.1g}")


@check()
def survivors_have_one_exact_scale(s: Subject) -> None:
    """Every kept element has one scale, that of a rate within 2^-16 of p; a dropped one is exactly its constant."""
    for p in s.rates(0.01, 0.9, *([] if s.law.name == "alpha" else [0.999])):
        x = s.values(s.wide(1 << 16), torch.float64)
        y = s.build(p)(x)
        # Alpha's constants move with the rate, which may be rounded.
        near, tolerance = (4 * QUANTUM, 1e-3) if s.law.name == "alpha" else (1e-6, 1e-9)
        dropped = (y - s.law.dropped(p)).abs() <= near * abs(s.law.dropped(p))
        scale = ((y - s.law.offset(p)) / x)[~dropped]
        expect(scale.numel() > 0, f"at p={p} none of {x.numel()} elements was kept")
        low, high = float(scale.min()), float(scale.max())
        expect(
            high - low <= tolerance * abs(high),
            f"at p={p} survivors have scales from {low:.9g} to {high:.9g}",
        )
        if s.law.name == "inverted":
            off = abs((1 - 1 / high) - p) if high else math.inf
            right = off <= QUANTUM
        else:
            right = math.isclose(high, s.law.slope(p), rel_tol=1e-4)
        expect(right, f"at p={p} survivors are scaled by {high:.7g}, not {s.law.slope(p):.7g}")


@check()
def mask_is_shared_as_stated(s: Subject) -> None:
    """The mask is constant along the dims that share it, and along no other dim."""
    call = s.build()
    keep = torch.stack([s.mask(call=call) for _ in range(64)])
    for dim, size in enumerate(s.shape):
        constant = bool((keep == keep.narrow(dim + 1, 0, 1)).all())
        if size > 1:
            expected = dim in s.shared
            expect(
                constant == expected,
                f"along dim {dim} it is {'constant' if constant else 'not constant'} in 64 draws of {s.shape}",
            )


@check()
def p_zero_is_the_identity(s: Subject) -> None:
    """At p = 0 the values come back as they were, in training too, and so do gradients."""
    if s.rate_name is None:
        raise NotApplicable("its rate cannot be set")
    x = s.values().requires_grad_()
    y = s.build(0.0)(x)
    expect(torch.equal(y, x), "values changed")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expect(torch.equal(gradient, torch.ones_like(x)), "the gradient is not 1")


@check()
def p_one_drops_everything(s: Subject) -> None:
    """At p = 1 all is zero, without NaN, and so are gradients."""
    if s.rate_name is None:
        raise NotApplicable("its rate cannot be set")
    x = s.values().requires_grad_()
    y = s.build(1.0)(x)
    expect(torch.equal(y, torch.zeros_like(x)), f"values such as {y.flatten()[0].item()} came out")
    if y.requires_grad:
        (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        expect(gradient is None or not bool(gradient.any()), "the gradient is not 0")


@check()
def rate_outside_is_refused(s: Subject) -> None:
    """A rate below 0, above 1, infinite, NaN, or in percent is refused when the layer is made or called."""
    if s.rate_name is None:
        raise NotApplicable("its rate cannot be set")
    taken = []
    for p in (-0.1, 1.1, 30.0, math.inf, math.nan):
        try:
            s.constructed(p)(s.ones())
        except Exception:  # any complaint will do
            continue
        taken.append(p)
    expect(not taken, f"accepted {taken}")


@check(statistical=True)
def tiny_rate_drops(s: Subject) -> None:
    """p = 1e-6 drops one element in a million: neither none nor one in 65 536."""
    if s.rate_name is None:
        raise NotApplicable("its rate cannot be set")
    p, calls = 1e-6, 96
    call, shape = s.build(p), s.wide(NARROW)
    elements = math.prod(shape)
    x = s.ones(shape)
    dropped = sum(elements - int(s.law.keep_of_ones(call(x), p).sum()) for _ in range(calls))
    s.judge(dropped, calls * elements, p, 1, f"dropped at p={p}")


@check()
def dropped_nan_and_infinity_are_gone(s: Subject) -> None:
    """A dropped NaN or infinity leaves nothing behind; a kept one stays visible."""
    with s.fixed():
        keep = s.wide_mask()
    for value in (math.nan, math.inf, -math.inf):
        x = torch.full_like(s.ones(s.wide()), value)
        with s.fixed():
            y = s.build()(x)
        left = y[~keep]
        expect(
            s.close(left, torch.full_like(left, s.law.dropped(s.p))),
            f"a dropped {value} became {left[0].item()}",
        )
        expect(not bool(y[keep].isfinite().any()), f"a kept {value} became finite")


@check()
def mask_ignores_the_values(s: Subject) -> None:
    """Which elements go does not depend on what they are: zeros, negatives and huge numbers have the same chance."""
    shape = s.wide()
    with s.fixed():
        keep = s.wide_mask()
    for x in (s.values(shape) - 1, s.values(shape) * 1e30, -s.ones(shape)):
        with s.fixed():
            y = s.build()(x)
        expect(s.close(y, s.law.apply(x, keep, s.p)), "other elements were dropped under the same seed")


@check()
def higher_rate_drops_more_of_the_same(s: Subject) -> None:
    """Under one seed a higher p keeps the dropped set and adds to it."""
    lower, higher = s.p / 2, s.p
    if s.rate_name is None:
        raise NotApplicable("its rate cannot be set")
    with s.fixed():
        few = ~s.mask(lower, s.wide())
    with s.fixed():
        many = ~s.mask(higher, s.wide())
    back = int((few & ~many).sum())
    expect(back == 0, f"{back} of {int(few.sum())} elements dropped at p={lower} are kept at p={higher}")
    expect(int(many.sum()) > int(few.sum()), f"no more dropped at p={higher} than at p={lower} in {ENOUGH}")
