"""The map that weights make, linear or a convolution: how it is applied, with one weight or with one for each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropkit.errors import OptionError, ShapeError
from dropkit.masks import compiled

Map = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, slots=True)
class Convolution:
    """What a convolution is beside its weights; each field as in torch.nn.Conv1d to Conv3d.

    Attributes:
        space: how many dims of space, 1 to 3.
        stride, dilation: one number for each dim of space, or one for all.
        padding: likewise, or "same" or "valid".
        groups: of channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    space: int
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Module) -> Convolution | None:
        """That of a layer; None for a linear one.

        Raises:
            OptionError: the layer is neither.
        """
        if isinstance(module, nn.Linear):
            return None
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            space = module.weight.ndim - 2
            return cls(
                space, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
            )
        given = "nothing" if module is None else type(module).__name__
        raise OptionError(f"{given} was given; allowed: nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d.")

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.space if isinstance(value, int) else tuple(value)

    def _pads(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """How much is put before and after each dim of space, last dim first, as F.pad takes it."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self._each(self.dilation), kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(n, n) for n in self._each(0 if isinstance(self.padding, str) else self.padding)]
        return tuple(n for side in reversed(sides) for n in side)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Tensor:
        """The convolution itself."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pads(tuple(weight.shape[2:])), mode=self.padding_mode), 0
        return _CONVOLVE[self.space - 1](
            x, weight, bias, self.stride, padding, self.dilation, groups or self.groups
        )

    def by_row(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, I, *space) and a weight for each row, (B, O, I / groups, *kernel): the rows as groups of one image."""
        rows = x.shape[0]
        y = self(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), bias, groups=rows * self.groups)
        return y.reshape(rows, -1, *y.shape[2:])


def _linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, *, I) and a weight for each row, (B, O, I)."""
    between = math.prod(x.shape[1:-1])
    y = x.reshape(x.shape[0], between, x.shape[-1]) @ weight.mT
    return y.reshape(*x.shape[:-1], weight.shape[1]) + (0 if bias is None else bias)


def map_of(convolution: Convolution | None, by_row: bool = False) -> Map:
    """The map as a function of x, weight and bias; None is linear.

    Args:
        convolution: what kind.
        by_row: each row of x has a weight of its own, along dim 0, and all the same bias or none.
    """
    if convolution is None:
        return _linear_by_row if by_row else F.linear
    return convolution.by_row if by_row else convolution


def check_map(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> None:
    """See that x, weight and bias make a map.

    Raises:
        ShapeError: they do not.
        OptionError: numbers that are not floating.
    """
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise OptionError(
            f"x of {x.dtype} and a weight of {weight.dtype} were given; both are floating-point numbers."
        )
    space, groups = (0, 1) if convolution is None else (convolution.space, convolution.groups)
    allowed = "(O, I)" if convolution is None else f"(O, I / groups, *kernel) with {space} dims of space"
    if weight.ndim != space + 2:
        raise ShapeError(f"weight of shape {tuple(weight.shape)} was given; allowed: {allowed}.")
    needs = weight.shape[1] * groups
    if convolution is None:
        fits, layout = x.ndim >= 1 and x.shape[-1] == needs, f"(B, *, {needs})"
    else:
        names = ", ".join(("depth", "height", "width")[3 - space :])
        fits = x.ndim in (space + 1, space + 2) and x.shape[-space - 1] == needs
        layout = f"(B, {needs}, {names}), or one row ({needs}, {names})"
    if not fits:
        raise ShapeError(f"x of shape {tuple(x.shape)} was given; the weight needs {layout}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"bias of shape {tuple(bias.shape)} was given; it is (O,), here ({len(weight)},).")


def take_over(layer: nn.Module, module: nn.Module) -> None:
    """Give a layer the parameters of the module it is made from, under their own names, and what the map is.

    Raises:
        OptionError: the module is neither linear nor a convolution.
    """
    layer.convolution = Convolution.of(module)  # type: ignore[assignment]
    layer.weight, layer.bias = module.weight, module.bias
    layer.described = f"{type(module).__name__}({module.extra_repr()})"  # type: ignore[assignment]
    layer.train(module.training)


def one_for_all_rows() -> bool:
    """Whether the open context asks for one member of all rows."""
    context = compiled.context_to_read()
    return context is not None and context.member is not None and context.samples is None


def is_batched(x: Tensor, convolution: Convolution | None) -> bool:
    """Whether dim 0 counts rows; else x is one row."""
    return x.ndim > (1 if convolution is None else convolution.space + 1)


def channel_dim(x: Tensor, convolution: Convolution | None) -> int:
    """Which dim counts the features that weights act on: the last, or the one before space."""
    return x.ndim - 1 - (0 if convolution is None else convolution.space)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast, in the dtype in which torch's own maps would work."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
