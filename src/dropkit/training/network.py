"""The network that learns from a table: Linear, ReLU, Dropout, and a head in the target's unit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError, check_probability
from dropkit.nn.features import Dropout
from dropkit.training.losses import bound_log_variance

Likelihood = Literal["gaussian", "categorical"]
LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "categorical")


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """All that is needed to build the network again, but for its weights.

    Attributes:
        inputs: D, columns after encoding.
        hidden: width of each hidden layer, from the input on.
        outputs: 2 for a Gaussian (mean, log variance), the number of classes C otherwise.
        rate: chance to drop a hidden unit.
        input_rate: chance to drop an input.
        likelihood: "gaussian" or "categorical".
    """

    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    rate: float
    input_rate: float
    likelihood: Likelihood

    def __post_init__(self) -> None:
        if self.likelihood not in LIKELIHOODS:
            raise OptionError(f"likelihood={self.likelihood!r} was given; it is 'gaussian' or 'categorical'.")
        if self.likelihood == "gaussian" and self.outputs != 2:
            raise OptionError(f"outputs={self.outputs} was given; a Gaussian has 2, mean and log variance.")
        if min(self.inputs, self.outputs, *self.hidden, 1) < 1:
            raise OptionError(
                f"widths {(self.inputs, *self.hidden, self.outputs)} were given; each is at least 1."
            )
        check_probability(self.rate, "rate")
        check_probability(self.input_rate, "input_rate")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every layer, inputs and outputs included."""
        return (self.inputs, *self.hidden, self.outputs)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the places where masks enter, in the order of the pass."""
        return ("input_dropout", *(f"dropout{i + 1}" for i in range(len(self.hidden))))


class GaussianHead(nn.Module):
    """From the standardised target back to its own unit; the log variance is bounded softly on the way.

    mean = location + scale * out[0],    log variance = bound(out[1]) + 2 log(scale)

    It stands in the network, not in the loss, so that training, validation and committee see the same density.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, location: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        # float64: a target such as a year has a large mean beside a small spread; the sum below is float32 again.
        self.register_buffer("location", torch.tensor(location, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 2) to (..., 2)."""
        raw_mean, raw_log_variance = x.unbind(-1)
        mean = self.location + self.scale * raw_mean
        log_variance = bound_log_variance(raw_log_variance) + 2 * self.scale.log()
        return torch.stack((mean, log_variance), dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        """Location and scale, in the target's unit."""
        return f"location={float(self.location):.6g}, scale={float(self.scale):.6g}"


def build_network(spec: NetworkSpec, location: float = 0.0, scale: float = 1.0) -> nn.Sequential:
    """The network of a spec, with fresh weights.

    Every place of a mask has its layer even at rate 0, so that names (and with them masks and the keys of the
    state dict) do not depend on the rates.

    Args:
        spec: what to build.
        location: mean of the target, its unit; for a Gaussian only.
        scale: standard deviation of the target, its unit.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    widths, sites = spec.widths, spec.sites
    layers[sites[0]] = Dropout(spec.input_rate)
    for i, (before, after) in enumerate(pairwise(widths[:-1]), start=1):
        layers[f"hidden{i}"] = nn.Linear(before, after)
        layers[f"relu{i}"] = nn.ReLU()
        layers[sites[i]] = Dropout(spec.rate)
    layers["output"] = nn.Linear(widths[-2], widths[-1])
    if spec.likelihood == "gaussian":
        layers["head"] = GaussianHead(location, scale)
    network = nn.Sequential(layers)
    for name, layer in network.named_modules():
        if isinstance(layer, Dropout):
            layer.site = (
                name  # as dropkit.nn.name_sites would; the rate search drew its masks under these names
            )
    return network
