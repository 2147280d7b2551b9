"""The definition of every mask: Philox4x32-10 and the rule from bits to keep, in plain torch integers.

This file is written to be read. The kernels in `cpu.py` translate it and must agree bit for bit.

From address to lanes (scheme 1):

    key      64 bits of the site (see `address.py`): low word first
    counter  word 0: block of eight elements      word 1: low 32 bits of the sample
             word 2: step                         word 3: high 8 bits of the sample | member << 8
    block    Philox gives four 32-bit words, read as eight 16-bit lanes, low half first;
             element e of a sample's mask uses lane e % 8 of block e // 8

Bit 31 of word 0 is kept for the second block that refines rates below 2**-16.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)

WORD = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

LANES = 8  # 16-bit lanes in a block of 128 bits
LANE_BITS = 16
LANE_VALUES = 1 << LANE_BITS  # 65 536 rates can be told apart by one lane
REFINE = 1 << 31  # this bit of counter word 0 marks the block that refines tiny rates


def philox_rounds(c0: T, c1: T, c2: T, c3: T, k0: T, k1: T, *, rounds: int = ROUNDS) -> tuple[T, T, T, T]:
    """The rounds themselves, on Python integers or on int64 tensors alike.

    One round:  (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),
    after which the key moves on by the Weyl constants.
    """
    for _ in range(rounds):
        # int64 products wrap, but their 64-bit pattern is the unsigned one: shift, then mask the sign away.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & WORD) ^ c1 ^ k0,
            product_1 & WORD,
            ((product_0 >> 32) & WORD) ^ c3 ^ k1,
            product_0 & WORD,
        )
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1, c2, c3


def philox_4x32(counter: Tensor, key: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Philox4x32: a bijection of 128-bit counters, chosen by a 64-bit key.

    Args:
        counter: (..., 4) int64, each word in [0, 2**32).
        key: (..., 2) int64, likewise; broadcast against the counter.
        rounds: 10 for every mask; fewer only to show that the tests would notice.

    Returns:
        (..., 4) int64, each word in [0, 2**32).

    Source: Salmon et al. 2011, section 3.3.
    """
    words = philox_rounds(*counter.unbind(-1), *key.unbind(-1), rounds=rounds)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def lanes(
    key: Tensor, member: Tensor, samples: Tensor, step: int, count: int, *, refine: bool = False
) -> Tensor:
    """The 16-bit lanes that decide about the first `count` elements of each sample's mask.

    Args:
        key: () int64, the site's 64 bits (negative means bit 63 is set).
        member: () int64 in [0, 2**24).
        samples: (B,) int64 row ids in [0, 2**40).
        step: in [0, 2**32).
        count: elements of one sample's mask.
        refine: the second block, for rates below 2**-16.

    Returns:
        (B, count) int64 in [0, 65536).
    """
    blocks = torch.arange((count + LANES - 1) // LANES, device=samples.device)
    low, high = samples & WORD, samples >> 32
    shape = (len(samples), len(blocks))
    counter = torch.stack(
        [
            (blocks | (REFINE if refine else 0)).expand(shape),
            low[:, None].expand(shape),
            torch.full(shape, step, dtype=torch.int64, device=samples.device),
            (high[:, None] | (member << 8)).expand(shape),
        ],
        dim=-1,
    )
    words = philox_4x32(counter, torch.stack([key & WORD, (key >> 32) & WORD]))  # (B, blocks, 4)
    halves = torch.stack([words & 0xFFFF, words >> LANE_BITS], dim=-1)  # low half first
    return halves.reshape(len(samples), LANES * len(blocks))[:, :count]


def threshold(p: Tensor) -> tuple[Tensor, Tensor]:
    """The integers a lane is compared with: `(t, fine)`, and with them the rate that is really used.

    t = round(65536 p), so that p = 0 and p = 1 are exact and |t / 65536 - p| <= 2**-17. Below 2**-16 a second
    lane decides where the first one is 0:  t = 0 and fine = round(2**32 p); elsewhere fine = 0.

    Args:
        p: any shape, float64 in [0, 1].

    Returns:
        Two int64 tensors of p's shape.
    """
    tiny = (p > 0) & (p < 1 / LANE_VALUES)
    coarse = torch.round(p * LANE_VALUES).to(torch.int64)
    fine = torch.round(p * 2.0**32).to(torch.int64)
    return torch.where(tiny, 0, coarse), torch.where(tiny, fine, 0)


def survivor_scale(p: Tensor) -> Tensor:
    """What survivors are multiplied with, 1 / (1 - rate), of the rate that is really used; 0 where p is 1.

    scale = 65536 / (65536 - t), or 2**32 / (2**32 - fine) below 2**-16: the mean is kept exactly.
    """
    t, fine = threshold(p)
    # In float64: int64 tensors divide into the default dtype.
    kept = torch.where(fine > 0, 1 - fine.double() / 2.0**32, 1 - t.double() / LANE_VALUES)
    return torch.where(kept > 0, 1 / kept.clamp_min(2.0**-LANE_BITS), 0.0)


def bernoulli_keep(key: Tensor, member: Tensor, samples: Tensor, step: int, count: int, p: Tensor) -> Tensor:
    """Which elements stay: the definition that every kernel is compared with.

    keep[b, e] = lane[b, e] >= t;  below 2**-16:  keep = not (lane == 0 and second lane < fine)

    Args:
        key, member, samples, step, count: as in `lanes`.
        p: () float64, the chance to drop.

    Returns:
        (B, count) bool, True where a value stays.
    """
    t, fine = threshold(p)
    lane = lanes(key, member, samples, step, count)
    second = lanes(key, member, samples, step, count, refine=True)
    # fine lies in [0, 2**16] here, and a tie has chance 2**-16: together the rate is fine / 2**32.
    return (lane >= t) & ~((lane == 0) & (second < fine))
