"""Dropout inside attention: single weights, whole heads, and keys before the softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropkit.errors import ShapeError
from dropkit.masks.ops import normalise_shared
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer


def _check_heads(x: Tensor, last: str, what: str) -> None:
    if x.ndim != 4:
        raise ShapeError(
            f"{what} of shape {tuple(x.shape)} were given; allowed: (B, H, L, {last}), that is batch, heads, queries, "
            f"{'keys' if last == 'S' else 'features'}. One example alone is x[None]."
        )


def attention_dropout(
    weights: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop single attention weights after the softmax; a row of them then sums to 1 in the mean only.

    y[b, h, i, j] = w[b, h, i, j] * keep[b, h, i, j] / (1 - p)

    The masks are those of `scaled_dot_product_attention` at the same address, which does not hold the weights.

    Args:
        weights: (B, H, L, S).
        p, training, inplace, site, owner: as in `dropout`.
        shared: dims along which one mask serves all, such as (1,): one for all heads.

    Returns:
        (B, H, L, S).

    Raises:
        ShapeError: weights have other than four dims.
        ProbabilityError, AddressError: as in `dropout`.

    Source: Vaswani et al. 2017, arXiv:1706.03762 (in the published code; the text names residual dropout only).
    """
    _check_heads(weights, "S", "attention weights")
    return dropout(weights, p, training, inplace, shared=shared, site=site, owner=owner)


def head_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop whole attention heads.

    y[b, h] = x[b, h] * keep[b, h] / (1 - p),    keep[b, h] ~ Bernoulli(1 - p)

    The mean is kept exactly. (The paper divides by the share of heads that a pass really kept, which makes heads depend
    on each other.) With chance p**H an example loses all heads, and its attention is 0.

    Args:
        x: (B, H, L, D), what the heads give, before they are joined; weights (B, H, L, S) do as well.
        p, training, inplace, site, owner: as in `dropout`.

    Returns:
        The same shape.

    Raises:
        ShapeError: x has other than four dims.
        ProbabilityError, AddressError: as in `dropout`.

    Source: Zhou et al. 2020, arXiv:2004.13342 ("DropHead").
    """
    _check_heads(x, "D", "heads")
    return dropout(x, p, training, inplace, shared=(2, 3), site=site, owner=owner)


def drop_key(
    scores: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Hide keys from queries before the softmax, so that the weights that are left still sum to 1.

    s[b, h, i, j] = scores[b, h, i, j] where keep[b, h, i, j], else -inf

    A query never loses all its keys: where all n that it sees (score above -inf) would fall, all stay. So a key stays
    with chance 1 - p + p**n, and p = 1 changes nothing. Nothing is scaled; the mean of the weights is not kept.

    Args:
        scores: (B, H, L, S), floating; -inf marks what a mask hides already.
        p: chance to hide a key, in [0, 1]; a number, or a 0-d tensor.
        training: False gives the scores back.
        shared: dims along which one mask serves all: (2,) hides a key from all queries of a head, (1, 2) from those
            of all heads.
        site, owner: as in `dropout`.

    Returns:
        (B, H, L, S), for a softmax over the last dim.

    Raises:
        ShapeError: scores have other than four dims.
        ProbabilityError, AddressError: as in `dropout`.

    Source: Li et al. 2023, CVPR, "DropKey for Vision Transformer".

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=0):
        ...     dk.functional.drop_key(torch.zeros(1, 1, 2, 4), 0.5).softmax(dim=-1)
        tensor([[[[0.3333, 0.3333, 0.0000, 0.3333],
                  [0.0000, 0.0000, 1.0000, 0.0000]]]])
    """
    _check_heads(scores, "S", "scores")
    dims = normalise_shared(shared, scores.ndim)
    sizes = [1 if dim in dims else size for dim, size in enumerate(scores.shape)]
    noise = dropout(scores.new_ones(sizes), p, training, shared=dims, site=site, owner=owner)
    if not training:
        return scores
    fewer = torch.where(noise == 0, -torch.inf, scores)
    nothing_left = (fewer == -torch.inf).all(dim=-1, keepdim=True)
    return torch.where(nothing_left, scores, fewer)


class AttentionDropout(RateLayer):
    """Layer around `attention_dropout`; the identity while nobody asks for noise.

    Args:
        p: chance to drop a weight, in [0, 1].
        inplace: write the result into the input.
        shared: dims along which one mask serves all, such as (1,): one for all heads.
    """

    def __init__(self, p: Rate = 0.5, inplace: bool = False, shared: Sequence[int] = ()) -> None:
        super().__init__(p, inplace)
        self.shared = normalise_shared(shared, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, L, S) -> the same shape."""
        return attention_dropout(
            x, self.rate, self.active, self.inplace, shared=self.shared, site=self.site, owner=self
        )


class HeadDropout(RateLayer):
    """Layer around `head_dropout`; the identity while nobody asks for noise.

    Args:
        p: chance to drop a head, in [0, 1].
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, L, D) -> the same shape."""
        return head_dropout(x, self.rate, self.active, self.inplace, site=self.site, owner=self)


class DropKey(RateLayer):
    """Layer around `drop_key`, to stand between scores and softmax; the identity while nobody asks for noise.

    Args:
        p: chance to hide a key, in [0, 1].
        shared: dims along which one mask serves all; (2,): all queries of a head.
    """

    def __init__(self, p: Rate = 0.5, shared: Sequence[int] = ()) -> None:
        super().__init__(p)
        self.shared = normalise_shared(shared, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, L, S) scores -> the same shape."""
        return drop_key(x, self.rate, self.active, shared=self.shared, site=self.site, owner=self)

    def extra_repr(self) -> str:
        """p and the shared dims."""
        return f"p={self.p}, shared={self.shared}"
