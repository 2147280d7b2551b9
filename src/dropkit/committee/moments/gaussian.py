"""What bends Gaussian values: curves, rectifiers, the larger of two; mean, variance and what stays of each source."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropkit.committee.moments.values import Spread, added

Array = np.ndarray[Any, Any]

POINTS = 32  # of the Gauss-Hermite rule; exact for polynomials up to degree 63


def through(function: Callable[[Tensor], Tensor], x: Spread) -> Spread:
    """An elementwise function of Gaussian x, by Gauss-Hermite quadrature.

    mean = E f(x),    each factor times E f'(x) = E f(x) z / s,    variance = E f(x)**2 - mean**2

    The factors are exact for jointly Gaussian values (Stein's lemma); what f adds beyond a straight line is `own`.
    """
    z, weight = (torch.as_tensor(a, dtype=x.mean.dtype, device=x.mean.device) for a in gauss_hermite(POINTS))
    column = (POINTS, *[1] * x.mean.ndim)
    s = x.variance.sqrt()
    values = function(x.mean + s * z.reshape(column))
    weight = weight.reshape(column)
    mean = (weight * values).sum(dim=0)
    beyond = values - mean
    pull = (weight * beyond * z.reshape(column)).sum(dim=0)
    # A value that does not vary has no slope to be had from its values, and no factors that would need one.
    slope = torch.where(s > 0, pull / s, 0.0)
    return _bent(x, mean, slope, (weight * beyond.square()).sum(dim=0))


def two_slopes(x: Spread, below: float) -> Spread:
    """x where it is positive, else below * x, of Gaussian x; ReLU with below = 0. In closed form.

    With a = mean / s, and Phi, phi the standard normal distribution and density:
    E relu = mean Phi(a) + s phi(a),   E relu' = Phi(a),
    Var relu = V ((a**2 + 1) Phi(a) + a phi(a) - (a Phi(a) + phi(a))**2),   Cov(x, relu) = V Phi(a)

    Source: Frey and Hinton 1999, Variational learning in nonlinear Gaussian belief networks; Wang and Manning 2013.
    """
    m, v = x.mean, x.variance
    s = v.sqrt()
    far = (
        30.0 if m.dtype == torch.float64 else 8.0
    )  # standard deviations, from where on only rounding would be added
    a = (m / s).nan_to_num(far).clamp(-far, far)
    above, density = torch.special.ndtr(a), torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    relu = torch.where(a.abs() >= far, m.relu(), m * above + s * density)
    unit = ((a.square() + 1) * above + a * density - (a * above + density).square()).clamp(0.0, 1.0)
    if below == 0.0:
        return _bent(x, relu, above, v * unit)
    rest = 1.0 - below
    variance = v * (below**2 + rest**2 * unit + 2 * below * rest * above)
    return _bent(x, below * m + rest * relu, below + rest * above, variance)


def _bent(x: Spread, mean: Tensor, slope: Tensor, variance: Tensor) -> Spread:
    own = (variance - slope.square() * x.explained).clamp_min(0.0)
    return x.each(lambda f: f * slope, mean, own)


def larger(x: Spread, y: Spread) -> Spread:
    """The larger of two Gaussian values.

    With d = mx - my, t**2 = Vx + Vy - 2 C, a = d / t:
    mean = my + d Phi(a) + t phi(a),   factors Phi(a) fx + Phi(-a) fy

    Source: Clark 1961, The greatest of a finite set of random variables.
    """
    shared = torch.zeros_like(x.mean)
    for key in x.factors.keys() & y.factors.keys():
        shared = shared + (x.factors[key] * y.factors[key]).sum(dim=0)
    vx, vy = x.variance.double(), y.variance.double()
    d = x.mean.double() - y.mean.double()
    t = (vx + vy - 2 * shared.double()).clamp_min(0.0).sqrt()
    a = torch.where(t > 0, d / t, torch.where(d >= 0, 30.0, -30.0)).clamp(-30.0, 30.0)
    first, density = torch.special.ndtr(a), torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    second = torch.special.ndtr(-a)
    shift = torch.where(a >= 30.0, d, torch.where(a <= -30.0, 0.0, d * first + t * density))
    # Around my: E (max - my)**2 = (vx + d**2) Phi(a) + vy Phi(-a) + d t phi(a).
    square = (vx + d.square()).mul(first) + vy * second + torch.where(a.abs() < 30.0, d * t * density, 0.0)
    variance = (square - shift.square()).clamp_min(0.0).to(x.mean.dtype)
    first, second, shift = (u.to(x.mean.dtype) for u in (first, second, shift))
    linear = added(x.times(first), y.times(second))
    mean = y.mean + shift
    own = (variance - linear.explained).clamp_min(0.0)
    return Spread(mean, linear.factors, own, mixed=True)


@lru_cache(maxsize=8)
def gauss_hermite(points: int) -> tuple[Array, Array]:
    """Points z and weights with sum of weights * f(z) = E f(Z), Z standard normal, for polynomials f."""
    z, weight = np.polynomial.hermite_e.hermegauss(points)
    return z, weight / weight.sum()
