"""DropBlock: whole blocks of feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.errors import OptionError, check_probability
from dropkit.masks.philox import survivor_scale
from dropkit.nn.axes import check_axes, image_axes, spatial_sizes
from dropkit.nn.block_rate import Gamma, check_rule, clipped, covers_of, gamma_at, gamma_of
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer

Scale = Literal["sample", "position", "none"]


def _hit(places: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Which elements are covered by a block that starts at one of the places; (B, C, *places) -> (B, C, *sizes)."""
    count = places
    for dim, block in enumerate(blocks, start=2):
        if block == 1:
            continue
        # A sum over a window is the difference of two running sums; whole numbers, so it is exact.
        moved = F.pad(count.movedim(dim, -1), (block, block - 1)).cumsum(-1)
        count = (moved[..., block:] - moved[..., :-block]).movedim(-1, dim)
    return count > 0


def drop_block(
    x: Tensor,
    p: float | Tensor = 0.1,
    block_size: int | Sequence[int] = 7,
    training: bool = True,
    inplace: bool = False,
    *,
    space: int = 2,
    shared_channels: bool = False,
    gamma: Gamma = "exact",
    scale: Scale = "sample",
    channels_last: bool = False,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop whole blocks of feature maps.

    z[b, c, i] ~ Bernoulli(gamma)  at each place i of a block inside the map
    keep[b, c, e] = no block with z = 1 covers e
    y[b, c, e] = x[b, c, e] * keep[b, c, e] * s

    The expected kept share of a map is 1 - p, but for the rounding of gamma to a multiple of 2**-16, which moves it by
    at most (elements of a block) / 2**17. Elements near the border are covered by fewer places and stay more often.
    The scale s is one of

    "sample"    elements / kept elements of this row, so that the mean of a row of ones is 1, as in the paper, where it
                is taken over the batch; here no row depends on its neighbours (0 where nothing stays)
    "position"  1 / P(e stays) = (1 - gamma)**-n_e: the mean over masks is x, exactly and everywhere
    "none"      1

    With a block of 1 this is `dropout`, with a block as large as the map `channel_dropout` (with "position" also
    in scale).

    Args:
        x: (B, C, *space), or (B, *space, C) with `channels_last`; floating or complex.
        p: expected share to drop, in [0, 1]; a number or a 0-d tensor.
        block_size: side of a block, or one for each dim of space; a longer one is cut to the map.
        training: False gives x back.
        inplace: write the result into x.
        space: how many dims of space x has, 1 to 3.
        shared_channels: one mask for all channels of a row; the paper found one for each to be better.
        gamma: "exact" or the paper's approximation, see `drop_block_gamma`.
        scale: "sample", "position" or "none".
        channels_last: the channels are the last dim.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape, dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: another number of dims.
        OptionError: a side below 1, an unknown rule or scale, a tensor p with dims, or whole numbers.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Ghiasi et al. 2018, arXiv:1810.12890.
    """
    check_rule(gamma)
    if scale not in get_args(Scale):
        raise OptionError(f"scale={scale!r} was given; allowed: {get_args(Scale)}.")
    _check_one(p)
    check_axes(x, image_axes(space, channels_last))
    p = p if isinstance(p, Tensor) else check_probability(p)
    sizes = tuple(x.shape[1:-1] if channels_last else x.shape[2:])
    blocks = clipped(block_size, sizes)
    if not training or x.numel() == 0:
        return x
    chance = (
        gamma_at(p.double(), sizes, blocks, gamma)
        if isinstance(p, Tensor)
        else gamma_of(p, sizes, blocks, gamma)
    )
    channels = 1 if shared_channels else x.shape[-1 if channels_last else 1]
    places = x.new_ones(
        x.shape[0],
        channels,
        *(size - block + 1 for size, block in zip(sizes, blocks, strict=True)),
        dtype=torch.float32,
    )
    starts = dropout(places, chance, site=site, owner=owner) == 0
    if not isinstance(chance, Tensor) and chance == 0:
        return x
    keep = ~_hit(starts.to(torch.float32), blocks)
    factor = _factor(keep, chance, sizes, blocks, scale)
    if channels_last:
        keep = keep.movedim(1, -1)
        factor = factor.movedim(1, -1)
    result = torch.where(_laid_like(keep, x), x * factor.to(x.dtype), 0.0)
    return x.copy_(result) if inplace else result


def _laid_like(mask: Tensor, x: Tensor) -> Tensor:
    """The mask with its dims in the order in memory that x has, which the result then takes."""
    if x.is_contiguous():
        return mask
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return mask.permute(order).contiguous().permute([order.index(dim) for dim in range(x.ndim)])


def _check_one(p: object) -> None:
    if isinstance(p, Tensor) and p.ndim:
        raise OptionError(
            f"p of shape {tuple(p.shape)} was given; blocks have one rate, a number or a 0-d tensor."
        )


def _factor(
    keep: Tensor, chance: float | Tensor, sizes: tuple[int, ...], blocks: tuple[int, ...], scale: Scale
) -> Tensor:
    """What survivors are multiplied with; broadcasts against (B, C, *space)."""
    flat = [1] * (keep.ndim - 1)
    if scale == "none":
        return torch.ones(1, *flat, device=keep.device)
    if scale == "position":
        gamma = torch.as_tensor(chance, dtype=torch.float64, device=keep.device)
        return survivor_scale(gamma) ** covers_of(sizes, blocks, gamma)[None, None]
    share = keep.flatten(1).to(torch.float64).mean(1)
    return torch.where(share > 0, 1 / share, 0.0).unflatten(0, (-1, *flat))


class _BlockLayer(RateLayer):
    """Parent of the layers around `drop_block`; never built itself."""

    space: ClassVar[int]

    def __init__(
        self,
        p: Rate = 0.1,
        block_size: int | Sequence[int] = 7,
        inplace: bool = False,
        *,
        shared_channels: bool = False,
        gamma: Gamma = "exact",
        scale: Scale = "sample",
        channels_last: bool = False,
    ) -> None:
        super().__init__(p, inplace)
        _check_one(self.p)
        self.block_size = spatial_sizes(block_size, self.space, "block_size")
        check_rule(gamma)
        if scale not in get_args(Scale):
            raise OptionError(f"scale={scale!r} was given; allowed: {get_args(Scale)}.")
        self.shared_channels = shared_channels
        self.gamma: Gamma = gamma
        self.scale: Scale = scale
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """Maps -> the same shape; the identity while nobody asks for noise."""
        return drop_block(
            x, self.rate, self.block_size, self.active, self.inplace, space=self.space,
            shared_channels=self.shared_channels, gamma=self.gamma, scale=self.scale,
            channels_last=self.channels_last, site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """p, block and what else was said."""
        return (
            f"p={self.p}, block_size={self.block_size}, shared_channels={self.shared_channels}, "
            f"gamma={self.gamma!r}, scale={self.scale!r}, inplace={self.inplace}"
        )


class DropBlock1d(_BlockLayer):
    """Blocks of (B, C, L); the layer around `drop_block`, which describes the arguments."""

    space = 1


class DropBlock2d(_BlockLayer):
    """Blocks of (B, C, H, W); the layer around `drop_block`, which describes the arguments."""

    space = 2


class DropBlock3d(_BlockLayer):
    """Blocks of (B, C, D, H, W); the layer around `drop_block`, which describes the arguments."""

    space = 3
