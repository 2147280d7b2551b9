"""Classic dropout: nothing is scaled in training, and evaluation pays for it with a factor 1 - p."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError, check_probability
from dropkit.masks import address, ops
from dropkit.masks.address import Draw
from dropkit.masks.philox import LANE_VALUES, threshold
from dropkit.nn.axes import check_axes
from dropkit.nn.features import Dropout, dropout
from dropkit.nn.layer import RateLayer
from dropkit.nn.schedules import Schedule


def kept_share(p: float | Tensor) -> Any:
    """1 - p of the rate that is really used: what survives on average.

    A number, and a 0-d tensor, are rounded to a multiple of 2**-16 (below that, of 2**-32); rates for each element are
    not.

    Args:
        p: in [0, 1]; a number, or a tensor.

    Returns:
        A number, or a float64 tensor of p's shape.
    """
    rate = torch.as_tensor(p, dtype=torch.float64)
    if rate.ndim:
        return 1 - rate
    t, fine = threshold(rate)
    kept = torch.where(fine > 0, (2**32 - fine).double() / 2.0**32, (LANE_VALUES - t).double() / LANE_VALUES)
    return kept if isinstance(p, Tensor) else float(kept)


def _unscaled(x: Tensor, p: float, where: Draw) -> Tensor:
    """x where the mask of this address keeps it, else 0."""
    shared = (0,) if where.batch_shared and x.ndim else ()
    mask = ops.dropout(
        torch.ones_like(x, requires_grad=False), where.key, where.member, p, *where[2:5], shared
    )
    return torch.where(mask == 0, 0.0, x)  # keeps the memory format, as masked_fill does not


class _Unscaled(torch.autograd.Function):
    """The same, and backward has the mask again from its address: nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, where: Draw) -> Tensor:
        ctx.p, ctx.where = p, where
        return _unscaled(x, p, where)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Unscaled.apply(gradients[0], ctx.p, ctx.where), None, None


