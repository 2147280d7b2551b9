"""Small perceptrons, such as tables are learned with: all members by one kernel, each on its own thinned network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dropkit.committee import perceptron_cpu
from dropkit.committee.run import Leaves, Tile, Values, Way
from dropkit.masks import threads
from dropkit.masks.address import masks
from dropkit.masks.philox import survivor_scale
from dropkit.nn.features import Dropout
from dropkit.nn.gaussian import GaussianDropout, UniformDropout
from dropkit.nn.layer import StochasticLayer

WIDEST = 512  # from here on matrix products that serve many rows at once are as quick
DENSE_BELOW = 0.3  # rates on the input for which a member is what all have less what it dropped
NOISE_BYTES = 32 << 20  # of all masks of the members that are asked at a time
_ACTIVATIONS: dict[type[nn.Module], int] = {
    nn.Identity: perceptron_cpu.IDENTITY,
    nn.ReLU: perceptron_cpu.RELU,
    nn.LeakyReLU: perceptron_cpu.LEAKY_RELU,
    nn.Tanh: perceptron_cpu.TANH,
    nn.Sigmoid: perceptron_cpu.SIGMOID,
}
# Layers whose output is their input times a noise that does not depend on it.
_NOISES = (Dropout, GaussianDropout, UniformDropout)


@dataclass(slots=True)
class Stage:
    """One layer: linear map, noise, activation, noise.

    Attributes:
        linear: the map.
        before: layers whose noise the activation sees.
        activation: f.
        after: layers whose noise the next layer sees.
    """

    linear: nn.Linear
    before: list[StochasticLayer] = field(default_factory=list)
    activation: nn.Module = field(default_factory=nn.Identity)
    after: list[StochasticLayer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Perceptron:
    """A model as a straight line: what comes before the first mask, the layers up to the last one, and what follows.

    Attributes:
        head: modules that no mask touches.
        noises: layers that drop the first stage's inputs.
        stages: at least one.
        tail: modules without masks, after the last linear map.
    """

    head: tuple[nn.Module, ...]
    noises: tuple[StochasticLayer, ...]
    stages: tuple[Stage, ...]
    tail: tuple[nn.Module, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the input and of each layer."""
        return (self.stages[0].linear.in_features, *(stage.linear.out_features for stage in self.stages))


def find_perceptron(network: nn.Module) -> Perceptron | None:
    """Read a model as a perceptron; None where it is none, or wider than the kernel is good for."""
    line = list(_straight_line(network) or ())
    noisy = [i for i, module in enumerate(line) if isinstance(module, StochasticLayer)]
    if not noisy or not all(type(line[i]) in _NOISES for i in noisy):
        return None
    linear = [i for i, module in enumerate(line) if type(module) is nn.Linear and i > noisy[0]]
    if not linear or linear[-1] < noisy[-1]:
        return None
    first = noisy[0]
    behind = next(module for module in line[first:] if not isinstance(module, StochasticLayer))
    if type(behind) in _ACTIVATIONS and first and type(line[first - 1]) is nn.Linear:
        first -= (
            1  # the mask stands between a linear map and its activation, so the map belongs to the kernel
        )
    noises: list[StochasticLayer] = []
    stages: list[Stage] = []
    for module in line[first : linear[-1] + 1]:
        if isinstance(module, StochasticLayer):
            (stages[-1].after if stages else noises).append(module)
        elif type(module) is nn.Linear:
            stages.append(Stage(module))
        elif type(module) in _ACTIVATIONS and stages and type(stages[-1].activation) is nn.Identity:
            stages[-1].before, stages[-1].after = stages[-1].after, []
            stages[-1].activation = module
        else:
            return None
    found = Perceptron(tuple(line[:first]), tuple(noises), tuple(stages), tuple(line[linear[-1] + 1 :]))
    dtypes = {parameter.dtype for stage in stages for parameter in stage.linear.parameters()}
    devices = {parameter.device.type for stage in stages for parameter in stage.linear.parameters()}
    served = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and devices == {"cpu"}
    return found if served and max(found.widths) <= WIDEST else None


