"""The largest of several values, by pairs (Clark 1961): max pooling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.committee.moments.call import Call, tangent
from dropkit.committee.moments.gaussian import larger
from dropkit.committee.moments.values import Spread, spelled


def max_pooled(call: Call) -> Spread:
    """max_pool1d, 2d, 3d: the places of a window are compared two by two, and each winner is taken as Gaussian."""
    x = call.args[0]
    dims = int(call.name[-2])
    kernel = _each(call.args[1], dims)
    stride = _each(call.argument(2, "stride") or kernel, dims)
    padding = _each(call.argument(3, "padding", 0), dims)
    dilation = _each(call.argument(4, "dilation", 1), dims)
    if call.argument(5, "ceil_mode", False):
        result: Spread = tangent(call)
        return result
    call.leave("the largest of Gaussian values, taken as Gaussian again")
    x = spelled(x, call.account)
    borders = [side for p in reversed(padding) for side in (p, p)]
    sizes = [n + 2 * p for n, p in zip(x.mean.shape[-dims:], padding, strict=True)]
    spans = [
        [slice(d * i, n - d * (k - 1 - i), s) for i in range(k)]
        for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    inside = F.pad(torch.ones_like(x.mean), borders) > 0
    wide = x.each(
        lambda f: F.pad(f, borders), F.pad(x.mean, borders), None if x.own is None else F.pad(x.own, borders)
    )
    places: list[Any] = [(..., *place) for place in itertools.product(*spans)]
    rivals = [(_at(wide, place), inside[place]) for place in places]
    while len(rivals) > 1:  # as a tournament, so that no rival meets a long chain of approximations
        paired = [_winner(*rivals[i], *rivals[i + 1]) for i in range(0, len(rivals) - 1, 2)]
        rivals = paired + rivals[2 * len(paired) :]
    return rivals[0][0]


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _at(x: Spread, place: Any) -> Spread:
    own = None if x.own is None else x.own[place]
    return x.each(lambda f: f[place], x.mean[place], own)


def _winner(x: Spread, x_there: Tensor, y: Spread, y_there: Tensor) -> tuple[Spread, Tensor]:
    """The larger one, where both places lie inside; else the one that does."""
    both, top = x_there & y_there, larger(x, y)

    def pick(of_top: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
        return torch.where(both, of_top, torch.where(x_there, of_x, of_y))

    factors = {}
    for key, factor in top.factors.items():
        nothing = torch.zeros_like(factor)
        factors[key] = pick(factor, x.factors.get(key, nothing), y.factors.get(key, nothing))
    nothing = torch.zeros_like(top.mean)
    own = pick(*(nothing if s.own is None else s.own for s in (top, x, y)))
    return Spread(pick(top.mean, x.mean, y.mean), factors, own, True), x_there | y_there