def _masked(x: Tensor, p: float | Tensor, site: str | None, owner: object | None) -> Tensor:
    if (
        isinstance(p, Tensor)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        mask = dropout(torch.ones_like(x, requires_grad=False), p, site=site, owner=owner)
        return torch.where(mask == 0, 0.0, x)
    where = address.draw(owner, site)
    return _Unscaled.apply(x, p, where) if p else x


def classic_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Dropout as first published: survivors stay as they are, and in evaluation everything is multiplied by 1 - p.

    training    y[b, e] = x[b, e] * keep[b, e],    keep[b, e] ~ Bernoulli(1 - p)
    evaluation  y = (1 - p) x

    Both are 1 - p times what `dropout` gives at the same address. A committee member is a thinned network: mask,
    no scale. 1 - p is that of the rounded rate, so evaluation is the mean of training.

    Args:
        x: (B, *features), floating or complex; dim 0 counts the rows.
        p: chance to drop, in [0, 1]; a number, or a tensor that broadcasts against x.
        training: False gives (1 - p) x.
        inplace: write the result into x.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *features), dtype and device of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        OptionError: whole numbers, which cannot be multiplied by 1 - p.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Hinton et al. 2012, arXiv:1207.0580; Srivastava et al. 2014, JMLR 15, section 4 (there p is the chance to
    keep).
    """
    p = p if isinstance(p, Tensor) else check_probability(p)
    check_axes(x, "...")
    if training:
        result = _masked(x, p, site, owner)
    else:
        kept = kept_share(p)
        result = x * (kept.to(x.dtype) if isinstance(kept, Tensor) else kept)
    return x.copy_(result) if inplace else result


class ClassicDropout(RateLayer):
    """Layer around `classic_dropout`: masks without a scale, and a factor 1 - p while nobody asks for noise.

    `dropkit.nn.to_inverted` and `dropkit.nn.to_classic` turn a network into the same function with the other kind.

    Args:
        p: chance to drop, in [0, 1].
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape."""
        return classic_dropout(x, self.rate, self.active, self.inplace, site=self.site, owner=self)


# A positive factor passes through these unchanged, so that the weights behind them can take it over.
_HOMOGENEOUS = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.LeakyReLU, nn.PReLU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, Dropout, ClassicDropout,
)  # fmt: skip
_LINEAR = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def to_inverted(model: nn.Module) -> nn.Module:
    """A copy in which each `ClassicDropout` is a `Dropout`, and which is the same function in every mode.

    W keep x = W' keep x / (1 - p)  and  W (1 - p) x = W' x    with  W' = (1 - p) W

    W is the weight of the Linear or convolution that comes next in the same nn.Sequential, pooling, ReLU and the like
    in between; its bias stays. Sites keep their names, so masks and committee members stay the same.
    Training goes on differently from there: a step of the same size now moves W', and weight decay sees W'.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy.

    Raises:
        OptionError: a layer whose followers are not known, whose rate is not one number, or whose weight serves
            elsewhere too; the message says what to do by hand.

    Example:
        >>> import torch, dropkit as dk
        >>> classic = torch.nn.Sequential(dk.nn.ClassicDropout(0.5), torch.nn.Linear(4, 2)).eval()
        >>> inverted = dk.nn.to_inverted(classic)
        >>> inverted[0], torch.equal(inverted(torch.ones(1, 4)), classic(torch.ones(1, 4)))
        (Dropout(p=0.5, inplace=False), True)
    """
    return _converted(model, ClassicDropout, Dropout)


def to_classic(model: nn.Module) -> nn.Module:
    """A copy in which each `Dropout` is a `ClassicDropout`, and which is the same function in every mode.

    The way back from `to_inverted`, with W = W' / (1 - p); arguments and errors as there. A rate of 1 is refused too:
    nothing can be divided by 0.
    """
    return _converted(model, Dropout, ClassicDropout)


def _converted(model: nn.Module, old: type[RateLayer], new: type[RateLayer]) -> nn.Module:
    model = copy.deepcopy(model)
    followers = _followers(model)
    owners: dict[int, int] = {}  # parameter -> how many places use it
    for module in {id(m): m for _, m in model.named_modules(remove_duplicate=False)}.values():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    uses: dict[int, int] = {}  # module -> how many places it stands in
    for _, module in model.named_modules(remove_duplicate=False):
        uses[id(module)] = uses.get(id(module), 0) + 1
    problems = []
    steps: list[tuple[str, RateLayer, nn.Module, float]] = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, old):
            continue
        p = layer.p
        if isinstance(p, Schedule | Tensor):
            problems.append(
                f"{name!r} has a rate that is not one number: its factor 1 - p cannot be given to weights"
            )
            continue
        factor = kept_share(p)
        follower = followers.get(name)
        by_hand = (
            f"multiply the weights that read it by {factor if old is ClassicDropout else 1 / (factor or 1)}"
        )
        if follower is None:
            problems.append(f"what reads {name!r} is not known: put {new.__name__}({p}) there and {by_hand}")
        elif "weight" not in follower._parameters or uses[id(follower)] * owners[id(follower.weight)] > 1:
            problems.append(
                f"the weight that reads {name!r} is tied or computed: give each place its own, then {by_hand}"
            )
        elif factor == 0:
            problems.append(f"{name!r} drops everything (p=1): take it out, or lower its rate")
        else:
            steps.append((name, layer, follower, factor if old is ClassicDropout else 1 / factor))
    if problems:
        raise OptionError(f"{type(model).__name__} cannot be turned as it is: " + "; ".join(problems) + ".")
    for name, layer, follower, factor in steps:
        with torch.no_grad():
            follower.weight.mul_(factor)  # type: ignore[operator]
        replacement = new(layer.p, layer.inplace)
        replacement.site = layer.site
        replacement.train(layer.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    return model


def _followers(model: nn.Module) -> dict[str, nn.Module | None]:
    """For each module inside an nn.Sequential by name: the linear layer that reads it, if that is certain."""
    found: dict[str, nn.Module | None] = {}
    chains = {
        name: _flat(name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Sequential
    }
    for chain in sorted(
        chains.values(), key=len
    ):  # an outer chain knows more than its parts, and comes later
        for index, (name, _) in enumerate(chain):
            reader = next((m for _, m in chain[index + 1 :] if not isinstance(m, _HOMOGENEOUS)), None)
            found[name] = reader if isinstance(reader, _LINEAR) else None
    return found


def _flat(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a chain in order, chains inside it opened."""
    if type(module) is not nn.Sequential:
        return [(name, module)]
    return [
        part
        for child, inner in module._modules.items()
        if inner is not None
        for part in _flat(f"{name}.{child}" if name else child, inner)
    ]
