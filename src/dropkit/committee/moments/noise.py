"""Rules of the masks themselves, and of averages that may be taken before a mask as well as after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.committee.moments.call import Call, operator_name
from dropkit.committee.moments.values import Spread, masked
from dropkit.masks.noise_ops import exact_count
from dropkit.masks.philox import survivor_scale


@dataclass(frozen=True, slots=True)
class Deferred:
    """x and the shared noise on it, where only an average is taken, over values that share an element.

    noise * average of x is the same, and leaves each value with noise of its own.
    """

    x: Spread
    variance: Tensor
    alive: Tensor


def masked_each(x: Spread, noise: Deferred, call: Call) -> Spread:
    """x with an element of the noise for each value."""
    return masked(x, noise.variance, noise.alive, x.mean.shape, call.account, call.site)


def dropout_rule(call: Call) -> Spread | Deferred:
    """Bernoulli masks: mean kept exactly, as the kernels scale by the rate that is really used."""
    x, _, p, shared = call.args
    x = x if isinstance(x, Spread) else Spread(x, {})
    scale = survivor_scale(p)
    if p.ndim == 0 and _average_follows(call, x.mean, shared):
        return Deferred(x, scale - 1, scale > 0)
    return masked(x, scale - 1, scale > 0, _noise_shape(x.mean, shared), call.account, call.site)


def noise_rule(call: Call) -> Spread | Deferred:
    """Gaussian and uniform noise of variance p / (1 - p); an exact count of dropped elements."""
    x, _, p, shared, law = call.args
    x = x if isinstance(x, Spread) else Spread(x, {})
    shape = _noise_shape(x.mean, shared)
    n = math.prod(shape)
    alive = torch.tensor(True)
    if law != "exact":
        if _average_follows(call, x.mean, shared):
            return Deferred(x, p / (1 - p), alive)
        return masked(x, p / (1 - p), alive, shape, call.account, call.site)
    drop = exact_count(float(p), n)
    if drop == n:
        return masked(x, torch.zeros(()), ~alive, shape, call.account, call.site)
    variance = torch.tensor(drop / (n - drop), dtype=torch.float64)
    touched = bool(x.factors) or x.own is not None
    if n == 1 or touched or not call.account.room(n):
        call.account.leave(call.site, "a fixed count of dropped elements: taken as independent masks")
        return masked(x, variance, alive, shape, call.account, call.site)
    # Of n elements just so many drop: their noise sums to 0, each pair has correlation -1 / (n - 1).
    even = torch.eye(n, dtype=x.mean.dtype, device=x.mean.device) - 1 / n
    factor = (even * math.sqrt(float(variance) * n / (n - 1))).reshape(n, *shape) * x.mean
    return Spread(x.mean, {call.account.born(n): factor})


def _average_follows(call: Call, x: Tensor, shared: Sequence[int]) -> bool:
    """Whether all that happens next is averaging over all the dims along which the noise is constant."""
    users = list(call.node.users)
    constant = {d % x.ndim for d in shared} - {0}
    if len(users) != 1 or not constant or math.prod(_noise_shape(x, shared)) == x.numel():
        return False
    user = users[0]
    name, dims = operator_name(user.target), user.args[1:2]
    if name in ("mean", "sum") and dims and isinstance(dims[0], list | tuple):
        return {int(str(d)) % x.ndim for d in dims[0]} == constant
    wanted = dims[0] if dims else None
    one = wanted == 1 or (isinstance(wanted, list | tuple) and all(w == 1 for w in wanted))
    if name not in ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d") or not one:
        return False
    return constant == set(range(x.ndim - int(name[-2]), x.ndim))


def _noise_shape(x: Tensor, shared: Sequence[int]) -> list[int]:
    return [1 if dim == 0 or dim in shared else size for dim, size in enumerate(x.shape)]
