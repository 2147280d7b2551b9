"""Masks whose elements are named one by one, or lie in runs of uneven length: nodes, edges and messages of graphs.

A row is a whole graph here, and its id is the sample of the address. Which element of the graph's mask decides about
what is settled by one of two numberings:

    rows     item i of a graph (its i-th node, edge or message, in the order given) with a mask of `width` elements has
             the elements i width ... i width + width - 1
    pairs    the pair of nodes {u, v}, counted within their graph, has element  high (high + 1) / 2 + low

A pair has its number whatever the order of the edges, in either direction, and however many nodes there are. Bits come
from the counters of `philox.py`. Pairs numbered 2**34 and above (more than 185 363 nodes) would run out of the blocks
of one key: part = number // 2**34 > 0 uses a key of its own, Philox(key, part), at number % 2**34.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dropkit.masks.address import NOISE, SCHEME, SEEDS, signed, site_key
from dropkit.masks.cpu import BATCH, EVERYTHING, _dropped_by_refinement, _philox_batch
from dropkit.masks.philox import (
    LANE_BITS,
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

NUMBER_BITS = 34
NUMBERS = (
    1 << NUMBER_BITS
)  # elements that one key and sample serve: blocks of eight, with 31 bits for the block

_WORD, _HALF = np.uint64(WORD), np.uint64(32)


def lanes_at(
    key: Tensor, member: Tensor, samples: Tensor, step: int, elements: Tensor, *, refine: bool = False
) -> Tensor:
    """The 16-bit lane of one element of each sample's mask; `philox.lanes` at single places.

    Args:
        key, member, step, refine: as in `philox.lanes`.
        samples, elements: (n,) int64, elements below 2**34.

    Returns:
        (n,) int64 in [0, 65536).
    """
    block = elements // LANES | (REFINE if refine else 0)
    counter = torch.stack(
        (block, samples & WORD, torch.full_like(block, step), samples >> 32 | member << 8), dim=-1
    )
    words = philox_4x32(counter, torch.stack((key & WORD, key >> 32 & WORD)))
    word = words.gather(-1, (elements % LANES // 2)[:, None])[:, 0]
    return word >> LANE_BITS * (elements % 2) & 0xFFFF


def keep_at(key: Tensor, member: Tensor, samples: Tensor, step: int, elements: Tensor, p: Tensor) -> Tensor:
    """Which elements stay: the definition that the kernels are compared with.

    Args:
        key, member, samples, step, elements: as in `lanes_at`, elements up to 2**62.
        p: () float64, the chance to drop.

    Returns:
        (n,) bool.
    """
    t, fine = threshold(p)
    keep = torch.empty(elements.shape, dtype=torch.bool)
    parts = elements // NUMBERS
    for part in parts.unique().tolist():
        here, own = parts == part, torch.tensor(key_of_part(int(key), part))
        places = samples[here], step, elements[here] % NUMBERS
        lane, second = lanes_at(own, member, *places), lanes_at(own, member, *places, refine=True)
        keep[here] = (lane >= t) & ~((lane == 0) & (second < fine))
    return keep


def key_of_part(key: int, part: int) -> int:
    """The key, signed, of the pairs numbered part 2**34 to (part + 1) 2**34 - 1."""
    return signed(site_key(key % SEEDS, part)) if part else key


@njit(nogil=True, cache=True)
def _draw_lanes(
    block: Array, sample: Array, key: np.uint64, member: np.uint64, step: int, fine: int, words: Array, second: Array
) -> None:  # fmt: skip
    """Fill `words` with the lanes of BATCH blocks; where fine > 0, with 0 (dropped) and 1, and blocks are spoilt."""
    _philox_batch(block, sample, key, member, np.uint64(step), words)
    if fine > 0:
        for i in range(BATCH):
            block[i] |= np.uint64(REFINE)
        _philox_batch(block, sample, key, member, np.uint64(step), second)
        _dropped_by_refinement(words.view(np.uint16), second.view(np.uint16), fine)


@njit(nogil=True, cache=True)
def _philox_of_keys(
    block: Array, sample: Array, keys: Array, member: np.uint64, step: np.uint64, words: Array
) -> None:
    """`cpu._philox_batch` where each counter has a key of its own."""
    for i in range(BATCH):
        c0, c1, c2 = block[i], sample[i] & _WORD, step
        c3 = (sample[i] >> _HALF) | (member << np.uint64(8))
        k0, k1 = keys[i] & _WORD, keys[i] >> _HALF
        for _ in range(ROUNDS):
            product_0, product_1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
            c0 = (product_1 >> _HALF) ^ c1 ^ k0
            c1 = product_1 & _WORD
            c2 = (product_0 >> _HALF) ^ c3 ^ k1
            c3 = product_0 & _WORD
            k0, k1 = (k0 + np.uint64(WEYL_0)) & _WORD, (k1 + np.uint64(WEYL_1)) & _WORD
        words[2 * i], words[2 * i + 1] = c0 | (c1 << _HALF), c2 | (c3 << _HALF)


@njit(nogil=True, cache=True)
def _draw_lanes_of_parts(
    number: Array, block: Array, sample: Array, key: np.uint64, member: np.uint64, step: int, fine: int, words: Array,
    second: Array,
) -> None:  # fmt: skip
    """`_draw_lanes` where each pair has the key of its part, as `key_of_part` makes it."""
    low, high = np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    for i in range(BATCH):
        low[i] = np.uint64(number[i] >> NUMBER_BITS)  # below 2**29, as node numbers are below 2**31
        high[i] = np.uint64(NOISE) << _HALF
    _philox_batch(low, high, key, np.uint64(0), np.uint64(SCHEME), words)
    keys = words[::2].copy()
    for i in range(BATCH):
        keys[i] = key if number[i] < NUMBERS else keys[i]
    _philox_of_keys(block, sample, keys, member, np.uint64(step), words)
    if fine > 0:
        for i in range(BATCH):
            block[i] |= np.uint64(REFINE)
        _philox_of_keys(block, sample, keys, member, np.uint64(step), second)
        _dropped_by_refinement(words.view(np.uint16), second.view(np.uint16), fine)


@njit(nogil=True, cache=True)
def keep_runs(
    ids: Array, ends: Array, key: np.uint64, member: np.uint64, step: int, t: int, fine: int, out: Array,
    start: int, stop: int,
) -> None:  # fmt: skip
    """Fill out[start:stop]: run u is out[ends[u - 1]:ends[u]], the elements 0, 1, ... of sample ids[u]."""
    block, sample = np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    words, second = np.empty(2 * BATCH, np.uint64), np.empty(2 * BATCH, np.uint64)
    lane = words.view(np.uint16)
    if t >= EVERYTHING:
        out[start:stop] = False
        return
    limit = np.uint16(1 if fine > 0 else t)
    run, at = np.searchsorted(ends, start, side="right"), start
    while at < stop:
        begin, end = ends[run - 1] if run > 0 else 0, min(ends[run], stop)
        first, skip = (at - begin) // LANES, (at - begin) % LANES
        while at < end:
            for i in range(BATCH):
                block[i] = np.uint64(first + i)
            sample[:] = ids[run]
            _draw_lanes(block, sample, key, member, step, fine, words, second)
            count = min(LANES * BATCH - skip, end - at)
            target, use = out[at : at + count], lane[skip : skip + count]
            for i in range(count):
                target[i] = use[i] >= limit
            at, first, skip = at + count, first + BATCH, 0
        run += 1


@njit(nogil=True, cache=True)
def keep_pairs(
    ids: Array, u: Array, v: Array, places: Array, key: np.uint64, member: np.uint64, step: int, t: int, fine: int,
    out: Array, start: int, stop: int,
) -> None:  # fmt: skip
    """Fill out[start:stop]: whether the pairs {u[i], v[i]} stay.

    Args:
        ids: (E,) or (1,) uint64 sample ids.
        u, v: (E,) nodes.
        places: (N,) number of each node in its graph; (0,) where that is the node itself.
        key, member, step, t, fine: one number each.
    """
    block, sample = np.zeros(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    words, second = np.empty(2 * BATCH, np.uint64), np.empty(2 * BATCH, np.uint64)
    one, two, number = np.empty(BATCH, np.int64), np.empty(BATCH, np.int64), np.zeros(BATCH, np.int64)
    if t >= EVERYTHING:
        out[start:stop] = False
        return
    limit = np.uint64(1 if fine > 0 else t)
    sample[:] = ids[0]
    for at in range(start, stop, BATCH):
        count, parts = min(BATCH, stop - at), 0
        first, other, target = u[at : at + count], v[at : at + count], out[at : at + count]
        if len(places) > 0:
            for i in range(count):
                one[i], two[i] = places[first[i]], places[other[i]]
            first, other = one, two
        for i in range(count):
            low, high = min(first[i], other[i]), max(first[i], other[i])
            number[i] = (high * (high + 1) >> 1) + low
        for i in range(count):
            block[i] = np.uint64((number[i] & (NUMBERS - 1)) >> 3)
            parts |= number[i] >> NUMBER_BITS
        if len(ids) > 1:
            sample[:count] = ids[at : at + count]
        if parts == 0:
            _draw_lanes(block, sample, key, member, step, fine, words, second)
        else:
            _draw_lanes_of_parts(number, block, sample, key, member, step, fine, words, second)
        for i in range(count):
            word = words[2 * i + (number[i] >> 2 & 1)] >> np.uint64((number[i] & 3) << 4)
            target[i] = word & np.uint64(0xFFFF) >= limit


@njit(nogil=True, cache=True)
def find_runs(graphs: Array, begins: Array) -> int:
    """Write where runs of one graph begin, and count them; -1 where graphs fall somewhere, so that runs say nothing."""
    runs, last = 0, -1
    for i in range(len(graphs)):
        if graphs[i] < last:
            return -1
        if graphs[i] > last:
            begins[runs] = i
            runs += 1
            last = graphs[i]
    return runs


@njit(nogil=True, cache=True)
def graphs_of_edges(u: Array, v: Array, batch: Array, out: Array) -> int:
    """Write the graph of each edge; returns an edge that joins two, or -1."""
    joining = -1
    for i in range(len(out)):
        out[i] = batch[u[i]]
        if batch[v[i]] != out[i]:
            joining = i
    return joining
