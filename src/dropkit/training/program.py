"""The batched program: K networks of one shape as stacked weights, and the noise that their masks put in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dropkit.masks import ops
from dropkit.masks.address import Draw, draw, masks
from dropkit.training.losses import bound_log_variance
from dropkit.training.network import NetworkSpec

INITIAL_WEIGHTS = 1  # purpose: a stream of random numbers that meets no other
_NO_MEMBER = torch.zeros(1, dtype=torch.int64)


def training_noise(rates: Tensor, rows: Tensor, width: int, *, key: Tensor, step: int) -> Tensor:
    """What K networks multiply the units of a site by in a training step: 0 or 1 / (1 - p).

    The noise is made once a step and multiplied in, rather than asked for again in the backward pass: here many
    small networks share one call, and the call costs more than the memory.

    Args:
        rates: (K,) chances to drop, float64.
        rows: (K, B) int64 row ids, or (1, B) where all networks see the same rows: then the bits are made once.
        width: units of the site.
        key: (1,) the site's key, see `site_draw`.
        step: the rest of the address.

    Returns:
        (K, B, width); a row keeps its mask in whichever network, stack and batch it is.
    """
    # By the kernel's own door: nothing is differentiated, and one small network spends its time on the way there.
    if len(rates) == 1:
        ones = torch.ones(rows.shape[1], width)
        return ops.dropout_once(ones, int(key), 0, float(rates), rows[0], step, 0, ())[None]
    return ops.dropout_cpu(torch.ones(1, rows.shape[1], width), key, _NO_MEMBER, rates, rows, step, 0, ())


def site_draw(site: str, *, seed: int, member: int | None = None) -> Draw:
    """The address of a site, as the layer of that name has it."""
    with masks(seed=seed, member=member):
        return draw(name=site)


def member_noise(rates: Tensor, width: int, *, seed: int, member: int, site: str) -> Tensor:
    """What thinned network `member` multiplies its units by, for each of K rates: (K, 1, width)."""
    key, network = site_draw(site, seed=seed, member=member).tensors()
    return ops.dropout(torch.ones(1, 1, width), key[None], network[None], rates, None, 0, 0, (0,))


def forward(
    parameters: Sequence[Tensor], x: Tensor, likelihood: str, noise: Sequence[Tensor | None] | None = None
) -> Tensor:
    """(K, B, D) -> (K, B, outputs); site i is multiplied by noise[i], where there is one."""
    last = len(parameters) // 2 - 1
    h = x
    for i in range(last + 1):
        factor = None if noise is None else noise[i]
        h = h if factor is None else h * factor
        h = torch.baddbmm(parameters[2 * i + 1], h, parameters[2 * i])
        h = torch.relu(h) if i < last else h
    if likelihood == "gaussian":
        h = torch.stack((h[..., 0], bound_log_variance(h[..., 1])), dim=-1)
    return h


def initial_weights(widths: Sequence[int], streams: Sequence[int], seed: int) -> list[Tensor]:
    """Stacked fresh weights (He's normal law, output layer a tenth of it) and zero biases."""
    distinct: dict[int, list[Tensor]] = {}
    pairs = list(pairwise(widths))
    for stream in dict.fromkeys(streams):
        generator = np.random.default_rng([seed, INITIAL_WEIGHTS, stream])
        distinct[stream] = []
        for i, (before, after) in enumerate(pairs):
            size = (2 / before) ** 0.5 if i < len(pairs) - 1 else 0.1 / before**0.5
            values = generator.standard_normal((before, after), dtype=np.float32) * np.float32(size)
            distinct[stream] += [torch.from_numpy(values), torch.zeros(1, after)]
    return [torch.stack([distinct[stream][i] for stream in streams]) for i in range(2 * len(pairs))]


def site_rates(specs: Sequence[NetworkSpec]) -> list[Tensor]:
    """(K,) rates for each site, in the order of the pass."""
    hidden = torch.tensor([s.rate for s in specs], dtype=torch.float64)
    return [
        torch.tensor([s.input_rate for s in specs], dtype=torch.float64),
        *[hidden] * len(specs[0].hidden),
    ]
