"""What all dropout layers share: when they act, at which rate, and under which name they draw."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from dropkit.errors import ProbabilityError, check_probability
from dropkit.masks import address, compiled
from dropkit.nn.schedules import Schedule, rate_at_step

Rate = float | Tensor | Schedule


def check_rate(p: float | Tensor) -> float | Tensor:
    """Return a number as a float, and a tensor of chances as it is.

    Raises:
        ProbabilityError: a value outside [0, 1], or a tensor of whole numbers or switches.
    """
    if not isinstance(p, Tensor) or p.ndim == 0:
        return check_probability(p)  # type: ignore[arg-type]
    if not p.is_floating_point():
        raise ProbabilityError(
            f"p of dtype {p.dtype} was given; chances are floating-point numbers in [0, 1]."
        )
    if p.numel() and not bool(((p >= 0) & (p <= 1)).all()):  # stated as what is allowed, so NaN fails too
        raise ProbabilityError(
            f"p from {p.min().item()} to {p.max().item()} was given; every chance lies in [0, 1]. "
            "Give chances to drop, not to keep."
        )
    return p


class StochasticLayer(nn.Module):
    """Parent of the layers through which chance enters a model; never built itself.

    Attributes:
        site: the layer's qualified name in its model, part of the address of its masks; set by `name_sites`.
            A layer without a name is known by its order in the pass.
    """

    site: str | None

    def __init__(self) -> None:
        super().__init__()
        self.site = None

    @property
    def active(self) -> bool:
        """Whether masks act: in training, and in evaluation when a committee member is asked for."""
        if self.training or torch.compiler.is_compiling():
            # A graph of an evaluation pass holds no mask, unless it is recorded for a committee.
            return self.training or compiled.members_recorded()
        context = address.current()
        return context is not None and context.member is not None


def rate_now(p: Rate, layer: nn.Module) -> float | Tensor:
    """p, or what its schedule says: in training at the step of the open context, for a committee its last word.

    Raises:
        AddressError: p is a schedule, and no context says which step this is.
    """
    if not isinstance(p, Schedule):
        return p
    if not layer.training:
        return p.final
    return rate_at_step(p, type(layer).__name__)


class RateLayer(StochasticLayer):
    """Parent of the layers that have one rate; never built itself.

    Args:
        p: chance to drop, in [0, 1]: a number, a tensor that broadcasts against the mask (one rate for each feature,
            or sample), or a `Schedule` of the step.
        inplace: write the result into the input.
    """

    p: Rate

    def __init__(self, p: Rate = 0.5, inplace: bool = False) -> None:
        super().__init__()
        rate = p if isinstance(p, Schedule) else check_rate(p)
        if isinstance(rate, Tensor):
            self.register_buffer("p", rate, persistent=False)  # moves with the model, adds no key
        else:
            self.p = rate
        self.inplace = inplace

    @property
    def rate(self) -> float | Tensor:
        """p, or what its schedule says: in training at the step of the open context, for a committee its last word.

        Raises:
            AddressError: p is a schedule, and no context says which step this is.
        """
        return rate_now(self.p, self)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> what the layer's function makes of it; the identity while nobody asks for noise."""

    def extra_repr(self) -> str:
        """p and inplace, as torch.nn.Dropout shows them."""
        p = f"tensor of {tuple(self.p.shape)}" if isinstance(self.p, Tensor) and self.p.ndim else self.p
        return f"p={p}, inplace={self.inplace}"


def name_sites(model: nn.Module) -> tuple[str, ...]:
    """Give every dropkit layer of `model` its qualified name, so that its masks do not depend on call order.

    A layer that stands in several places keeps its first name, as in `nn.Module.named_modules`.

    Args:
        model: any module; it is changed in place, in this one attribute.

    Returns:
        The names, in the order of `named_modules`. The model itself, when it is a dropkit layer, is named "".
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, StochasticLayer):
            module.site = name
            names.append(name)
        elif "dropkit_site" in vars(
            module
        ):  # a module of another package whose calls `dropkit.convert` serves
            vars(module)["dropkit_site"] = name
    return tuple(names)
