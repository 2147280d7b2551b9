"""Targeted dropout: only weights or units that seem to matter least are dropped, so that they can be pruned later."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dropkit.errors import OptionError, check_probability
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer

By = Literal["weights", "units"]


def targets(weight: Tensor, share: float, by: By = "weights") -> Tensor:
    """Which weights are candidates: the `share` of lowest magnitude.

    "weights": in each output unit, the round-down of share * n of its n weights with the smallest |w|
    "units":   the round-down of share * n of the n output units with the smallest ||w||_2, with all their weights

    Of equal magnitudes the first go first.

    Args:
        weight: (out, ...); of a transposed convolution, moved so that dim 0 counts the output units.
        share: gamma, in [0, 1].
        by: "weights" or "units".

    Returns:
        bool, the shape of weight for "weights", (out, 1, ...) for "units".
    """
    size = (
        weight.detach().flatten(1).abs() if by == "weights" else weight.detach().flatten(1).norm(dim=1)[None]
    )
    count = int(
        check_probability(share, "share") * size.shape[1] + 1e-9
    )  # 0.3 * 10 is 3, whatever the last bit
    order = size.argsort(dim=1, stable=True)[:, :count]
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter(1, order, True)
    return chosen.view_as(weight) if by == "weights" else chosen.view(-1, *[1] * (weight.ndim - 1))


def targeted_dropout(
    weight: Tensor,
    p: float | Tensor = 0.5,
    share: float = 0.5,
    training: bool = True,
    *,
    by: By = "weights",
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop weights, or whole output units, among those of lowest magnitude.

    w'[e] = w[e] * (1 - target[e] (1 - keep[e])),    keep[e] ~ Bernoulli(1 - p)

    Nothing is scaled: the aim is that targets learn to be 0. One mask serves the whole batch, and the expected share
    that falls is p * share.

    Args:
        weight: (out, ...).
        p: chance that a target is dropped, in [0, 1]; a number or a 0-d tensor.
        share: gamma, the share of candidates, in [0, 1]; see `targets`.
        training: False gives weight back.
        by: "weights" or "units".
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        Shape, dtype and device of weight.

    Raises:
        ProbabilityError: p or share is outside [0, 1].
        OptionError: by is neither of the two.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Gomez et al. 2019, arXiv:1905.13678, section 3.2 (there alpha is our p).
    """
    _check_by(by)
    check_probability(share, "share")
    if not isinstance(p, Tensor):
        check_probability(p)
    if not training:
        return weight
    target = targets(weight, share, by)
    # A leading dim of one, shared: one mask for all rows, whatever their ids are.
    ones = torch.ones(1, *target.shape, dtype=torch.float32, device=weight.device)
    falls = dropout(ones, p, shared=(0,), site=site, owner=owner)[0] == 0
    return torch.where(target & falls, 0.0, weight)


def _check_by(by: str) -> None:
    if by not in get_args(By):
        raise OptionError(f"by={by!r} was given; allowed: {get_args(By)}.")


class TargetedDropout(RateLayer):
    """A layer whose least weights, or units, are dropped; the layer around `targeted_dropout`.

    In evaluation all weights act, or after `pruned()` those that are left. A unit's bias stays.
    State-dict keys are those of the layer, behind "module.".

    Args:
        module: with a `weight` of (out, ...), such as nn.Linear or nn.Conv2d.
        p: chance that a target is dropped, in [0, 1].
        share: gamma, the share of candidates, in [0, 1].
        by: "weights" or "units".

    Raises:
        ProbabilityError: p or share is outside [0, 1].
        OptionError: a module without such a weight, or another `by`.
    """

    def __init__(self, module: nn.Module, p: Rate = 0.5, share: float = 0.5, by: By = "weights") -> None:
        super().__init__(p)
        _check_by(by)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or isinstance(module, _TRANSPOSED):
            raise OptionError(
                f"{type(module).__name__} was given; a layer with a weight of (out, in, ...) is needed, such as "
                "nn.Linear."
            )
        self.module = module
        self.share = check_probability(share, "share")
        self.by: By = by

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module makes of its input."""
        if not self.active:
            return self.module(*args, **kwargs)
        whole: Any = self.module.weight
        weight = targeted_dropout(
            whole,
            self.rate,
            self.share,
            by=self.by,
            site=self.site,
            owner=self,
        )
        return functional_call(self.module, {"weight": weight}, args, kwargs)

    def pruned(self) -> nn.Module:
        """A copy of the module whose targets are 0 for good: what training was to make harmless."""
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            weight: Any = module.weight
            weight.masked_fill_(targets(weight, self.share, self.by), 0.0)
        return module

    def extra_repr(self) -> str:
        """p, share and by."""
        return f"p={self.p}, share={self.share}, by={self.by!r}"


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
