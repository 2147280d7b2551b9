"""LayerDrop: layers of a stack are skipped, with a graph that is the same whichever they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer
from dropkit.nn.uniform import part_of


class _Skip(torch.autograd.Function):
    """The identity, whose gradient for the parameters that were not used is 0 and not missing."""

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.needs_input_grad[1:], ctx.saved_tensors, strict=True)
        return gradients[0], *(torch.zeros_like(tensor) if needed else None for needed, tensor in wanted)


class LayerDrop(RateLayer):
    """Layers one after another, each of which is skipped with chance p for the whole pass.

    h_l = h_{l-1}  with chance p,  else f_l(h_{l-1});    nothing is scaled, in evaluation every layer acts

    A skipped layer costs nothing. Its parameters get gradients of 0 and not None, so that the graph has the same leaves
    in every step: DistributedDataParallel, which waits for each parameter's gradient, does not hang, whether or not
    the ranks skip the same layers (with one seed and step they do). In a committee member the same layers are missing
    for every input. Under torch.func and in compiled graphs, where no decision can depend on a number, every layer is
    computed and the choice made after.

    State-dict keys are those of nn.Sequential and nn.ModuleList: "0.weight", ...

    Args:
        layers: modules that take and return one shape.
        p: chance to skip, in [0, 1]: a number, a schedule, or one number for each layer, such as
            `dropkit.nn.schedules.ramp(0.2, 12)`.

    Raises:
        ProbabilityError: a chance outside [0, 1].
        OptionError: no layers, or as many chances as there are not layers.

    Source: Fan et al. 2020, arXiv:1909.11556, section 3.2.

    Example:
        >>> import torch, dropkit as dk
        >>> stack = dk.nn.LayerDrop([torch.nn.Linear(4, 4) for _ in range(6)], p=0.5)
        >>> with dk.masks(seed=0, step=1):
        ...     y = stack(torch.ones(2, 4))
        >>> y.sum().backward()
        >>> all(weight.grad is not None for weight in stack.parameters())
        True
    """

    def __init__(self, layers: Iterable[nn.Module], p: Rate | Sequence[float] = 0.5) -> None:
        modules = list(layers)
        if not modules:
            raise OptionError("no layers were given; at least one is needed.")
        if isinstance(p, Sequence) and not isinstance(p, str):
            p = torch.tensor([check_probability(rate) for rate in p], dtype=torch.float64)
        if isinstance(p, Tensor) and p.ndim and p.shape != (len(modules),):
            raise OptionError(
                f"{tuple(p.shape)} chances were given for {len(modules)} layers; give one number, or one for each."
            )
        super().__init__(p)
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, *) -> the same shape. Further arguments go to every layer."""
        layers = [module for module in self._modules.values() if module is not None]
        if not self.active:
            for layer in layers:
                x = layer(x, *args, **kwargs)
            return x
        skipped = self._decide(len(layers), x.device)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            for layer, skip in zip(layers, skipped, strict=True):
                x = torch.where(skip, x, _same_shape(layer(x, *args, **kwargs), x, layer))
            return x
        for layer, skip in zip(layers, torch.stack(skipped).tolist(), strict=True):
            if not skip:
                x = _same_shape(layer(x, *args, **kwargs), x, layer)
            elif torch.is_grad_enabled():
                x = _Skip.apply(x, *(weight for weight in layer.parameters() if weight.requires_grad))
        return x

    def _decide(self, layers: int, device: torch.device) -> list[Tensor]:
        """Which layers are skipped, () bool each; every layer has an address of its own."""
        rate = self.rate
        rates = rate.unbind() if isinstance(rate, Tensor) and rate.ndim else [rate] * layers
        one = torch.ones(1, device=device)
        # Dim 0 is shared: one decision for all rows of a pass, whatever their ids are.
        return [
            dropout(one, p, shared=(0,), site=part_of(self.site, f"skip{index}"), owner=self)[0] == 0
            for index, p in enumerate(rates)
        ]

    def extra_repr(self) -> str:
        """p, or where each layer has its own, all of them."""
        rates = self.p.tolist() if isinstance(self.p, Tensor) else self.p
        return f"p={rates}"


def _same_shape(y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    if not isinstance(y, Tensor) or y.shape != x.shape:
        given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"{type(layer).__name__} made {given} of {tuple(x.shape)}; a layer that can be skipped returns the shape "
            "that it was given."
        )
    return y
