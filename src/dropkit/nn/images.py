"""Channel dropout: whole feature maps of an image, a sequence or a volume."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dropkit.errors import OptionError
from dropkit.nn.axes import SPACE, check_axes, image_axes
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer


def channel_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    space: int | None = None,
    channels_last: bool = False,
    unbatched: bool = False,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop whole feature maps.

    y[b, c] = x[b, c] * keep[b, c] / (1 - p),    keep[b, c] ~ Bernoulli(1 - p)

    Neighbouring pixels say nearly the same, so that dropping single ones takes little away. The mask does not depend
    on where the channels stand. Nothing is guessed: torch's dropout2d reads three dims as (N, C, L) and its dropout1d
    two dims as (C, L); here the layout is said.

    Args:
        x: (B, C, *space), or (B, *space, C) with `channels_last`; floating or complex.
        p: chance to drop a map, in [0, 1]; a number, or a tensor that broadcasts against x and is constant in space.
        training: False gives x back.
        inplace: write the result into x.
        space: how many dims of space x has, 1 to 3; None takes all dims after B and C.
        channels_last: the channels are the last dim. (torch's memory format of that name needs no word: the dims
            stay, and so does the format.)
        unbatched: take one row without its dim B as well, (C, *space).
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape, dtype, device and memory format of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: another number of dims.
        OptionError: whole numbers, or unbatched input without `space`.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Tompson et al. 2015, arXiv:1411.4280 (there called SpatialDropout).

    Example:
        >>> import torch, dropkit as dk
        >>> with dk.masks(seed=1):
        ...     dk.functional.channel_dropout(torch.ones(1, 3, 2), p=0.5, space=1)
        tensor([[[2., 2.],
                 [2., 2.],
                 [0., 0.]]])
    """
    _check_space(space, unbatched)
    if space is None:
        check_axes(x, "B ... C" if channels_last else "B C ...")
    else:
        batched, single = (image_axes(space, channels_last, word) for word in (True, False))
        hint = (
            "" if unbatched else f"One row without its batch, ({', '.join(single.split())}): unbatched=True."
        )
        check_axes(x, batched, *([single] if unbatched else []), hint=hint)
        if x.ndim == space + 1:
            row = channel_dropout(
                x[None], p, training, inplace, space=space, channels_last=channels_last, site=site, owner=owner
            )  # fmt: skip
            return x if inplace or not training else row[0]
    shared = range(1, x.ndim - 1) if channels_last else range(2, x.ndim)
    return dropout(x, p, training, inplace, shared=shared, site=site, owner=owner)


def _check_space(space: int | None, unbatched: bool) -> None:
    if space not in (None, *SPACE):
        raise OptionError(f"space={space!r} was given; 1, 2 or 3 dims of space are known, or None for any.")
    if space is None and unbatched:
        raise OptionError(
            "unbatched=True was given without space; how many dims of space there are must then be said."
        )


class _ChannelLayer(RateLayer):
    """Parent of the layers around `channel_dropout`; never built itself."""

    space: ClassVar[int | None]

    def __init__(
        self, p: Rate = 0.5, inplace: bool = False, *, channels_last: bool = False, unbatched: bool = False
    ) -> None:
        super().__init__(p, inplace)
        _check_space(self.space, unbatched)
        self.channels_last = channels_last
        self.unbatched = unbatched

    def forward(self, x: Tensor) -> Tensor:
        """Maps -> the same shape; the identity while nobody asks for noise."""
        return channel_dropout(
            x, self.rate, self.active, self.inplace, space=self.space, channels_last=self.channels_last,
            unbatched=self.unbatched, site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """As torch's layers show it, and what else was said."""
        said = [name for name in ("channels_last", "unbatched") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *(f"{name}=True" for name in said)])


class ChannelDropout(_ChannelLayer):
    """Whole maps of (B, C, *space) with any number of dims of space; the layer around `channel_dropout`.

    It does what torch.nn.Dropout2d does with every number of dims, (N, C, L) and (N, C) included.

    Args:
        p: chance to drop a map, in [0, 1].
        inplace: write the result into the input.
        channels_last: the input is (B, *space, C).
    """

    space = None


class ChannelDropout1d(_ChannelLayer):
    """Drop-in for torch.nn.Dropout1d on (B, C, L); the layer around `channel_dropout`.

    Args:
        p: chance to drop a map, in [0, 1].
        inplace: write the result into the input.
        channels_last: the input is (B, L, C).
        unbatched: take (C, L) as well, as torch does.
    """

    space = 1


class ChannelDropout2d(_ChannelLayer):
    """Drop-in for torch.nn.Dropout2d on (B, C, H, W); the layer around `channel_dropout`.

    Three dims are refused, where torch reads (C, H, W) as (N, C, L): say `unbatched`, or take `ChannelDropout1d`.

    Args:
        p: chance to drop a map, in [0, 1].
        inplace: write the result into the input.
        channels_last: the input is (B, H, W, C).
        unbatched: take (C, H, W) as well.
    """

    space = 2


class ChannelDropout3d(_ChannelLayer):
    """Drop-in for torch.nn.Dropout3d on (B, C, D, H, W); the layer around `channel_dropout`.

    Args:
        p: chance to drop a map, in [0, 1].
        inplace: write the result into the input.
        channels_last: the input is (B, D, H, W, C).
        unbatched: take (C, D, H, W) as well, as torch does.
    """

    space = 3
