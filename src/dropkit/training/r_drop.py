"""R-Drop: two thinned networks see each row, and are held to one answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dropkit.errors import AddressError, OptionError, ShapeError
from dropkit.masks import address, masks

Rowwise = Callable[[Tensor, Tensor], Tensor]


def two_passes(model: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, Any]:
    """What a model says of each row under two masks.

    The first pass has the masks that training has without a second one; the second those of member 1 of the same row
    and step, so both are functions of their address, whatever the batch. Outside of a context both are drawn anew.
    Activation checkpointing, which computes a pass again in the backward pass, cannot find its masks here and says so.

    Args:
        model: in training mode.
        inputs, named: what it is called with. Without row ids in the context, dim 0 of the first tensor counts rows.

    Returns:
        The two results.

    Raises:
        AddressError: the context asks for a member, which has one mask.
        ShapeError: the context has no row ids, and no tensor counts the rows.
    """
    context = address.current()
    if context is None:
        return model(*inputs, **named), model(*inputs, **named)
    if context.member is not None:
        raise AddressError(
            f"member={context.member} was given; a member has one mask, and two are compared here. Leave it out."
        )
    rows = context.samples
    if rows is None:
        tensors = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.ndim]
        if not tensors:
            raise ShapeError("no tensor with rows was given; say which they are: masks(..., samples=ids).")
        rows = torch.arange(context.row_offset, context.row_offset + len(tensors[0]))
    said = []
    for member in (0, 1):
        with masks(seed=context.seed, step=context.step, member=member, samples=rows):
            said.append(model(*inputs, **named))
    return said[0], said[1]


def categorical_divergence(a: Tensor, b: Tensor) -> Tensor:
    """How far two sets of class probabilities are apart, by the symmetric Kullback-Leibler divergence.

    D = 1/2 [KL(P || Q) + KL(Q || P)] = 1/2 sum over c of (P[c] - Q[c]) (log P[c] - log Q[c]),    P = softmax(a)

    Args:
        a, b: (..., C) logits.

    Returns:
        (...), nats; 0 where both agree.

    Raises:
        ShapeError: the shapes differ.

    Source: Liang et al. 2021, NeurIPS, arXiv:2106.14448, eq. 2.
    """
    _check_pair(a, b)
    log_p, log_q = torch.log_softmax(a, dim=-1), torch.log_softmax(b, dim=-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)


def gaussian_divergence(a: Tensor, b: Tensor) -> Tensor:
    """The same of two Gaussians.

    D = 1/4 [(v + d^2) / w + (w + d^2) / v - 2],    d = difference of the means, v and w the variances

    Args:
        a, b: (..., 2), mean and log variance, as `gaussian_nll` takes them.

    Returns:
        (...), nats.

    Raises:
        ShapeError: the shapes differ, or the last axis is not 2.
    """
    _check_pair(a, b)
    if a.shape[-1:] != (2,):
        raise ShapeError(
            f"outputs of shape {tuple(a.shape)} were given; mean and log variance need (..., 2)."
        )
    (mean, log_v), (other, log_w) = a.unbind(-1), b.unbind(-1)
    apart, ratio = (mean - other).square(), log_v - log_w
    spread = 0.5 * torch.expm1(ratio) * -torch.expm1(-ratio)  # (v / w + w / v - 2) / 2, without cancellation
    return 0.5 * spread + 0.25 * apart * (torch.exp(-log_v) + torch.exp(-log_w))


def r_drop(
    a: Tensor,
    b: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    *,
    loss: Rowwise = nn.functional.cross_entropy,
    divergence: Rowwise = categorical_divergence,
) -> Tensor:
    """The loss of two passes, and what they disagree by.

    L = 1/2 [loss(a, y) + loss(b, y)] + alpha mean over rows of D(a, b)

    The paper adds the two losses, its authors' program takes their mean; alpha is that of the program.

    Args:
        a, b: what the model says under two masks, see `two_passes`.
        target: what `loss` takes for these rows.
        alpha: weight of the disagreement, not negative; 1 to 5 in the paper.
        loss: of (outputs, target), a number or one for each row, of which the mean is taken.
        divergence: of two outputs, one number for each row: `categorical_divergence` of logits (..., C),
            `gaussian_divergence` of (..., 2), or your own.

    Returns:
        A number.

    Raises:
        OptionError: alpha is negative or not finite.
        ShapeError: the outputs differ in shape.

    Source: Liang et al. 2021, NeurIPS, arXiv:2106.14448, eq. 1 to 4.

    Example:
        >>> import torch, dropkit as dk
        >>> from dropkit.training import r_drop, two_passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), dk.nn.Dropout(0.3), torch.nn.Linear(16, 3))
        >>> x, y = torch.ones(5, 8), torch.tensor([0, 1, 2, 0, 1])
        >>> with dk.masks(seed=0, step=0, samples=torch.arange(5)):
        ...     a, b = two_passes(model, x)
        >>> r_drop(a, b, y, alpha=2.0).shape
        torch.Size([])
    """
    if not 0 <= alpha < float("inf"):
        raise OptionError(f"alpha={alpha!r} was given; the weight of the disagreement is a number from 0 on.")
    apart = divergence(a, b)
    return 0.5 * (loss(a, target).mean() + loss(b, target).mean()) + alpha * apart.mean()


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim == 0:
        raise ShapeError(
            f"outputs of shapes {tuple(a.shape)} and {tuple(b.shape)} were given; two passes give one shape (..., C)."
        )
