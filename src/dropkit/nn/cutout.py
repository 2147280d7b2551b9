"""Cutout: one square of each image is covered."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.errors import check_probability
from dropkit.nn.axes import check_axes, check_size, image_axes
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer
from dropkit.nn.uniform import part_of, uniform_numbers


def cutout(
    x: Tensor,
    size: int,
    p: float | Tensor = 1.0,
    training: bool = True,
    *,
    fill: float = 0.0,
    channels_last: bool = False,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Cover one square of each image, in all its channels.

    y[b, :, i, j] = fill  for c_b - floor(size / 2) <= (i, j) < c_b + ceil(size / 2),  else x[b, :, i, j]

    The centre c_b is uniform over the pixels, so that part of a square may lie outside, as in the paper. Nothing is
    scaled: `fill` is to be the mean of the data. The expected covered share is p times, over the two sides,
    the mean length of the square inside; for a square of 16 on an image of 32 x 32 it is 0.1914, not 0.25.

    Args:
        x: (B, C, H, W), or (B, H, W, C) with `channels_last`; floating or complex.
        size: side of the square, in pixels.
        p: chance that an image gets a square, in [0, 1]; a number or a 0-d tensor.
        training: False gives x back.
        fill: what covers.
        channels_last: the channels are the last dim.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape, dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: another number of dims.
        OptionError: a size below 1, or whole numbers.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: DeVries and Taylor 2017, arXiv:1708.04552.
    """
    check_size(size)
    check_axes(x, image_axes(2, channels_last))
    p = p if isinstance(p, Tensor) else check_probability(p)
    if not training:
        return x
    rows, (height, width) = x.shape[0], x.shape[1:3] if channels_last else x.shape[2:4]
    gate = dropout(x.new_ones(rows, 1, 1, dtype=torch.float32), p, site=part_of(site, "gate"), owner=owner)
    centre = uniform_numbers((rows, 2), device=x.device, site=part_of(site, "centre"), owner=owner)
    covered = gate == 0
    for place, length, axis in ((centre[:, :1], height, -1), (centre[:, 1:], width, -2)):
        # Rounding to the dtype of a number just below the length must not put the centre outside.
        first = (place * length).floor().clamp(max=length - 1) - size // 2
        pixel = torch.arange(length, device=x.device)
        covered = covered & ((first <= pixel) & (pixel < first + size)).unsqueeze(axis)  # (B, H, W)
    return torch.where(covered.unsqueeze(-1 if channels_last else 1), fill, x)  # keeps the memory format


class Cutout(RateLayer):
    """One square of each image is covered; the layer around `cutout`.

    Args:
        size: side of the square, in pixels.
        p: chance that an image gets one, in [0, 1].
        fill: what covers.
        channels_last: the input is (B, H, W, C).
    """

    def __init__(self, size: int, p: Rate = 1.0, *, fill: float = 0.0, channels_last: bool = False) -> None:
        super().__init__(p)
        self.size = check_size(size)
        self.fill = fill
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; the identity while nobody asks for noise."""
        return cutout(
            x, self.size, self.rate, self.active, fill=self.fill, channels_last=self.channels_last,
            site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Size and p."""
        return f"size={self.size}, p={self.p}"
