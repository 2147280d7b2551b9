"""Alpha dropout: for networks of SELUs, whose mean 0 and variance 1 it keeps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dropkit.errors import check_probability
from dropkit.masks.philox import LANE_VALUES, survivor_scale
from dropkit.nn.features import dropout
from dropkit.nn.layer import RateLayer

# SELU's scale times alpha (Klambauer et al. 2017, eq. 14): it goes to minus this, and so does what is dropped.
SATURATION = 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717


def _kept(p: float) -> float:
    """1 - the rate that dropout really uses, in plain numbers (see `philox.threshold`)."""
    if 0 < p < 1 / LANE_VALUES:
        return 1 - round(p * 2.0**32) / 2.0**32
    return 1 - round(p * LANE_VALUES) / LANE_VALUES


def _alpha(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    feature: bool,
    site: str | None,
    owner: object | None,
) -> Tensor:
    """Alpha dropout by way of dropout: y = dropped + D((a x + b - dropped) / scale), D being dropout."""
    if not isinstance(p, Tensor):
        p = check_probability(p)
    if not training:
        return x
    shared = range(2, x.ndim) if feature else ()
    if not isinstance(p, Tensor) and p in (0.0, 1.0):
        # Nothing is dropped, or all of it: then no a and b keep the variance, and the mean alone is kept, as in torch.
        return dropout(x, p, True, inplace, shared=shared, site=site, owner=owner)
    if isinstance(p, Tensor):
        scale = survivor_scale(p.to(torch.float64))
        kept: Any = torch.where(scale > 0, 1 / scale, 0.0)
        a: Any = torch.where(kept > 0, (kept * (1 + (1 - kept) * SATURATION**2)) ** -0.5, 0.0)
        kept, a = kept.to(x.dtype), a.to(x.dtype)
    else:
        kept = _kept(p)
        a = 1 / math.sqrt(kept * (1 + (1 - kept) * SATURATION**2))
    b = a * (1 - kept) * SATURATION
    dropped = b - a * SATURATION
    # a x + b - dropped = a (x + SATURATION)
    result = dropout((x + SATURATION) * (a * kept), p, shared=shared, site=site, owner=owner) + dropped
    return x.copy_(result) if inplace else result


def alpha_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Set elements to SELU's lower limit, then shift and stretch so that mean 0 and variance 1 are kept.

    y = a (x keep - s (1 - keep)) + b,    keep[b, e] ~ Bernoulli(1 - p),    s = 1.7581
    a = ((1 - p) (1 + p s**2))**-1/2,     b = a p s

    The mask is that of `dropout` at the same address, and p in a and b is the rate that it really uses.
    The default of `training` is True, as for every dropkit function; torch.nn.functional.alpha_dropout has False.
    With p = 1 the result is 0, as in torch.

    Args:
        x: (B, *features), any floating dtype, of mean 0 and variance 1; dim 0 counts the rows.
        p: chance to drop, in [0, 1]; a number, or a 0-d tensor (one for each network under torch.func.vmap).
        training: False gives x back.
        inplace: write the result into x.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *features), dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Klambauer et al. 2017, NeurIPS, section 3, "New dropout technique" (there q is the chance to keep).
    """
    return _alpha(x, p, training, inplace, False, site, owner)


def feature_alpha_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Alpha dropout of whole feature maps: one mask element for each row and channel.

    y as in `alpha_dropout`, with keep[b, c] the same for all of space.

    Args:
        x: (B, C, *space), any floating dtype, of mean 0 and variance 1.
        p, training, inplace, site, owner: as in `alpha_dropout`.

    Returns:
        (B, C, *space), dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Klambauer et al. 2017, NeurIPS; whole maps as in Tompson et al. 2015, arXiv:1411.4280.
    """
    return _alpha(x, p, training, inplace, True, site, owner)


class AlphaDropout(RateLayer):
    """Drop-in for torch.nn.AlphaDropout; the layer around `alpha_dropout`.

    Args:
        p: chance to drop, in [0, 1].
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape; the identity while nobody asks for noise."""
        return alpha_dropout(x, self.rate, self.active, self.inplace, site=self.site, owner=self)


class FeatureAlphaDropout(RateLayer):
    """Drop-in for torch.nn.FeatureAlphaDropout; the layer around `feature_alpha_dropout`.

    Args:
        p: chance to drop, in [0, 1].
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> the same shape; the identity while nobody asks for noise."""
        return feature_alpha_dropout(x, self.rate, self.active, self.inplace, site=self.site, owner=self)
