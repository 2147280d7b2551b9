"""Rules that are exact: what moves, scales, shifts and adds up values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import jvp, vmap

from dropkit.committee.moments.call import GAUSSIAN, Call, Guard, before_sum, no_rule, operator_name, tangent
from dropkit.committee.moments.gaussian import through
from dropkit.committee.moments.noise import Deferred, masked_each
from dropkit.committee.moments.values import Spread, added, multiplied
from dropkit.errors import MomentsError


def moved(call: Call) -> Any:
    """Views, copies, pieces: the elements go elsewhere, and their law with them."""
    x, rest = call.args[0], call.args[1:]
    if isinstance(x, list | tuple):  # of `getitem`
        return x[rest[0]]
    mean = call.run(x.mean, *rest)
    if not isinstance(mean, Tensor):
        owns = [None] * len(mean) if x.own is None else call.run(x.own, *rest)
        pieces = {key: vmap(lambda f: tuple(call.run(f, *rest)))(f) for key, f in x.factors.items()}
        return [
            Spread(m, {key: f[i] for key, f in pieces.items()}, own, x.mixed)
            for i, (m, own) in enumerate(zip(mean, owns, strict=True))
        ]
    own = None if x.own is None else call.run(x.own, *rest)
    copied = own is not None and mean.numel() > x.mean.numel()
    return x.each(lambda f: call.run(f, *rest), mean, own, x.mixed or copied)


def joined(call: Call) -> Spread:
    """`cat` and `stack`."""
    parts, rest = call.args[0], call.args[1:]
    spreads = [p if isinstance(p, Spread) else Spread(p, {}) for p in parts]
    keys = {key: len(f) for s in spreads for key, f in s.factors.items()}
    factors = {}
    for key, count in keys.items():
        pieces = [s.factors.get(key, s.mean.new_zeros(count, *s.mean.shape)) for s in spreads]
        factors[key] = vmap(lambda *each: call.run(list(each), *rest))(*pieces)
    own = None
    if any(s.own is not None for s in spreads):
        own = call.run([s.own if s.own is not None else torch.zeros_like(s.mean) for s in spreads], *rest)
    return Spread(call.run([s.mean for s in spreads], *rest), factors, own, any(s.mixed for s in spreads))


def straight(call: Call) -> Spread:
    """What works on each element by itself, along a straight line: scaling, shifting, BatchNorm in evaluation."""
    place = next(i for i, a in enumerate(call.args) if isinstance(a, Spread))
    x: Spread = call.args[place]

    def line(value: Tensor) -> Tensor:
        return call.run(*call.args[:place], value, *call.args[place + 1 :])

    mean, slope, *_ = jvp(line, (x.mean,), (torch.ones_like(x.mean),))
    return replace(x.times(slope), mean=mean)


def plus(call: Call) -> Spread:
    """`add` and `sub`."""
    x, y = call.args[:2]
    if not (isinstance(x, Spread) and isinstance(y, Spread)):
        return straight(call)
    by = float(call.kwargs.get("alpha", 1)) * (-1.0 if call.name.startswith("sub") else 1.0)
    if x.own is not None and y.own is not None and (x.mixed or y.mixed):
        call.leave("its two sides taken as independent of each other")
    return added(x, y, by)


def times(call: Call) -> Spread:
    """`mul`."""
    x, y = call.args[:2]
    if not (isinstance(x, Spread) and isinstance(y, Spread)):
        return straight(call)
    call.leave("product of two values that vary: " + GAUSSIAN)
    return through(torch.square, x) if x is y else multiplied(x, y)


def normalised_batch(call: Call) -> Spread:
    """BatchNorm: a straight line in evaluation mode."""
    if call.args[5]:
        raise MomentsError(
            "a BatchNorm layer looks at the batch (it has no running statistics, or is in training mode), so a row's "
            "output hangs on the other rows. Use its running statistics, or sample."
        )
    return straight(call)


def weighed(call: Call) -> Spread:
    """Linear layers and convolutions of certain weights: own variances go through the squared weights."""
    x, weight, *rest = call.args
    if isinstance(weight, Spread) and call.name == "linear" and not any(isinstance(a, Spread) for a in rest):
        return linear(x, weight, *rest, call=call)
    if not isinstance(x, Spread) or any(isinstance(a, Spread) for a in (weight, *rest)):
        return tangent(call)
    x = before_sum(x, call)
    bias, rest = (rest[0], rest[1:]) if rest else (None, [])
    own = None if x.own is None else call.run(x.own, weight.square(), None, *rest)
    return x.each(
        lambda f: call.run(f, weight, None, *rest), call.run(x.mean, weight, bias, *rest), own, True
    )


def averaged(call: Call) -> Spread:
    """`mean` and `sum`, of all or of some dims."""
    x, rest = call.args[0], call.args[1:]
    if isinstance(x, Deferred):
        return masked_each(averaged(replace(call, args=(x.x, *rest))), x, call)
    x = before_sum(x, call)
    mean = call.run(x.mean, *rest)
    own = None
    if x.own is not None:
        own = call.run(x.own, *rest)
        own = own / (x.mean.numel() // mean.numel()) if call.name == "mean" else own
    return x.each(lambda f: call.run(f, *rest), mean, own, True)


def pooled(call: Call) -> Spread:
    """Average pooling over windows of one size; others are left to `tangent`, which is exact for them too."""
    x, rest = call.args[0], call.args[1:]
    if isinstance(x, Deferred):
        return masked_each(pooled(replace(call, args=(x.x, *rest))), x, call)
    adaptive = call.name.startswith("adaptive")
    dims = int(call.name[-2])
    if adaptive:
        wanted = [rest[0]] * dims if isinstance(rest[0], int) else rest[0]
        sizes = list(zip(x.mean.shape[-dims:], wanted, strict=True))
        window = math.prod(n // w for n, w in sizes) if all(n % w == 0 for n, w in sizes) else None
    else:
        kernel = [rest[0]] * dims if isinstance(rest[0], int) else list(rest[0])
        kernel = kernel * dims if len(kernel) == 1 else kernel
        padding = call.argument(3, "padding", 0)
        padded = any(padding) if isinstance(padding, list | tuple) else padding
        plain = not padded and len(call.args) <= 4 and not call.kwargs
        window = math.prod(kernel) if plain else None
    if window is None:
        return tangent(call, exact=True)
    x = before_sum(x, call)
    own = None if x.own is None else call.run(x.own, *rest) / window
    overlaps = own is not None
    return x.each(lambda f: call.run(f, *rest), call.run(x.mean, *rest), own, overlaps)


def matrix_product(call: Call) -> Spread:
    """matmul, mm and bmm, of which one side or both vary."""
    return product(call.args[0], call.args[1], call)


def product(x: Spread | Tensor, y: Spread | Tensor, call: Call) -> Spread:
    """x @ y. Where both vary: mx @ my + sum of what they share, and each's noise times the other's mean."""
    x = before_sum(x, call) if isinstance(x, Spread) else Spread(x, {})
    y = before_sum(y, call) if isinstance(y, Spread) else Spread(y, {})
    mean = x.mean @ y.mean
    factors = {}
    both = False
    for key in x.factors.keys() | y.factors.keys():
        fx_, fy = x.factors.get(key), y.factors.get(key)
        if fx_ is not None and fy is not None:
            mean = mean + vmap(torch.matmul)(fx_, fy).sum(dim=0)
        parts = [] if fx_ is None else [vmap(lambda f: f @ y.mean)(fx_)]
        parts += [] if fy is None else [vmap(lambda f: x.mean @ f)(fy)]
        factors[key] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    x_varies, y_varies = (bool(s.factors) or s.own is not None for s in (x, y))
    own = None
    if x.own is not None:
        own = x.own @ y.mean.square()
    if y.own is not None:
        more = x.mean.square() @ y.own
        own = more if own is None else own + more
    both = x_varies and y_varies
    if both:
        call.leave("product of two values that vary: " + GAUSSIAN)
        more = x.variance @ y.variance
        own = more if own is None else own + more
    return Spread(mean, factors, own, True)


def linear(x: Spread | Tensor, weight: Spread | Tensor, bias: Tensor | None = None, *, call: Call) -> Spread:
    """x W^T + b, of which the weights vary too where a mask was written into them."""
    if isinstance(weight, Spread):
        own = None if weight.own is None else weight.own.mT
        factors = {key: f.mT for key, f in weight.factors.items()}
        y = product(x, Spread(weight.mean.mT, factors, own, weight.mixed), call)
    else:
        y = product(x, weight.T, call)
    return y if bias is None else replace(y, mean=y.mean + bias)


def chosen(call: Call) -> Any:
    """`where` with a certain condition, and the guard of a mask: where(noise == 0, 0, x * noise) is x * noise."""
    condition, yes, no = call.args
    if isinstance(condition, Guard):
        value = call.node.args[2]
        is_product = isinstance(value, fx.Node) and operator_name(value.target) == "mul"
        if yes == 0 and is_product and condition.node in call.node.args[2].all_input_nodes:  # type: ignore[union-attr]
            return no
        raise MomentsError(no_rule(call, "it decides by values that vary"))
    if isinstance(condition, Spread):
        raise MomentsError(no_rule(call, "it decides by values that vary"))
    like = mean_of(no if isinstance(no, Spread) else yes)
    yes, no = (
        s if isinstance(s, Spread) else Spread(torch.as_tensor(s, dtype=like.dtype), {}) for s in (yes, no)
    )
    here = condition.to(like.dtype)
    both = added(yes.times(here), no.times(1 - here))
    return replace(both, mean=torch.where(condition, yes.mean, no.mean))


def filled(call: Call) -> Spread:
    """masked_fill with a certain mask."""
    x, mask, value = call.args
    if isinstance(mask, Spread | Guard) or isinstance(value, Spread):
        raise MomentsError(no_rule(call, "it decides by values that vary"))
    return replace(x.times((~mask).to(x.mean.dtype)), mean=x.mean.masked_fill(mask, value))


def compared(call: Call) -> Any:
    """Comparisons: with an infinity what holds for the mean holds always; `noise == 0` guards a mask."""
    x, other = call.args[:2]
    source = call.node.args[0]
    if isinstance(x, Spread) and isinstance(other, int | float):
        if math.isinf(other):
            return call.run(x.mean, other)
        if other == 0 and call.name == "eq" and isinstance(source, fx.Node):
            return Guard(source)
    raise MomentsError(no_rule(call, "it compares values that vary"))


def mean_of(x: Spread | Tensor) -> Tensor:
    """The mean of what varies, or the number that does not."""
    return x.mean if isinstance(x, Spread) else x


def shaped(call: Call) -> Any:
    """What looks at a tensor's shape and type alone."""
    if any(isinstance(a, Guard) for a in call.args):
        if call.name == "_assert_tensor_metadata":
            return None
        raise MomentsError(no_rule(call, "its arguments are not plain tensors"))
    return call.run(*(a.mean if isinstance(a, Spread) else a for a in call.args))
