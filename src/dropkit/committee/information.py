"""What the members' class probabilities say about doubt, in nats.

entropy of the mean = mean of the entropies + mutual information
(all doubt)           (the data's: aleatoric) (the members': epistemic)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.errors import NotProbabilitiesError, ShapeError

ROW_SUM_TOLERANCE = 1e-4


def check_class_probabilities(probs: Tensor, axes: str = "M B C") -> None:
    """Say what is wrong with probabilities, if anything is.

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
    low, high = (float(bound) for bound in torch.aminmax(probs.detach()))
    inside = low >= 0.0 and high <= 1.0 + ROW_SUM_TOLERANCE  # stated as what is allowed, so NaN fails too
    worst = float((probs.detach().sum(dim=-1, dtype=torch.float64) - 1).abs().max())
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
    return _entropy(probs.double()).to(probs.dtype)


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
    return _entropy(probs.double()).mean(dim=0).to(probs.dtype)


def mutual_information(probs: Tensor) -> Tensor:
    """How much the members disagree about the class, in nats (known as BALD).

    I[b] = H(mean over m of probs[m, b]) - mean over m of H(probs[m, b])
         = mean over m of sum over c of (p log(p / q) - p + q),    p = probs[m, b, c], q = mean over m of p

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
    member = probs.double()
    mean = member[0] + (member - member[0]).mean(dim=0)  # exact where all members agree
    divergence = torch.xlogy(member, member) - torch.xlogy(member, mean) - member + mean
    return divergence.sum(dim=-1).mean(dim=0).clamp_min(0.0).to(probs.dtype)


def _entropy(probs: Tensor) -> Tensor:
    # A row may sum to 1 + 1e-7 and hold one value above 1, whose summand is then a little below 0.
    summand: Tensor = torch.special.entr(probs)
    return summand.sum(dim=-1).clamp_min(0.0)
