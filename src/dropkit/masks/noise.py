"""Noise laws beside Bernoulli, in plain torch: uniform, Gaussian, and masks of an exact count.

This is their definition; the kernels in `noise_cpu.py` translate it and agree bit for bit. Each law has a purpose of
its own in the site's key (see `address.py`: uniform 2, Gaussian 3, exact 4), and from there on the counters of
`philox.py`. From address to noise (scheme 1):

    word      element e of a sample's mask uses 32-bit word e % 4 of block e // 4, which is lanes 2e and 2e + 1
    uniform   v = (2 word + 1 - 2**32) / 2**32, symmetric in (-1, 1);  noise = sqrt(3) v
    Gaussian  words 2j and 2j + 1 give elements 2j and 2j + 1 by Box and Muller:
              r = sqrt(-2 ln((2 first + 1) / 2**33)), angle = 2 pi second / 2**32;  noise = r cos(angle), r sin(angle)
    exact     the elements with the `drop` smallest words are dropped; of equal words the first element goes first

All noise has mean 0 and variance 1 (the Gaussian reaches 6.76 and not beyond, which cuts off a chance of 1.4e-11).
Logarithm, sine and cosine are written out below as polynomials in float64, from additions, products, one quotient and
one root, which IEEE 754 rounds in one way: so the noise is the same to the last bit on every machine, whatever its
mathematics library. Against the true functions they err by less than 1e-15 (1 + |noise|).

Source: Box and Muller 1958, Annals of Mathematical Statistics 29.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dropkit.masks.philox import LANE_BITS, lanes

WORDS = 4  # 32-bit words in a block of 128 bits
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # float64 sqrt(1/2), whose pattern splits exponent and mantissa
MANTISSA_BITS = 52
TWO_LN_2 = 2 * math.log(2)
QUARTER_TURN = math.pi / 2 / 2**30  # radians of one unit of a word's lower 30 bits

# Highest power first, as Horner's rule takes them. What is left out is below 2**-53 of the sum.
ATANH = tuple(1 / (2 * n + 1) for n in range(9, 0, -1))
SINE = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(7, 0, -1))
COSINE = tuple((-1) ** n / math.factorial(2 * n) for n in range(8, 0, -1))


def words(key: Tensor, member: Tensor, samples: Tensor, step: int, count: int) -> Tensor:
    """The 32-bit words of the first `count` elements of each sample's mask.

    Args:
        key, member, samples, step: as in `philox.lanes`.
        count: elements of one sample's mask.

    Returns:
        (B, count) int64 in [0, 2**32).
    """
    halves = lanes(key, member, samples, step, 2 * count).unflatten(1, (count, 2))
    return halves[..., 0] | halves[..., 1] << LANE_BITS


def uniform(word: Tensor) -> Tensor:
    """Uniform noise of mean 0 and variance 1 before its factor sqrt(3): v in (-1, 1), exact in float64."""
    return (2 * word + 1 - 2**32).double() / 2.0**32


def _horner(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    total = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * z + coefficient
    return total


def minus_two_log(word: Tensor) -> Tensor:
    """-2 ln((2 word + 1) / 2**33): the argument is 2**k m, m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m-1) / (m+1))."""
    bits = (2 * word + 1).double().view(torch.int64)
    exponent = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    m = (bits - (exponent << MANTISSA_BITS)).view(torch.float64)
    s = (m - 1) / (m + 1)
    z = s * s
    return (33 - exponent).double() * TWO_LN_2 - 4 * (s + s * (z * _horner(ATANH, z)))


def cosine_and_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Of the angle 2 pi word / 2**32: the nearest quarter turn is taken off, polynomials do the rest."""
    quarter = (word + (1 << 29)) >> 30
    angle = (word - (quarter << 30)).double() * QUARTER_TURN  # in [-pi/4, pi/4]
    z = angle * angle
    sine = angle + angle * (z * _horner(SINE, z))
    cosine = 1 + z * _horner(COSINE, z)
    odd = (quarter & 1) == 1
    return (
        torch.where(odd, sine, cosine) * (1 - ((quarter + 1) & 2)).double(),
        torch.where(odd, cosine, sine) * (1 - (quarter & 2)).double(),
    )


def gaussian(word: Tensor) -> Tensor:
    """Standard normal noise from pairs of words; (B, even) to the same shape, float64."""
    square = minus_two_log(word[..., 0::2])
    # NumPy's root: torch.sqrt may ask a vector library, of whose roots 1 % are not rounded as IEEE 754 has it. On
    # other devices torch's root is the hardware's or compiler's own, which for float64 is.
    radius = torch.from_numpy(np.sqrt(square.numpy())) if square.device.type == "cpu" else square.sqrt()
    cosine, sine = cosine_and_sine(word[..., 1::2])
    return torch.stack([radius * cosine, radius * sine], dim=-1).flatten(-2)


def uniform_noise(key: Tensor, member: Tensor, samples: Tensor, step: int, count: int) -> Tensor:
    """(B, count) float64 in (-1, 1), of variance 1/3: what the factor sqrt(3) makes noise of variance 1."""
    return uniform(words(key, member, samples, step, count))


def gaussian_noise(key: Tensor, member: Tensor, samples: Tensor, step: int, count: int) -> Tensor:
    """(B, count) float64, standard normal; an element's noise does not depend on the count."""
    return gaussian(words(key, member, samples, step, count + count % 2))[:, :count]


def exact_keep(key: Tensor, member: Tensor, samples: Tensor, step: int, count: int, drop: int) -> Tensor:
    """A mask that drops exactly `drop` elements of each sample, all sets of that size being equally likely.

    Equal words (of n elements, a chance below n**2 / 2**33 that there are any) fall to the first of them.

    Returns:
        (B, count) bool, True where a value stays.
    """
    order = words(key, member, samples, step, count).sort(dim=1, stable=True).indices
    keep = torch.ones_like(order, dtype=torch.bool)
    return keep.scatter(1, order[:, :drop], False)
