"""Rules that are approximations: what bends. The input is taken as Gaussian, or the curve as a line or a parabola."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dropkit.committee.moments.call import GAUSSIAN, Call, tangent
from dropkit.committee.moments.gaussian import through, two_slopes
from dropkit.committee.moments.lines import mean_of, product
from dropkit.committee.moments.values import Spread, spelled


def rectified(call: Call) -> Spread:
    """ReLU and LeakyReLU, in closed form."""
    call.leave(GAUSSIAN)
    below = float(call.argument(1, "negative_slope", 0.01)) if call.name == "leaky_relu" else 0.0
    return two_slopes(call.args[0], below)


def curved(call: Call) -> Spread:
    """Any other function of each element by itself, by quadrature."""
    x, rest = call.args[0], call.args[1:]
    if not isinstance(x, Spread) or any(isinstance(a, Spread) for a in rest):
        return tangent(call)
    call.leave(GAUSSIAN)
    return through(lambda value: call.run(value, *rest), x)


def softmax_rule(call: Call) -> Spread:
    """softmax over one dim."""
    return softmax(call.args[0], call.args[1], call)


def softmax(x: Spread, dim: int, call: Call) -> Spread:
    """softmax: its curve to second order for the mean, its slope for the variance.

    With s = softmax(mean): each factor f -> s (f - <f>), <f> = sum of s f, and
    mean = s + s / 2 * sum over sources of ((f - <f>)**2 - <(f - <f>)**2>)
    """
    call.leave("slope at the mean, and the curve to second order for the mean")
    x = spelled(x, call.account)
    s = x.mean.softmax(dim)
    bend = torch.zeros_like(s)
    factors = {}
    for key, factor in x.factors.items():
        apart = factor - (s * factor).sum(dim=dim if dim < 0 else dim + 1, keepdim=True)
        factors[key] = s * apart
        bend = bend + apart.square().sum(dim=0)
    own = None
    if x.own is not None:
        total = (s.square() * x.own).sum(dim=dim, keepdim=True)
        bend = bend + x.own * (1 - 2 * s) + total
        own = s.square() * (x.own * (1 - 2 * s) + total)
    bend = bend - (s * bend).sum(dim=dim, keepdim=True)
    # To second order a probability can leave [0, 1]; it must not come out so.
    mean = (s + 0.5 * s * bend).clamp_min(0.0)
    return Spread(mean / mean.sum(dim=dim, keepdim=True), factors, own, True)


def normalised(call: Call) -> Spread:
    """LayerNorm: its slope at the mean, with the expected square of what it divides by.

    r**-2 = mean over D of (c**2 + V) + eps,  c = mean - its average:  noise makes the divisor larger.
    """
    x, shape = call.args[0], call.args[1]
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    if not isinstance(x, Spread) or isinstance(weight, Spread) or isinstance(bias, Spread):
        return tangent(call)
    call.leave("slope at the mean, with the expected divisor")
    eps = float(call.argument(4, "eps", 1e-5))
    x = spelled(x, call.account)
    dims = tuple(range(-len(shape), 0))
    c = x.mean - x.mean.mean(dims, keepdim=True)
    shift = torch.zeros_like(x.mean)
    for factor in x.factors.values():
        shift = shift + (factor - factor.mean(dims, keepdim=True)).square().sum(dim=0)
    count = math.prod(shape)
    if x.own is not None:
        shift = shift + x.own * (1 - 1 / count)
    r = ((c.square() + shift).mean(dims, keepdim=True) + eps).rsqrt()
    unit = c * r

    def slope(f: Tensor) -> Tensor:
        f = f - f.mean(dims, keepdim=True)
        return r * (f - unit * (unit * f).mean(dims, keepdim=True))

    own = None
    if x.own is not None:
        sums = [(x.own * unit**k).sum(dims, keepdim=True) / count**2 for k in range(3)]
        across = sums[0] + 2 * unit * sums[1] + unit.square() * sums[2]
        own = r.square() * (x.own * (1 - 2 / count - 2 * unit.square() / count) + across)
        own = own.clamp_min(0.0)
    y = x.each(slope, unit, own, True)
    y = y if weight is None else y.times(weight)
    return y if bias is None else replace(y, mean=y.mean + bias)


def attention(call: Call) -> Spread:
    """scaled_dot_product_attention as its parts: a product, a softmax, a product."""
    q, k, v = call.args[:3]
    mask = call.argument(3, "attn_mask")
    causal = bool(call.argument(5, "is_causal", False))
    if call.kwargs.get("enable_gqa") or isinstance(mask, Spread) or call.argument(4, "dropout_p", 0.0):
        return tangent(call)
    width = mean_of(q).shape[-1]
    scale = call.kwargs.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    turned = (
        Spread(
            k.mean.mT, {i: f.mT for i, f in k.factors.items()}, None if k.own is None else k.own.mT, k.mixed
        )
        if isinstance(k, Spread)
        else k.mT
    )
    scores: Spread | Tensor
    if isinstance(q, Spread) or isinstance(turned, Spread):
        scores = product(q, turned, call)
        scores = scores.times(torch.tensor(scale, dtype=scores.mean.dtype))
    else:
        scores = q @ turned * scale
    L, S = mean_of(scores).shape[-2:]
    hidden = torch.ones(L, S, dtype=torch.bool, device=mean_of(scores).device).triu(1) if causal else None
    if mask is not None and mask.dtype == torch.bool:
        hidden, mask = ~mask, None
    if not isinstance(scores, Spread):
        scores = scores if mask is None else scores + mask
        scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
        return product(scores.softmax(-1), v, call)
    if mask is not None:
        scores = replace(scores, mean=scores.mean + mask)
    if hidden is not None:
        seen = ~hidden
        scores = replace(
            scores.times(seen.to(scores.mean.dtype)), mean=scores.mean.masked_fill(hidden, -math.inf)
        )
    return product(softmax(scores, -1, call), v, call)
