"""Where the noise of a recurrent layer comes from: each of its masks is a place of its own within the layer's site.

An element's place in a mask does not depend on how long the batch's longest sequence is: (time, feature) in row-major
order for fresh masks, (feature) for locked ones. So a row has the same masks padded, packed, alone and in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from dropkit.errors import AddressError
from dropkit.masks import address, ops, runs_cpu
from dropkit.nn.features import dropout
from dropkit.nn.sequences import is_plain, one_mask_for_all_rows, times_noise

TIMES = 1 << 31  # blocks of eight elements in one mask


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """The masks of one call of a layer.

    Attributes:
        owner: the layer.
        site: its name, or None.
        rows, times: B and T.
        start: position in its sequence of the call's first step.
        order: (B,) rows in the order of packing, longest first; or None: as they are.
        locked: one mask for all steps, or one for each.
    """

    owner: object
    site: str | None
    rows: int
    times: int
    start: int
    order: Tensor | None
    locked: bool

    def place(self, name: str) -> str | None:
        """The name of a mask; without a name of the layer, masks are known by their order."""
        return None if self.site is None else f"{self.site}.{name}"

    def draw(
        self, name: str, shape: Sequence[int], p: float | Tensor, like: Tensor, locked: bool | None = None
    ) -> Tensor:
        """(T or 1, B or 1, *shape) noise, 0 or 1 / (1 - p), rows in the order of packing.

        One row stands for all of them for a committee member.

        Args:
            name: of the mask within the layer.
            shape: of one row at one step.
            p: chance to drop.
            like: a tensor of the dtype and device of the noise.
            locked: one mask for all steps; by default as the layer has it.

        Raises:
            AddressError: a step too far from the start, or the same address drawn twice in one context.
        """
        locked = self.locked if locked is None else locked
        rows = 1 if one_mask_for_all_rows() else self.rows
        noise = (
            self._locked(name, rows, shape, p, like) if locked else self._fresh(name, rows, shape, p, like)
        )
        if self.order is not None and rows > 1:
            noise = noise[self.order]
        return noise.transpose(0, 1)

    def _locked(self, name: str, rows: int, shape: Sequence[int], p: float | Tensor, like: Tensor) -> Tensor:
        return dropout(like.new_ones(rows, 1, *shape), p, site=self.place(name), owner=self.owner)

    def _fresh(self, name: str, rows: int, shape: Sequence[int], p: float | Tensor, like: Tensor) -> Tensor:
        width = prod(shape)
        if (self.start + self.times) * width > TIMES * 8:
            raise AddressError(
                f"start={self.start} was given; a mask ends after {TIMES * 8 // width} steps of {width} elements. "
                "Begin a new sequence: another step or seed, and start=0."
            )
        fused = like.dtype in (torch.float32, torch.float64) and not isinstance(p, Tensor) and is_plain(like)
        if self.start == 0 or not fused:  # the elements before the start are made, and left
            ones = like.new_ones(rows, self.start + self.times, *shape)
            return dropout(ones, p, site=self.place(name), owner=self.owner)[:, self.start :]
        where = address.draw(self.owner, self.place(name))
        t, fine, scale = ops._quantised(float(p))
        noise = like.new_full((rows, self.times, *shape), scale)
        ids = ops._row_ids(where.samples, rows, where.row_offset, where.batch_shared)[0]
        firsts = np.full(rows, self.start * width, np.int64)
        key, member = np.array((int(where.key) % address.SEEDS, int(where.member)), np.uint64)
        runs_cpu.drop_runs(
            noise.view(-1).numpy(), self.times * width, ids, firsts, key, member, where.step, t, fine
        )
        return noise

    def apply(self, name: str, x: Tensor, p: float | Tensor, sizes: Tensor | None) -> Tensor:
        """Dropout on the way into, between or out of layers.

        Args:
            name: of the mask within the layer.
            x: (T, B, I), or (N, I) of a packed batch.
            p: chance to drop.
            sizes: (T,) rows of each step of a packed batch.
        """
        if sizes is None and (self.locked or self.start == 0):
            shared = (1,) if self.locked else ()
            rows_first = x.transpose(0, 1)
            dropped = dropout(rows_first, p, shared=shared, site=self.place(name), owner=self.owner)
            return dropped.transpose(0, 1)
        noise = self.draw(name, x.shape[-1:], p, x)
        if sizes is None:
            return times_noise(x, noise)
        times = torch.repeat_interleave(sizes)
        rows = torch.arange(len(x)) - (sizes.cumsum(0) - sizes)[times]
        return times_noise(x, noise[times if noise.shape[0] > 1 else 0, rows if noise.shape[1] > 1 else 0])
