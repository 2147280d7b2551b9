"""Multi-sample dropout: several masks before one head, in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError, ShapeError
from dropkit.masks import compiled
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer, StochasticLayer


class MultiSampleDropout(RateLayer):
    """A head asked under K masks of its input, with one set of weights.

    outputs  f_k(x) = head(dropout_k(x)),    k = 1 ... K
    forward  y = 1/K sum over k of f_k(x)
    loss     L = 1/K sum over k of criterion(f_k(x), target)

    The K copies go through the head as one batch of B K rows, so that what comes before is computed once. Training
    converges in fewer steps; for a convex criterion the mean loss is no smaller than the loss of the mean output.
    In evaluation the head is asked once, without a mask. A committee member is one thinned network: it has one mask,
    the first of the K.

    Args:
        head: module of (B, *features) -> (B, *out). It must not hold a dropkit layer itself: its rows would be
            counted wrongly.
        p: chance to drop, in [0, 1].
        samples: K, at least 1; 8 in the paper.

    Raises:
        ProbabilityError: p is outside [0, 1].
        OptionError: samples below 1, or a head with a dropkit layer in it.

    Source: Inoue 2019, arXiv:1905.09788.

    Example:
        >>> import torch, dropkit as dk
        >>> head = dk.nn.MultiSampleDropout(torch.nn.Linear(16, 3), p=0.5, samples=4)
        >>> x, target = torch.ones(5, 16), torch.tensor([0, 1, 2, 0, 1])
        >>> head(x).shape, head.outputs(x).shape, head.loss(x, target, torch.nn.functional.cross_entropy).shape
        (torch.Size([5, 3]), torch.Size([4, 5, 3]), torch.Size([]))
    """

    def __init__(self, head: nn.Module, p: Rate = 0.5, samples: int = 8) -> None:
        super().__init__(p)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise OptionError(f"samples={samples!r} was given; how many masks is a whole number from 1 on.")
        inside = [
            name or type(m).__name__ for name, m in head.named_modules() if isinstance(m, StochasticLayer)
        ]
        if inside:
            raise OptionError(
                f"the head holds dropkit layers, {inside}; take them out, this layer has the masks."
            )
        self.head = head
        self.samples = samples

    def outputs(self, x: Tensor) -> Tensor:
        """What the head says under each mask.

        Args:
            x: (B, *features).

        Returns:
            (K, B, *out); K is 1 in evaluation and for a committee member.

        Raises:
            ShapeError: x has no dim of rows.
        """
        if x.ndim == 0:
            raise ShapeError("x of shape () was given; allowed: (B, *features), dim 0 counting the rows.")
        if not self.active:
            return self.head(x).unsqueeze(0)
        context = compiled.context_to_read()
        count = self.samples if context is None or context.member is None else 1
        copies = x.unsqueeze(1).expand(-1, count, *x.shape[1:])  # (B, K, *features)
        noisy = dropout(copies, self.rate, site=self.site, owner=self)
        out: Tensor = self.head(noisy.flatten(0, 1))
        return out.unflatten(0, (x.shape[0], count)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> (B, *out), the mean over the masks."""
        return self.outputs(x).mean(0)

    def loss(self, x: Tensor, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean over the masks of a criterion of (output, target).

        Args:
            x: (B, *features).
            target: what the criterion takes for B rows.
            criterion: of (B, *out) and the target to a number, or to (B,).

        Returns:
            What the criterion returns.
        """
        return torch.stack([criterion(output, target) for output in self.outputs(x)]).mean(0)

    def extra_repr(self) -> str:
        """p and K."""
        return f"p={self.p}, samples={self.samples}"