def _straight_line(network: nn.Module) -> Iterator[nn.Module] | None:
    """The modules of a model that hands one tensor from one to the next, in order."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return type(module) is not nn.Sequential

    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return None
    try:
        graph = Tracer().trace(network)
    except Exception:  # code that cannot be followed without values is no straight line
        return None
    line: list[nn.Module] = []
    before: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder" and before is None:
            before = node
            continue
        if before is None or node.all_input_nodes != [before] or len(before.users) != 1:
            return None
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            line.append(network.get_submodule(str(node.target)))
        elif node.target in (torch.relu, torch.nn.functional.relu, "relu"):
            line.append(nn.ReLU())
        elif node.op != "output" or node.args != (before,):
            return None
        before = node
    return iter(line)


class Kernel(Way):
    """A perceptron's members, by `perceptron_cpu.run_members`."""

    def __init__(self, perceptron: Perceptron, seed: int) -> None:
        self.perceptron, self.seed = perceptron, seed

    def prefix(self, tile: Tile, shared: Any = None) -> Values:
        """What the first mask meets."""
        x = tile.inputs[0].clone()  # a module may write into it
        for module in self.perceptron.head:
            x = module(x)
        return (x,)

    def member(self, prepared: int | Tensor, values: Values, ids: Tensor | None) -> Leaves:
        """One member's answer."""
        assert isinstance(prepared, int)
        return tuple(leaf[0] for leaf in self.several(values, ids, prepared, prepared + 1))

    def several(self, values: Values, ids: Tensor | None, start: int, stop: int) -> Leaves:
        """Members start .. stop - 1."""
        (x,), net = values, self.perceptron
        rows, widths = len(x), net.widths
        padded = -(-rows // perceptron_cpu.ROWS) * perceptron_cpu.ROWS
        lines = x.new_zeros((widths[0], padded))
        lines[:, :rows] = x.detach().T
        out = x.new_empty((stop - start, padded, widths[-1]))
        linears = [stage.linear for stage in net.stages]
        weights = torch.cat([linear.weight.detach().reshape(-1) for linear in linears])
        biases = torch.cat(
            [
                x.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
                for linear in linears
            ]
        )
        kinds = np.array([_ACTIVATIONS[type(stage.activation)] for stage in net.stages])
        slopes = np.array([float(getattr(stage.activation, "negative_slope", 0.0)) for stage in net.stages])
        places, total = self._places()
        dense, scale_in = self._dense(lines)
        share = max(NOISE_BYTES // (max(total, 1) * x.element_size()), 1)
        for first in range(start, stop, share):
            last = min(first + share, stop)
            noise = self._noise(x, first, last)
            arguments = (
                lines.numpy(), np.array(widths), weights.numpy(), biases.numpy(), kinds, slopes, noise.numpy(),
                int(places[0, 0]), dense.numpy(), scale_in, places[1:, 0].copy(), places[1:, 1].copy(),
                out[first - start : last - start].numpy(),
            )  # fmt: skip

            def run(begin: int, end: int, arguments: tuple[Any, ...] = arguments) -> None:
                perceptron_cpu.run_members(*arguments, begin, end)  # type: ignore[call-arg]

            threads.in_parallel(run, last - first, (last - first) * padded * sum(widths))
        result = out[:, :rows]
        for module in net.tail:
            result = torch.func.vmap(module)(result)
        return (result,)

    def _dense(self, lines: Tensor) -> tuple[Tensor, float]:
        """The first linear map of the whole input, and what kept inputs are multiplied with; empty where that does not
        help: no mask on the input, one that drops half or more, noise of another law, or a value that is not finite,
        which taking off would not take off.
        """
        noises = self.perceptron.noises
        if len(noises) != 1 or type(noises[0]) is not Dropout or not bool(lines.sum().isfinite()):
            return lines[:0], 1.0
        rate = noises[0].rate
        if isinstance(rate, Tensor) or not 0 < rate < DENSE_BELOW:
            return lines[:0], 1.0
        weight = self.perceptron.stages[0].linear.weight.detach()
        return weight @ lines, float(survivor_scale(torch.tensor(rate, dtype=torch.float64)))

    def _layers(self) -> list[tuple[int, int, int, Sequence[StochasticLayer]]]:
        """Where noise comes in, in the order of the pass: stage (0: the input), before or after f, width, layers."""
        net = self.perceptron
        found: list[tuple[int, int, int, Sequence[StochasticLayer]]] = []
        if net.noises:
            found.append((0, 0, net.widths[0], net.noises))
        for i, stage in enumerate(net.stages, start=1):
            for side, layers in enumerate((stage.before, stage.after)):
                if layers:
                    found.append((i, side, net.widths[i], layers))
        return found

    def _places(self) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], int]:
        """Where each noise begins in a member's line, (stages + 1, 2), -1 for none; and how long the line is."""
        places = np.full((len(self.perceptron.stages) + 1, 2), -1, np.int64)
        total = 0
        for stage, side, width, _ in self._layers():
            places[stage, side] = total
            total += width
        return places, total

    def _noise(self, like: Tensor, start: int, stop: int) -> Tensor:
        """(stop - start, N): all that members' units are multiplied with, from the layers' own draws."""

        def of(member: Tensor) -> Tensor:
            parts = []
            with masks(seed=self.seed, member=member):
                for _, _, width, layers in self._layers():
                    noise = like.new_ones((1, width))
                    for layer in layers:
                        noise = layer(noise)
                    parts.append(noise[0])
            return torch.cat(parts)

        result: Tensor = torch.func.vmap(of)(torch.arange(start, stop))
        return result.contiguous()
