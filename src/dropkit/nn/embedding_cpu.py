"""Numba kernel that asks for single elements of masks: those of the word types that occur in a text."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dropkit.masks.cpu import BATCH, EVERYTHING, _philox_batch
from dropkit.masks.philox import LANES, REFINE

Array = np.ndarray[Any, Any]

_U = np.uint64


@njit(nogil=True, cache=True)
def noise_of_elements(
    elements: Array, samples: Array, per_sample: int, key: np.uint64, member: np.uint64, step: int, t: int, fine: int,
    scale: float, out: Array,
) -> None:  # fmt: skip
    """out = scale where the mask of its sample keeps the element, else 0: one Philox block for each element asked for.

    Args:
        elements: (N,) int64, index into the mask of its sample.
        samples: (N / per_sample,) uint64, or (1,): one mask for all.
        per_sample: how many neighbours have the same sample.
        key, member, step: the address.
        t, fine, scale: threshold, its refinement, and what survivors are multiplied with.
        out: (N,), written.
    """
    block, sample = np.empty(BATCH, np.uint64), np.empty(BATCH, np.uint64)
    words, second = np.empty(2 * BATCH, np.uint64), np.empty(2 * BATCH, np.uint64)
    lane, second_lane = words.view(np.uint16), second.view(np.uint16)
    last = len(samples) - 1
    for first in range(0, len(elements), BATCH):
        count = min(BATCH, len(elements) - first)
        for i in range(BATCH):
            at = first + min(i, count - 1)
            block[i], sample[i] = _U(elements[at] // LANES), samples[min(at // per_sample, last)]
        _philox_batch(block, sample, key, member, _U(step), words)
        if fine > 0:
            for i in range(BATCH):
                block[i] |= _U(REFINE)
            _philox_batch(block, sample, key, member, _U(step), second)
        for i in range(count):
            j = LANES * i + elements[first + i] % LANES
            kept = lane[j] >= t and t < EVERYTHING
            if fine > 0:
                kept = lane[j] > 0 or second_lane[j] >= fine
            out[first + i] = scale if kept else 0.0
