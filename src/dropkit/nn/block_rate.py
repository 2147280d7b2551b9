"""How often blocks must start for a given share of a map to be dropped: blocks overlap, and borders have fewer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dropkit.errors import OptionError, check_probability
from dropkit.nn.axes import spatial_sizes

Gamma = Literal["exact", "paper"]
HALVINGS = 60  # of [0, 1] until the chance of a block is known


def _along(size: int, block: int) -> list[int]:
    """How many places of a block, which all lie inside the map, cover each element of one dim."""
    return [min(at, size - block) - max(at - block + 1, 0) + 1 for at in range(size)]


def covers_of(sizes: tuple[int, ...], blocks: tuple[int, ...], like: Tensor) -> Tensor:
    """(*sizes) on the device and of the dtype of `like`: how many places of a block cover each element."""
    covers = like.new_ones(())
    for size, block in zip(sizes, blocks, strict=True):
        covers = covers.unsqueeze(-1) * like.new_tensor(_along(size, block))
    return covers


def _profile(sizes: tuple[int, ...], blocks: tuple[int, ...]) -> dict[int, int]:
    """How many elements are covered by so many places: {places: elements}."""
    profile = {1: 1}
    for size, block in zip(sizes, blocks, strict=True):
        wider: dict[int, int] = {}
        for covers, elements in profile.items():
            for along in _along(size, block):
                wider[covers * along] = wider.get(covers * along, 0) + elements
        profile = wider
    return profile


def _kept(gamma: Any, profile: dict[int, int]) -> Any:
    """Expected kept share; an element stays where none of the places that cover it is chosen."""
    share = sum(elements * (1 - gamma) ** covers for covers, elements in profile.items())
    return share / sum(profile.values())


def _paper(sizes: tuple[int, ...], blocks: tuple[int, ...]) -> float:
    """The paper's gamma / p."""
    ratio = 1.0
    for size, block in zip(sizes, blocks, strict=True):
        ratio *= size / (block * (size - block + 1))
    return ratio


def gamma_at(p: Tensor, sizes: tuple[int, ...], blocks: tuple[int, ...], rule: Gamma) -> Tensor:
    """The chance of a block for each p, float64; `gamma_of` in tensors, which may be batched by torch.func.vmap."""
    if rule == "paper":
        return (p * _paper(sizes, blocks)).clamp(max=1.0)
    profile = _profile(sizes, blocks)
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_few = _kept(middle, profile) < 1 - p
        low, high = torch.where(too_few, low, middle), torch.where(too_few, middle, high)
    return torch.where(p == 0, 0.0, high)


def _number(p: float, sizes: tuple[int, ...], blocks: tuple[int, ...], rule: Gamma) -> float:
    if rule == "paper":
        return min(p * _paper(sizes, blocks), 1.0)
    profile = _profile(sizes, blocks)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _kept(middle, profile) < 1 - p else (middle, high)
    return high if p else 0.0


_known = lru_cache(maxsize=1024)(_number)  # a layer asks for the same in every pass


def gamma_of(p: float, sizes: tuple[int, ...], blocks: tuple[int, ...], rule: Gamma) -> float:
    """The chance of a block for p. A compiler, which would look through the cache, folds it into a constant."""
    return (_number if torch.compiler.is_compiling() else _known)(p, sizes, blocks, rule)


def check_rule(rule: str) -> None:
    """Refuse a rule that is neither of the two."""
    if rule not in get_args(Gamma):
        raise OptionError(f"gamma={rule!r} was given; allowed: {get_args(Gamma)}.")


def clipped(block_size: int | Sequence[int], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a block, no longer than the map."""
    return tuple(map(min, spatial_sizes(block_size, len(sizes), "block_size"), sizes))


def drop_block_gamma(
    p: float, sizes: Sequence[int], block_size: int | Sequence[int], rule: Gamma = "exact"
) -> float:
    """The chance gamma that a block starts at a place, for which a share p of a map is dropped.

    "exact": the root of    mean over elements e of (1 - gamma)**n_e = 1 - p
    "paper": gamma = p / b**2 * s**2 / (s - b + 1)**2    (and likewise in other dims of space)

    n_e counts the places of a block, among those inside the map, that cover e: b**2 in the middle, 1 in a corner.
    Places are chosen independently, so e stays with chance (1 - gamma)**n_e. The paper's formula takes blocks for
    disjoint; `drop_block_kept` says what it keeps in truth. On a map of 14 x 14 with blocks of 7, asked for 5, 10, 25
    and 50 %, it drops 4.82, 9.29, 20.95 and 35.82 %.

    Args:
        p: share to drop, in [0, 1].
        sizes: of the map, one for each dim of space.
        block_size: side of a block; a longer one is cut to the map.
        rule: "exact" or "paper".

    Returns:
        gamma in [0, 1]; with a block of 1, and with one as large as the map, p itself.

    Raises:
        ProbabilityError: p is outside [0, 1].
        OptionError: a side below 1, or another rule.

    Source: Ghiasi et al. 2018, arXiv:1810.12890, eq. 1 (there with the chance to keep).

    Example:
        >>> import dropkit as dk
        >>> paper = dk.functional.drop_block_gamma(0.25, (14, 14), 7, rule="paper")
        >>> round(1 - dk.functional.drop_block_kept(paper, (14, 14), 7), 4)
        0.2095
    """
    check_rule(rule)
    sides = spatial_sizes(tuple(sizes), len(sizes), "sizes")
    return gamma_of(check_probability(p), sides, clipped(block_size, sides), rule)


def drop_block_kept(gamma: float, sizes: Sequence[int], block_size: int | Sequence[int]) -> float:
    """The expected kept share of a map, exactly, when a block starts at each place with chance gamma.

    kept = mean over elements e of (1 - gamma)**n_e

    Args:
        gamma, sizes, block_size: as in `drop_block_gamma`.

    Returns:
        A share in [0, 1].

    Raises:
        ProbabilityError: gamma is outside [0, 1].
        OptionError: a side below 1.
    """
    sides = spatial_sizes(tuple(sizes), len(sizes), "sizes")
    return float(_kept(check_probability(gamma, "gamma"), _profile(sides, clipped(block_size, sides))))
