"""Print lines for masks.txt, which is added to and never edited: python tests/vectors/extend_masks.py FIRST COUNT."""

from __future__ import annotations

import hashlib
import random
import sys

import numpy as np
import torch

from dropkit.masks.address import signed, site_hash, site_key
from dropkit.masks.philox import bernoulli_keep

SITES = ["", "#0", "0", "encoder.layers.3.dropout", "Größe.drop"]
RATES = [0.0, 1e-6, 7e-6, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0]


def line(number: int) -> str:
    """One golden mask; edges of every field come up often."""
    draw = random.Random(number)

    def edge(bits: int) -> int:
        return draw.choice([0, 1, (1 << bits) - 1, draw.getrandbits(bits), draw.getrandbits(bits // 2)])

    seed, step, sample, member = edge(64), edge(32), edge(40), edge(24)
    site, call = draw.choice(SITES[1:]), draw.choice([0, 0, 1, 7])
    width, p = draw.choice([1, 7, 8, 9, 64, 100, 511, 512, 513, 1000, 4096]), draw.choice(RATES)
    key = torch.tensor(signed(site_key(seed, site_hash(site, call))))
    rate = torch.tensor(p, dtype=torch.float64)
    keep = bernoulli_keep(key, torch.tensor(member), torch.tensor([sample]), step, width, rate).numpy()
    digest = hashlib.sha256(np.packbits(keep).tobytes()).hexdigest()[:16]
    return f"{number} {seed} {site} {call} {step} {sample} {member} {width} {p} {digest}"


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    sys.stdout.writelines(line(number) + "\n" for number in range(first, first + count))
