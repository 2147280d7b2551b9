"""Masks of a generator of our own kind with one fault planted in it, for the statistics to find.

Without a fault the generator is the definition, bit for bit; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

import dropkit as dk
from dropkit.masks.address import site_hash, site_key
from dropkit.masks.philox import (
    LANES,
    MULTIPLIER_0,
    MULTIPLIER_1,
    REFINE,
    ROUNDS,
    WEYL_0,
    WEYL_1,
    WORD,
    philox_4x32,
    threshold,
)

Array = np.ndarray[Any, Any]


class Address(NamedTuple):
    """Where a mask lives; `sample` is the id of its first row, `call` counts the calls of the site."""

    seed: int = 0
    site: str = "site"
    call: int = 0
    step: int = 0
    member: int = 0
    sample: int = 0


class Source(NamedTuple):
    """What the statistics are asked about.

    Attributes:
        keep: (address, rows, width, p, turned) -> (rows, width) bool. Where `turned` is True the input lies in memory
            column by column.
        blocks: (n, 4) counters and (n, 2) keys to (n, 4) words, all uint32 in uint64.
    """

    keep: Callable[[Address, int, int, float, bool], Array]
    blocks: Callable[[Array, Array], Array]


def _kept_by_dropkit(where: Address, rows: int, width: int, p: float, turned: bool = False) -> Array:
    x = torch.ones(width, rows).t() if turned else torch.ones(rows, width)
    layer = dk.nn.Dropout(p)
    layer.site = where.site
    samples = torch.arange(where.sample, where.sample + rows)
    with dk.masks(seed=where.seed, step=where.step, member=where.member, samples=samples):
        for _ in range(where.call):
            layer(x[:, :0])
        return (layer(x) != 0).numpy()


def _blocks_of_the_definition(counters: Array, keys: Array) -> Array:
    words = philox_4x32(torch.from_numpy(counters.astype(np.int64)), torch.from_numpy(keys.astype(np.int64)))
    return words.numpy().astype(np.uint64)


DROPKIT = Source(_kept_by_dropkit, _blocks_of_the_definition)


@njit
def _philox(counters: Array, keys: Array, rounds: int) -> Array:
    word, half, out = np.uint64(WORD), np.uint64(32), np.empty_like(counters)
    for i in range(len(counters)):
        c0, c1, c2, c3 = counters[i]
        k0, k1 = keys[i]
        for _ in range(rounds):
            product_0, product_1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
            c0, c1 = (product_1 >> half) ^ c1 ^ k0, product_1 & word
            c2, c3 = (product_0 >> half) ^ c3 ^ k1, product_0 & word
            k0, k1 = (k0 + np.uint64(WEYL_0)) & word, (k1 + np.uint64(WEYL_1)) & word
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = c0, c1, c2, c3
    return out


def _lanes(where: Address, key: int, ids: Array, blocks: Array, rounds: int) -> Array:
    """(rows, 8 blocks) uint16 of the sample ids and block indices given."""
    counters = np.empty((len(ids), len(blocks), 4), np.uint64)
    counters[..., 0] = blocks
    counters[..., 1] = (ids & np.uint64(WORD))[:, None]
    counters[..., 2] = where.step & WORD
    counters[..., 3] = ((ids >> np.uint64(32)) & np.uint64(0xFF) | np.uint64(where.member << 8 & WORD))[
        :, None
    ]
    keys = np.empty((counters.size // 4, 2), np.uint64)
    keys[:] = key & WORD, key >> 32
    words = _philox(counters.reshape(-1, 4), keys, rounds)
    return words.astype(np.uint32).view(np.uint16).reshape(len(ids), -1)


def _moved(where: Address, fault: str) -> Address:
    """The address as a generator with this fault reads it."""
    if fault == "step reused":
        return where._replace(step=where.step // 2 * 2)
    if fault == "step and sample swapped":
        return where._replace(step=where.sample & WORD, sample=where.step)
    if fault == "step and member swapped":
        return where._replace(step=where.member, member=where.step)
    if fault == "step and sample added":
        return where._replace(step=0, sample=where.step + where.sample)
    if fault == "sample of 32 bits":
        return where._replace(sample=where.sample & WORD)
    if fault == "member of 16 bits":
        return where._replace(member=where.member & 0xFFFF)
    if fault == "seed of 32 bits":
        return where._replace(seed=where.seed & WORD)
    if fault == "calls share":
        return where._replace(call=0)
    if fault == "sites share":
        return where._replace(site=where.site.rstrip("0123456789"))
    return where


def with_fault(fault: str = "", rounds: int = ROUNDS) -> Source:
    """The generator with a fault of `FAULTS`, or with fewer rounds."""

    def keep(where: Address, rows: int, width: int, p: float, turned: bool = False) -> Array:
        where = _moved(where, fault)
        key = site_key(where.seed, site_hash(where.site, where.call))
        ids = np.arange(where.sample, where.sample + rows, dtype=np.uint64)
        if (
            turned and fault == "stride order"
        ):  # as a loop over memory would count: element e of row b is b + e rows
            blocks = np.arange(-(-rows * width // LANES), dtype=np.uint64)
            lane = _lanes(where, key, ids[:1], blocks, rounds)[0, : rows * width].reshape(width, rows).T
            return lane >= int(threshold(torch.tensor(p, dtype=torch.float64))[0])
        blocks = np.arange(-(-width // LANES), dtype=np.uint64)
        if fault == "blocks used twice":
            blocks //= np.uint64(2)
        lane = _lanes(where, key, ids, blocks, rounds)[:, :width]
        if fault == "lanes used twice":  # 32-bit words, of which a 16-bit comparison sees the lower half only
            lane = lane[:, np.arange(width) // 2 * 2]
        if fault == "8-bit threshold":
            return (lane >> 8) >= round(256 * p)
        t, fine = (int(number) for number in threshold(torch.tensor(p, dtype=torch.float64)))
        if fault == "threshold beside by one":
            return lane > t
        if fault == "no refinement":
            return lane >= round(65536 * p)
        if fine:
            second = _lanes(where, key, ids, blocks | np.uint64(REFINE), rounds)[:, :width]
            return ~((lane == 0) & (second < fine))
        return lane >= t

    return Source(keep, lambda counters, keys: _philox(counters, keys, rounds))


# Each fault, and the statistic that has to find it.
FAULTS = {
    "8-bit threshold": "totals",
    "threshold beside by one": "totals",
    "no refinement": "totals",
    "lanes used twice": "neighbours: feature",
    "blocks used twice": "neighbours: feature",
    "step reused": "neighbours: step",
    "sample of 32 bits": "neighbours: sample",
    "member of 16 bits": "neighbours: member",
    "seed of 32 bits": "neighbours: seed",
    "sites share": "neighbours: site",
    "calls share": "neighbours: site",
    "step and sample added": "diagonals",
    "step and sample swapped": "exchanged fields",
    "step and member swapped": "exchanged fields",
    "stride order": "layouts",
}
