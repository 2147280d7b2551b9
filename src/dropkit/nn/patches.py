"""Patch dropout: a sequence of patches is really made shorter, so that what follows costs less."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.nn.gaussian import exact_dropout
from dropkit.nn.layer import Rate, RateLayer


def _check(x: Tensor, prefix_tokens: int) -> None:
    _check_prefix(prefix_tokens)
    if x.ndim < 2 or x.shape[1] < prefix_tokens:
        raise ShapeError(
            f"x of shape {tuple(x.shape)} was given; allowed: (B, N, D) with at least the "
            f"{prefix_tokens} prefix tokens in N. For images, flatten space into N: x.flatten(2).transpose(1, 2)."
        )


def _check_prefix(prefix_tokens: int) -> None:
    if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int) or prefix_tokens < 0:
        raise OptionError(
            f"prefix_tokens={prefix_tokens!r} was given; how many tokens stay is a whole number from 0 on."
        )


def kept_patches(
    x: Tensor,
    p: float = 0.5,
    *,
    prefix_tokens: int = 1,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Which patches of each row stay: all rows keep equally many, and every set of that size is equally likely.

    K = max(1, N - round(p N))    of the N patches behind the prefix

    Args:
        x: (B, prefix + N, ...); only its shape and device matter.
        p: share to drop, in [0, 1].
        prefix_tokens: tokens in front that are no patches and always stay, such as a class token.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, K) int64, rising in each row, counted from the first patch on.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: fewer tokens than the prefix has.
        OptionError: a prefix below 0.
        AddressError: the same address was drawn twice in one `masks` context.
    """
    _check(x, prefix_tokens)
    count = x.shape[1] - prefix_tokens
    drop = min(round(check_probability(p) * count), count - 1) if count else 0
    ones = torch.ones(x.shape[0], count, device=x.device)
    if drop == 0:  # every patch stays; the address is drawn all the same, so that later calls keep theirs
        keep = exact_dropout(ones, 0.0, site=site, owner=owner)
    else:
        keep = exact_dropout(ones, drop / count, site=site, owner=owner)
    # Stable: of what stays, the order is kept.
    order = (keep != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return order[:, : count - drop]


def patch_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    prefix_tokens: int = 1,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Leave patches out of a sequence: (B, prefix + N, D) becomes (B, prefix + K, D).

    y[b] = x[b, prefix] followed by x[b, i] for the K indices i of `kept_patches`, in their order

    Nothing is scaled: attention and means over tokens do not grow with their number. Add position embeddings before.

    Args:
        x: (B, prefix + N, D), or with further dims; any dtype.
        p, prefix_tokens, site, owner: as in `kept_patches`.
        training: False gives x back, all of it.

    Returns:
        (B, prefix + K, D), dtype and device of x.

    Raises:
        As `kept_patches`.

    Source: Liu et al. 2022, arXiv:2208.07220.

    Example:
        >>> import torch, dropkit as dk
        >>> x = torch.arange(9.0).view(1, 9, 1)  # a class token and eight patches
        >>> with dk.masks(seed=0):
        ...     dk.functional.patch_dropout(x, p=0.5).flatten()
        tensor([0., 1., 4., 5., 6.])
    """
    _check(x, prefix_tokens)
    check_probability(p)
    if not training:
        return x
    return take_patches(
        x, kept_patches(x, p, prefix_tokens=prefix_tokens, site=site, owner=owner), prefix_tokens
    )


def take_patches(x: Tensor, kept: Tensor, prefix_tokens: int = 1) -> Tensor:
    """The prefix and the patches of these indices; also for what goes along with x, such as masks or positions.

    Args:
        x: (B, prefix + N, ...).
        kept: (B, K) int64, of `kept_patches`.
        prefix_tokens: tokens in front that stay.

    Returns:
        (B, prefix + K, ...).
    """
    index = (kept + prefix_tokens).reshape(*kept.shape, *[1] * (x.ndim - 2)).expand(*kept.shape, *x.shape[2:])
    return torch.cat((x[:, :prefix_tokens], x.gather(1, index)), dim=1)


class PatchDropout(RateLayer):
    """Shorten sequences of patches; the layer around `patch_dropout`. Drop-in for timm's layer of this name.

    Args:
        p: share of the patches to drop, in [0, 1]: a number, or a schedule.
        prefix_tokens: tokens in front that always stay, such as a class token.
        return_indices: return (y, kept) as timm does, kept being (B, K) int64, or None where nothing was dropped.
    """

    def __init__(self, p: Rate = 0.5, prefix_tokens: int = 1, *, return_indices: bool = False) -> None:
        super().__init__(p)
        if isinstance(self.p, Tensor):
            raise OptionError(
                f"p of shape {tuple(self.p.shape)} was given; all rows keep equally many patches, so p is one number."
            )
        _check_prefix(prefix_tokens)
        self.prefix_tokens = prefix_tokens
        self.return_indices = return_indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """(B, prefix + N, D) -> (B, prefix + K, D); the identity while nobody asks for noise."""
        _check(x, self.prefix_tokens)
        if not self.active:
            return (x, None) if self.return_indices else x
        rate, prefix = float(self.rate), self.prefix_tokens
        kept = kept_patches(x, rate, prefix_tokens=prefix, site=self.site, owner=self)
        y = take_patches(x, kept, prefix)
        return (y, kept) if self.return_indices else y

    def extra_repr(self) -> str:
        """p and prefix."""
        return f"p={self.p}, prefix_tokens={self.prefix_tokens}"
