"""What all dropout layers share: when they act, and under which name they draw."""

from __future__ import annotations

import torch
from torch import nn

from dropkit.masks import address


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
        if self.training or torch.compiler.is_compiling():  # a graph of an evaluation pass holds no mask
            return self.training
        context = address.current()
        return context is not None and context.member is not None


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
    return tuple(names)
