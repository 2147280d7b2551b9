"""One mask for the whole batch, and matrices that are really cut: a dropout that saves the work it drops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError, ProbabilityError, ShapeError, check_probability
from dropkit.nn.convolution import Convolution, channel_dim, check_map, map_of
from dropkit.nn.features import dropout
from dropkit.nn.layer import Rate, RateLayer

# What may stand between two maps: it treats the features of a row alike and apart, so it never sees which are missing.
BETWEEN: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink,
    nn.Softshrink, nn.Hardshrink, nn.Threshold,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip


def thinned_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    convolution: Convolution | None = None,
) -> Tensor:
    """A linear map or convolution of the kept features alone, to the kept features alone.

    y[b, o] = sum over i of weight[outputs[o], inputs[i]] * x[b, i] + bias[outputs[o]]

    Costs B times the kept inputs times the kept outputs, and a copy of that part of the weight; gradients likewise.

    Args:
        x: (B, *, I'), or (B, I', *space) for a convolution: the kept inputs only.
        weight: (O, I), or (O, I, *kernel); all of it.
        bias: (O,) or None; all of it.
        inputs: (I',) int64, which inputs x holds, or None: all.
        outputs: (O',) int64, which outputs are wanted, or None: all.
        convolution: stride, padding and dilation, with one group; None for a linear map.

    Returns:
        (B, *, O'), or (B, O', *space).

    Raises:
        ShapeError: x does not have as many features as are kept.
        OptionError: a convolution with groups.

    Source: Graham, Reizenstein and Robinson 2015, arXiv:1502.02478, "Efficient batchwise dropout training using
        submatrices".
    """
    if convolution is not None and convolution.groups != 1:
        raise OptionError(
            f"groups={convolution.groups} were given; only a convolution with one group can be cut."
        )
    if outputs is not None:
        weight, bias = (
            weight.index_select(0, outputs),
            None if bias is None else bias.index_select(0, outputs),
        )
    if inputs is not None:
        weight = weight.index_select(1, inputs)
    check_map(x, weight, bias, convolution)
    return map_of(convolution)(x, weight, bias)


@dataclass(frozen=True, slots=True)
class _Stage:
    """A map, and what follows it up to the next one.

    Attributes:
        map: name of the map in the sequence.
        after: names of what follows.
        units: how many features the map's input has that fall one by one.
        each: how many inputs of the map a unit is: the places of a channel, where a convolution was flattened, else 1.
        convolution: what kind of map.
    """

    map: str
    after: tuple[str, ...]
    units: int
    each: int
    convolution: Convolution | None


def _stages(module: nn.Sequential) -> tuple[tuple[str, ...], tuple[_Stage, ...]]:
    """Names of what stands before the first map, and the stages.

    Raises:
        OptionError: a layer between the maps that cannot be cut.
    """
    before: list[str] = []
    found: list[tuple[str, list[str]]] = []
    for name, layer in module.named_children():
        if type(layer) in (
            nn.Linear,
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
        ):  # of a subclass, forward may be another
            found.append((name, []))
        elif type(layer) not in (*BETWEEN, nn.Flatten) or (
            isinstance(layer, nn.Flatten) and layer.start_dim != 1
        ):
            raise OptionError(
                f"{name}: {layer} was given; allowed are nn.Linear, nn.Conv1d to 3d, nn.Flatten, pooling, and "
                "activations without parameters. Layers that look at all features, such as norms, stay outside."
            )
        else:
            (found[-1][1] if found else before).append(name)
    if not found:
        raise OptionError("no linear or convolutional layer was given; there is nothing to cut.")
    stages, before_out = [], 0
    for i, (name, after) in enumerate(found):
        mapped = module.get_submodule(name)
        weight, convolution = mapped.weight, Convolution.of(mapped)
        assert isinstance(weight, Tensor)
        if convolution is not None and convolution.groups != 1:
            raise OptionError(f"{name}: {mapped} was given; only a convolution with one group can be cut.")
        units = weight.shape[1] if i == 0 else before_out
        if weight.shape[1] % units:
            raise ShapeError(
                f"{name}: {mapped} was given after a map to {units} features; its inputs are a multiple of them."
            )
        stages.append(_Stage(name, tuple(after), units, weight.shape[1] // units, convolution))
        before_out = weight.shape[0]
    return tuple(before), tuple(stages)


class BatchwiseDropout(RateLayer):
    """A sequence of maps whose hidden features are dropped for the whole batch at once, and not computed.

    A hidden feature is kept with chance 1 - p and then divided by 1 - p, as dropout after the activation does, with one
    mask for all rows. The rows and columns of the weights that belong to dropped features are cut out: a map costs the
    product of the shares that are kept on both its sides, forward and backward. In a convolution, channels fall.

    The mask is a function of seed and step, not of the rows, so splitting a batch changes nothing; with one mask for B
    rows the gradient is noisier than with one for each. Under torch.func.vmap over members, and in compiled graphs, no
    size can depend on a mask: there the whole is computed and multiplied by the mask, with the same result.

    Args:
        module: nn.Sequential of nn.Linear or nn.Conv1d to 3d, with activations, pooling and nn.Flatten between them.
            Its state dict is kept, with its keys behind "module.".
        p: chance to drop a hidden feature, in [0, 1]: a number, or a schedule.
        input_p: chance to drop a feature of the input.

    Raises:
        ProbabilityError: a rate outside [0, 1], or one for each feature.
        OptionError: a layer that cannot be cut.

    Source: Graham, Reizenstein and Robinson 2015, arXiv:1502.02478.

    Example:
        >>> import torch, dropkit as dk
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> dk.nn.BatchwiseDropout(net, p=0.5)(torch.randn(16, 8)).shape
        torch.Size([16, 2])
    """

    def __init__(self, module: nn.Sequential, p: Rate = 0.5, *, input_p: float = 0.0) -> None:
        super().__init__(p)
        if isinstance(p, Tensor) and p.ndim:
            raise ProbabilityError(
                f"p of shape {tuple(p.shape)} was given; all hidden features fall at one rate."
            )
        if not isinstance(module, nn.Sequential):
            raise OptionError(f"{type(module).__name__} was given; an nn.Sequential of maps is cut.")
        self.input_p = check_probability(input_p, "input_p")
        self.before, self.stages = _stages(module)
        self.module = module
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """As the plain module's; the plain module itself while nobody asks for noise."""
        if not self.active:
            return self.module(x)
        first = self.module.get_submodule(self.stages[0].map)
        for name in self.before:
            x = self.module.get_submodule(name)(x)
        check_map(x, first.weight, first.bias, self.stages[0].convolution)  # type: ignore[arg-type]
        masks = [self._mask(x, stage.units, i) for i, stage in enumerate(self.stages)]
        if _must_be_dense(masks):
            return self._dense(x, masks)
        kept = [None if mask is None else mask.nonzero()[:, 0] for mask in masks]
        if any(inputs is not None and not len(inputs) for inputs in kept):  # a convolution of nothing is none
            return self._dense(x, masks)
        for i, stage in enumerate(self.stages):
            layer = self.module.get_submodule(stage.map)
            mask, inputs, outputs = masks[i], kept[i], kept[i + 1] if i + 1 < len(kept) else None
            if mask is not None and inputs is not None:
                if i == 0:
                    x = x.index_select(channel_dim(x, stage.convolution), inputs)
                x = x * mask[inputs[0]]  # all survivors are scaled alike
                inputs = (inputs[:, None] * stage.each + torch.arange(stage.each, device=x.device)).flatten()
            x = thinned_map(x, layer.weight, layer.bias, inputs, outputs, convolution=stage.convolution)  # type: ignore[arg-type]
            for name in stage.after:
                x = self.module.get_submodule(name)(x)
        return x

    def _mask(self, x: Tensor, units: int, stage: int) -> Tensor | None:
        """(units,): 0 where a feature falls, else 1 / (1 - p); None where none can."""
        rate = self.rate if stage else self.input_p
        if not isinstance(rate, Tensor) and rate == 0:
            return None
        ones = torch.ones(1, units, dtype=x.dtype, device=x.device)
        return dropout(ones, rate, shared=(0,), site=self.site, owner=self)[0]

    def _dense(self, x: Tensor, masks: list[Tensor | None]) -> Tensor:
        """The same without cutting: everything is computed, and what falls is set to 0."""
        for stage, mask in zip(self.stages, masks, strict=True):
            if mask is not None:
                dim = channel_dim(x, stage.convolution)
                whole = mask.repeat_interleave(stage.each).view(-1, *[1] * (x.ndim - 1 - dim))
                x = torch.where(whole != 0, x * whole, 0)
            x = self.module.get_submodule(stage.map)(x)
            for name in stage.after:
                x = self.module.get_submodule(name)(x)
        return x

    def extra_repr(self) -> str:
        """The rates."""
        return f"{super().extra_repr().rpartition(',')[0]}, input_p={self.input_p}"


def _must_be_dense(masks: list[Tensor | None]) -> bool:
    """Whether masks are values that no size may depend on."""
    return torch.compiler.is_compiling() or any(
        mask is not None and torch._C._functorch.is_batchedtensor(mask) for mask in masks
    )
