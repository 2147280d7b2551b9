"""How a tensor falls into the tiles of a GPU's programs.

The dims of a row are of two kinds: those along which each element has a mask element of its own, and those that share
one. Neighbouring dims of a kind are merged where memory allows; at most two of each kind remain, or no kernel serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dropkit.masks.philox import LANES

BLOCKS = 256  # counters of a program: two for each of its 128 threads, so that two reads are on their way
TILE = 2048  # elements of a program
LINE = 64  # elements of a tile that lie side by side in memory, where there are so many
MOST_SMALL = (1 << 31) - (1 << 20)  # offsets from here on, with room for the last tile's end, take 64 bits

Dim = tuple[int, int, int]  # size, stride in x, stride in the result


def _merge(dims: Sequence[Dim]) -> list[Dim]:
    """Neighbouring dims that memory, in x and in the result, lets count as one."""
    merged: list[Dim] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if merged and all(outer == size * s for outer, s in zip(merged[-1][1:], strides, strict=True)):
            size *= merged.pop()[0]
        merged.append((size, strides[0], strides[1]))
    return merged


@dataclass(frozen=True, slots=True)
class Layout:
    """Where elements lie, and how they fall into tiles.

    Attributes:
        row: B, and strides from one row to the next.
        own, shared: two dims each, outer and inner, of which the mask has elements of its own, or which share them.
    """

    row: Dim
    own: tuple[Dim, Dim]
    shared: tuple[Dim, Dim]

    @classmethod
    def of(cls, x: Tensor, out: Tensor, shared: Sequence[int]) -> Layout | None:
        """The layout of (K, *shape) tensors; None where it has too many dims, or memory runs across the mask."""
        dims = list(zip(out.shape[1:], x.stride()[1:], out.stride()[1:], strict=True))
        row = (1, 0, 0) if 0 in shared or not dims else dims[0]
        first = 0 if 0 in shared else 1
        own, sharing = (
            _merge([dim for i, dim in enumerate(dims) if i >= first and (i in shared) is kind])
            for kind in (False, True)
        )
        if len(own) > 2 or len(sharing) > 2:
            return None
        nothing: Dim = (1, 0, 0)
        own_outer, own_inner = (nothing, nothing, *own)[-2:]
        shared_outer, shared_inner = (nothing, nothing, *sharing)[-2:]
        layout = cls(row, (own_outer, own_inner), (shared_outer, shared_inner))
        runs_across = bool(own) and not sharing and own[-1][1:] != (1, 1)
        return None if runs_across else layout

    @property
    def width(self) -> int:
        """Mask elements of a row."""
        return self.own[0][0] * self.own[1][0]

    @property
    def sharing(self) -> int:
        """Elements that one mask element decides about."""
        return self.shared[0][0] * self.shared[1][0]

    @property
    def used(self) -> int:
        """Lanes of a block that a tile holds: 8, or fewer where all of a row's fit into fewer."""
        return min(_next_power(self.width), LANES)

    @property
    def per_row(self) -> int:
        """Philox blocks of a row."""
        return -(-self.width // LANES)

    @property
    def simple(self) -> bool:
        """One mask element for each element, side by side."""
        return self.sharing == 1 and self.own[0][0] == 1 and (self.width == 1 or self.own[1][1:] == (1, 1))

    @property
    def shared_inner(self) -> bool:
        """Whether neighbours in memory share a decision."""
        return self.sharing > 1 and self.shared[1][2] == 1 and self.shared[1][0] > 1

    @property
    def tile(self) -> tuple[int, int]:
        """Blocks of a tile, and how many elements of those that share."""
        if self.simple:
            return BLOCKS, 1
        most_shared, most_blocks = _next_power(self.sharing), _next_power(self.row[0] * self.per_row)
        if self.shared_inner:
            shared = min(most_shared, TILE // self.used)
            return max(min(most_blocks, TILE // shared // self.used), 1), shared
        blocks = min(most_blocks, max(LINE // self.used, 1))
        shared = min(most_shared, TILE // blocks // self.used)
        return min(most_blocks, TILE // shared // self.used), shared

    def kernel(self, triton: Any) -> Any:
        """Which of the kernels."""
        return triton.elementwise if self.simple else triton.strided

    def programs(self, groups: int) -> int:
        """How many tiles there are."""
        blocks, shared = self.tile
        return groups * -(-self.row[0] * self.per_row // blocks) * -(-self.sharing // shared)

    def arguments(self, x: Tensor, out: Tensor, groups: int) -> dict[str, Any]:
        """The kernel's arguments that say where the elements of x, (1 or K, *shape), and out, (K, *shape), lie."""
        rows, x_row, out_row = self.row
        blocks, shared = self.tile
        x_network = 0 if len(x) == 1 else x.stride(0)
        full = self.width % self.used == 0
        padded = (rows * self.per_row + blocks) * self.used
        arguments: dict[str, Any] = {
            "x_group": x_network if groups > 1 else 0, "x_replica": x_network if groups == 1 else 0,
            "x_row": x_row, "out_network": out.stride(0), "out_row": out_row, "width": self.width,
            "per_row": self.per_row, "tiles": -(-rows * self.per_row // blocks),
            "BLOCKS": blocks, "USED": self.used, "FULL": full, "WIDE": max(_reach(x), _reach(out), padded) > MOST_SMALL,
        }  # fmt: skip
        if self.simple:
            flat = full and (rows == 1 or x_row == out_row == self.width)
            return arguments | {"FLAT": flat}
        (_, x_own_outer, out_own_outer), (own_size, x_own, out_own) = self.own
        (_, x_shared_outer, out_shared_outer), (shared_size, x_shared, out_shared) = self.shared
        return arguments | {
            "own_size": own_size, "x_own_outer": x_own_outer, "x_own": x_own, "out_own_outer": out_own_outer,
            "out_own": out_own, "shared_total": self.sharing, "shared_size": shared_size,
            "x_shared_outer": x_shared_outer, "x_shared": x_shared, "out_shared_outer": out_shared_outer,
            "out_shared": out_shared, "shared_tiles": -(-self.sharing // shared), "SHARED": shared,
            "OWN_OUTER": self.own[0][0] > 1, "SHARED_OUTER": self.shared[0][0] > 1,
            "SHARED_INNER": self.shared_inner,
        }  # fmt: skip


def _next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _reach(tensor: Tensor) -> int:
    """Distance from a tensor's first element to its last in memory."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
