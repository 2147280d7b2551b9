"""A number that hangs on chance, by its first two moments, and what elementary steps make of them.

    x[e] = mean[e] + sum over s of factor[s, e] * source[s] + rest[e],     variance[e] = sum of factor ** 2 + own[e]

Sources are uncorrelated, of mean 0 and variance 1: elements of masks, so that what one element of a mask multiplies
in many places stays correlated, through branches and residual additions too. The rest has variance `own` and is taken
as independent from element to element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import vmap


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and variance of a tensor, with the part of its chance that is known by its sources.

    Attributes:
        mean: (*shape).
        factors: number of a family of sources -> (n, *shape), how strongly each of its n sources acts here.
        own: (*shape), variance of what is taken as independent between the elements; None where there is none.
        mixed: whether that is not quite so, as the elements (or this value and another one) share some chance.
    """

    mean: Tensor
    factors: Mapping[int, Tensor]
    own: Tensor | None = None
    mixed: bool = False

    @property
    def explained(self) -> Tensor:
        """(*shape), the variance that comes from the sources."""
        total = torch.zeros_like(self.mean)
        for factor in self.factors.values():
            total = total + factor.square().sum(dim=0)
        return total

    @property
    def variance(self) -> Tensor:
        """(*shape), all of it."""
        return self.explained if self.own is None else self.explained + self.own

    def each(
        self, change: Callable[[Tensor], Tensor], mean: Tensor, own: Tensor | None, mixed: bool | None = None
    ) -> Spread:
        """Another spread, whose factors are `change`d one source at a time."""
        factors = {key: vmap(change)(factor) for key, factor in self.factors.items()}
        return Spread(mean, factors, own, self.mixed if mixed is None else mixed)

    def times(self, by: Tensor) -> Spread:
        """The same law times a number that is certain, which may have more elements."""
        mean = self.mean * by
        factors = {key: _lead(f, mean.ndim) * by for key, f in self.factors.items()}
        own = None if self.own is None else self.own * by.square()
        return Spread(mean, factors, own, self.mixed or mean.numel() > self.mean.numel())


@dataclass(slots=True)
class Account:
    """What one pass of moments has used and left out.

    Attributes:
        full: whether every chance gets sources, so that all correlations are carried.
        limit: most sources of one row.
        sources: sources so far.
        families: families of sources so far.
        left: operator -> the approximation that was made there.
    """

    full: bool
    limit: int
    sources: int = 0
    families: int = 0
    left: dict[str, str] = field(default_factory=dict)

    def room(self, sources: int) -> bool:
        """Whether so many more sources may be carried."""
        return self.sources + sources <= self.limit

    def born(self, sources: int) -> int:
        """The number of a new family of so many sources."""
        self.sources += sources
        self.families += 1
        return self.families

    def leave(self, where: str, what: str) -> None:
        """Note an approximation, once for each kind."""
        self.left.setdefault(where, what)


def spelled(x: Spread, account: Account) -> Spread:
    """The same law with the rest of each element as a source of its own, where all correlations are to be carried."""
    if x.own is None or not account.full:
        return x
    count = x.mean.numel()
    if not account.room(count):
        account.leave("correlations", f"more than {account.limit} sources; the rest is taken as independent")
        return x
    rest = x.own.clamp_min(0).sqrt().flatten().diag().reshape(count, *x.mean.shape)
    return Spread(x.mean, {**x.factors, account.born(count): rest}, None)


def masked(
    x: Spread, variance: Tensor, alive: Tensor, shape: Sequence[int], account: Account, where: str
) -> Spread:
    """x times noise of mean 1, of which one element serves all of x along the dims where `shape` is 1.

    y = x * (1 + c * source),   variance of y = V + c**2 * (mean**2 + V)

    The part c * mean * source is carried; c * source * (x - mean) is uncorrelated with all else.

    Args:
        x: what it multiplies.
        variance: c**2, broadcastable against x; for a mask p / (1 - p).
        alive: bool, broadcastable; False where p = 1 and all is dropped.
        shape: of the noise.
        account: what is noted where sources run out.
        where: the site, for that note.
    """
    here = alive.to(x.mean)
    x = x.times(here)
    variance = (variance * alive).to(x.mean).expand(x.mean.shape)
    groups = math.prod(shape)
    alone = groups == x.mean.numel()
    if alone or not account.room(groups):
        if not alone:
            account.leave(where, f"{groups} shared mask elements are too many; taken as one for each value")
        added_noise = variance * (x.mean.square() + x.variance)
        own = added_noise if x.own is None else x.own + added_noise
        return Spread(x.mean, x.factors, own, x.mixed or not alone)
    c = variance.sqrt()
    one = torch.eye(groups, dtype=c.dtype, device=c.device).reshape(groups, *shape)
    factors = {**x.factors, account.born(groups): one * (c * x.mean)}
    rest = None if x.own is None else x.own * (1 + variance)
    carried = sum(len(f) for f in x.factors.values())
    if not carried:
        return Spread(x.mean, factors, rest, x.mixed)
    if account.room(groups * carried):
        for factor in x.factors.values():  # within a group, c * source * (x - mean) is correlated as x is
            family = (one[:, None] * (c * factor)).flatten(0, 1)
            factors[account.born(len(family))] = family
        return Spread(x.mean, factors, rest, x.mixed)
    account.leave(
        where, "shared noise on values that vary already: what it adds to their spread is independent"
    )
    second = variance * x.explained
    return Spread(x.mean, factors, second if rest is None else rest + second, mixed=True)


def added(x: Spread, y: Spread, by: float = 1.0) -> Spread:
    """x + by * y; what both have from the same source adds up before it is squared."""
    mean = x.mean + by * y.mean
    factors = {}
    for key in x.factors.keys() | y.factors.keys():
        parts = [scale * s.factors[key] for s, scale in ((x, 1.0), (y, by)) if key in s.factors]
        reach = [_lead(part, mean.ndim) for part in parts]
        total = reach[0] if len(reach) == 1 else reach[0] + reach[1]
        factors[key] = total.expand(len(total), *mean.shape)
    own: Tensor | None = None
    for rest, scale in ((x.own, 1.0), (y.own, by**2)):
        if rest is not None:
            own = (scale * rest if own is None else own + scale * rest).expand(mean.shape)
    wider = any(s.own is not None and s.mean.numel() < mean.numel() for s in (x, y))
    return Spread(mean, factors, own, x.mixed or y.mixed or wider)


def multiplied(x: Spread, y: Spread) -> Spread:
    """x * y, element by element, of jointly Gaussian values (independent ones: of any law).

    mean = mx my + C,   factors mx fy + my fx,   variance mx**2 Vy + my**2 Vx + 2 mx my C + Vx Vy + C**2
    """
    shared = torch.zeros((), dtype=x.mean.dtype, device=x.mean.device)
    for key in x.factors.keys() & y.factors.keys():
        ndim = max(x.mean.ndim, y.mean.ndim)
        shared = shared + (_lead(x.factors[key], ndim) * _lead(y.factors[key], ndim)).sum(dim=0)
    linear = added(x.times(y.mean), y.times(x.mean))
    own = x.variance * y.variance + shared.square()
    own = own if linear.own is None else linear.own + own
    return Spread(x.mean * y.mean + shared, linear.factors, own, x.mixed or y.mixed)


def _lead(factor: Tensor, ndim: int) -> Tensor:
    """(n, *shape) with dims of size 1 after the sources, so that shapes meet from the right."""
    return factor.reshape(len(factor), *[1] * (ndim - factor.ndim + 1), *factor.shape[1:])
