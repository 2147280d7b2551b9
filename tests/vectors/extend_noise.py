"""Print lines for noise.txt, which is added to and never edited: python tests/vectors/extend_noise.py FIRST COUNT."""

from __future__ import annotations

import hashlib
import random
import sys

import torch

from dropkit.masks import noise
from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.noise_ops import PURPOSES

SITES = ["#0", "0", "encoder.layers.3.dropout", "Größe.drop"]


def digest(law: str, key: torch.Tensor, address: tuple[int, int, int], width: int, drop: int) -> str:
    """Of the definition's float64 noise, or of its exact mask."""
    step, sample, member = address
    where = key, torch.tensor(member), torch.tensor([sample]), step, width
    if law == "exact":
        values = noise.exact_keep(*where, drop).numpy()
    else:
        values = (noise.gaussian_noise if law == "gaussian" else noise.uniform_noise)(*where).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


def line(number: int) -> str:
    """One golden noise; edges of every field come up often."""
    draw = random.Random(number)

    def edge(bits: int) -> int:
        return draw.choice([0, 1, (1 << bits) - 1, draw.getrandbits(bits), draw.getrandbits(bits // 2)])

    law = sorted(PURPOSES)[number % 3]
    seed, step, sample, member = edge(64), edge(32), edge(40), edge(24)
    site, call = draw.choice(SITES), draw.choice([0, 0, 1, 7])
    width = draw.choice([1, 3, 4, 5, 63, 64, 255, 256, 257, 1000])
    drop = draw.randint(0, width) if law == "exact" else 0
    key = torch.tensor(signed(site_key(seed, site_hash(site, call), PURPOSES[law])))
    found = digest(law, key, (step, sample, member), width, drop)
    return f"{number} {law} {seed} {site} {call} {step} {sample} {member} {width} {drop} {found}"


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    sys.stdout.writelines(line(number) + "\n" for number in range(first, first + count))
