"""What the members' class probabilities say about doubt, in nats.

entropy of the mean = mean of the entropies + mutual information
(all doubt)           (the data's: aleatoric) (the members': epistemic)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dropkit.errors import NotProbabilitiesError, ShapeError

ROW_SUM_TOLERANCE = 1e-4


def check_class_probabilities(probs: Tensor, axes: str = "M B C", *, unknown: bool = False) -> None:
    """Say what is wrong with probabilities, if anything is.

    Args:
        probs: what is looked at.
        axes: their names.
        unknown: let rows pass that are nan throughout, as softmax makes them of logits that are not finite.

    Raises:
        ShapeError: the number of axes differs from `axes`, or the last axis is empty.
        NotProbabilitiesError: a value is outside [0, 1] or not a number, or a row does not sum to 1 within 1e-4.
    """
    names = axes.split()
    if probs.ndim != len(names) or probs.shape[-1] == 0:
        given = tuple(probs.shape)
        raise ShapeError(
            f"class probabilities of shape {given} were given; the axes are ({', '.join(names)})."
        )
    if not probs.is_floating_point():
        raise NotProbabilitiesError(
            f"{probs.dtype} values were given; class probabilities are floating point numbers."
        )
    if probs.numel() == 0:
        return
    low, high, worst = _range(probs.detach())
    if unknown and math.isnan(low):
        known = probs.detach()[~probs.isnan().all(dim=-1)]
        if known.numel() == 0:
            return
        low, high, worst = _range(known)
    inside = low >= 0.0 and high <= 1.0 + ROW_SUM_TOLERANCE  # stated as what is allowed, so NaN fails too
    if not (inside and worst <= ROW_SUM_TOLERANCE):
        raise NotProbabilitiesError(
            f"rows with values in [{low:.6g}, {high:.6g}] and sums up to {worst:.3g} away from 1 were given; "
            "class probabilities lie in [0, 1] and sum to 1. If these are logits, apply softmax over the last axis."
        )


def entropy(probs: Tensor) -> Tensor:
    """How undecided each row of probabilities is, in nats.

    H[...] = -sum over c of probs[..., c] * log probs[..., c],    0 * log 0 = 0

    Args:
        probs: (..., C), each row summing to 1. Logits are refused, never guessed.

    Returns:
        (...) between 0 (certain) and log C (uniform); dtype of probs, summed in float64.

    Raises:
        NotProbabilitiesError: a row is not a probability vector.
    """
    check_class_probabilities(probs, axes=" ".join(["..."] * (probs.ndim - 1) + ["C"]))
    return doubt(probs.double()).to(probs.dtype)


def expected_entropy(probs: Tensor) -> Tensor:
    """How undecided the members are on average, in nats: the doubt that more members would not remove.

    E[b] = mean over m of H(probs[m, b])

    Args:
        probs: (M, B, C) class probabilities of the members.

    Returns:
        (B,) between 0 and log C.

    Raises:
        ShapeError: probs has not three axes.
        NotProbabilitiesError: a row is not a probability vector.
    """
    check_class_probabilities(probs)
    return doubt(probs.double()).mean(dim=0).to(probs.dtype)


def mutual_information(probs: Tensor) -> Tensor:
    """How much the members disagree about the class, in nats (known as BALD).

    I[b] = H(mean over m of probs[m, b]) - mean over m of H(probs[m, b])
         = mean over m of KL(p || q),    p = probs[m, b], q = mean over m of p

    The second line is what is computed. No summand is negative, so nothing large is subtracted from anything
    large: members that agree give exactly 0, and two that differ by 1e-4 keep their digits, where the first
    line in float32 leaves only rounding error, of either sign.

    Args:
        probs: (M, B, C) class probabilities, each row summing to 1. Logits are refused, never guessed.

    Returns:
        (B,) between 0 (all agree) and log min(M, C).

    Raises:
        ShapeError: probs has not three axes.
        NotProbabilitiesError: a row is not a probability vector.

    Source: Houlsby et al. 2011, arXiv:1112.5745, eq. 2.
    """
    check_class_probabilities(probs)
    return disagreement(probs)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """How far q is from p, in nats (Kullback-Leibler).

    KL(p || q)[...] = sum over c of (p log(p / q) - p + q) = sum over c of p (x - log(1 + x)),    x = (q - p) / p

    Where |x| is below 1/2 the second form is computed, as near p = q the first would cancel; elsewhere the first.

    Args:
        p: (..., C) float64.
        q: (..., C) float64, broadcast against p; above 0 wherever p is, else the divergence is infinite.

    Returns:
        (...), at least 0, and exactly 0 where p and q agree.
    """
    there = p >= torch.finfo(p.dtype).tiny  # below, 1 / p overflows, and p log p is nothing
    safe = torch.where(there, p, torch.ones_like(p))
    x = (q - safe) / safe
    near = x.abs() < 0.5
    x = torch.where(near, x, torch.zeros_like(x))
    apart = safe * (safe.log() - torch.where(near, safe, q).log()) - safe + q
    summand = torch.where(there, torch.where(near, safe * (x - torch.log1p(x)), apart), q - p)
    return summand.sum(dim=-1).clamp_min(0.0)  # the last digits may be negative


def disagreement(probs: Tensor) -> Tensor:
    """`mutual_information` of probabilities that were checked before; nan where a row is."""
    member = probs.double()
    mean = member[0] + (member - member[0]).mean(dim=0)  # exact where all members agree
    return divergence(member, mean).mean(dim=0).to(probs.dtype)


def doubt(probs: Tensor) -> Tensor:
    """`entropy` of probabilities that were checked before, in their dtype; nan where a row is."""
    # A row may sum to 1 + 1e-7 and hold one value above 1, whose summand is then a little below 0.
    summand: Tensor = torch.special.entr(probs)
    return summand.sum(dim=-1).clamp_min(0.0)


def _range(probs: Tensor) -> tuple[float, float, float]:
    low, high = (float(bound) for bound in torch.aminmax(probs))
    return low, high, float((probs.sum(dim=-1, dtype=torch.float64) - 1).abs().max())
