"""Uniform random numbers from an address, for what a layer has to place or to choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropkit.nn.gaussian import uniform_dropout

_UNIT = 0.25  # the rate at which uniform noise is 1 + v, v in (-1, 1)


def uniform_numbers(
    shape: Sequence[int],
    *,
    device: torch.device | None = None,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Numbers u ~ U(0, 1), multiples of 2**-33 without 0 and 1.

    Args:
        shape: (B, *features); dim 0 counts the rows.
        device: of the result.
        shared: dims along which one number serves all; with 0 among them, all rows.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (*shape) float64.

    Raises:
        AddressError: the same address was drawn twice in one `masks` context.
    """
    ones = torch.ones(*shape, dtype=torch.float64, device=device)
    return uniform_dropout(ones, _UNIT, shared=shared, site=site, owner=owner) / 2


def part_of(site: str | None, part: str) -> str | None:
    """The name of one of several draws of a call, so that each has an address of its own."""
    return None if site is None else f"{site}.{part}"
