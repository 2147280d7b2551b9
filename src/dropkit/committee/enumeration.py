"""The committee's law without sampling error: all thinned networks of a small model, each with its probability.

    P(keep) = product over elements e of (1 - p[e] where keep[e], else p[e])

What a committee of M members estimates is exact here, so its statistics can be checked against the truth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.func import vmap

from dropkit.committee.graph import DRAW, DROPOUT_AT, Graph
from dropkit.committee.information import entropy
from dropkit.errors import EnumerationError, OptionError
from dropkit.masks.noise_ops import exact_count
from dropkit.masks.philox import survivor_scale

Likelihood = Literal["point", "gaussian", "categorical"]

MOST = 1 << 14
NOISE_AT = torch.ops.dropkit.noise_at.default
# Networks that go through the model together.
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Enumeration:
    """All K thinned networks on some rows.

    Attributes:
        outputs: (K, B, *out), what each puts out.
        weights: (K,) float64, its probability; they sum to 1.
        likelihood: how a committee reads the outputs, see `Committee`.
    """

    outputs: Tensor
    weights: Tensor
    likelihood: Likelihood = "point"

    @property
    def values(self) -> Tensor:
        """(K, B, *out), what is averaged: means (Gaussian), probabilities (classes), else the outputs as they are."""
        if self.likelihood == "gaussian":
            return self.outputs[..., 0]
        return self.outputs.softmax(dim=-1) if self.likelihood == "categorical" else self.outputs

    @property
    def mean(self) -> Tensor:
        """(B, *out), E value; the class probabilities of the whole committee for classes."""
        return self._average(self.values)

    @property
    def variance(self) -> Tensor:
        """(B, *out), E (value - mean)**2, the epistemic part."""
        return self._average((self.values.double() - self.mean).square())

    @property
    def aleatoric(self) -> Tensor:
        """(B, *out), E exp(log variance).

        Raises:
            OptionError: the model predicts no noise.
        """
        if self.likelihood != "gaussian":
            raise OptionError("a noise was asked for; only likelihood='gaussian' predicts one.")
        return self._average(self.outputs[..., 1].exp())

    @property
    def entropy(self) -> Tensor:
        """(B,), nats, of the mean of the probabilities.

        Raises:
            OptionError: the outputs are no classes.
        """
        self._check_classes()
        return entropy(self.mean)

    @property
    def expected_entropy(self) -> Tensor:
        """(B,), nats, E of the networks' entropies.

        Raises:
            OptionError: the outputs are no classes.
        """
        self._check_classes()
        return self._average(entropy(self.values.double()))

    @property
    def mutual_information(self) -> Tensor:
        """(B,), nats, entropy - expected entropy.

        Raises:
            OptionError: the outputs are no classes.
        """
        return self.entropy - self.expected_entropy

    def _average(self, values: Tensor) -> Tensor:
        return torch.einsum("k,k...->...", self.weights, values.double())

    def _check_classes(self) -> None:
        if self.likelihood != "categorical":
            raise OptionError(
                f"an entropy was asked of likelihood={self.likelihood!r}; it is one of class probabilities, "
                "likelihood='categorical'."
            )


def enumerate_masks(graph: Graph, x: Tensor, likelihood: Likelihood = "point") -> Enumeration:
    """Run every thinned network of a small model.

    Args:
        graph: `record(network, x)`.
        x: (B, ...).
        likelihood: how the outputs are read.

    Raises:
        EnumerationError: there are more than 2**14 networks, or the noise is no mask of a few values.

    Example:
        >>> import torch, dropkit as dk
        >>> from dropkit.committee.graph import record
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(3, 1)).eval()
        >>> names, x = dk.nn.name_sites(model), torch.ones(2, 3)
        >>> every = enumerate_masks(record(model, x), x)
        >>> every.weights.shape, torch.allclose(every.mean, model(x).double())
        (torch.Size([8]), True)
    """
    look = _Masked(graph, {})
    with torch.no_grad():
        plain = look.run(x)
    if not isinstance(plain, Tensor):
        raise EnumerationError(
            f"the model returns {type(plain).__name__}; one tensor (rows, *out) is needed."
        )
    elements = {graph.draws[node.args[1]]: noise.elements for node, noise in look.seen.items()}  # type: ignore[index]
    count = math.prod(noise.count for noise in look.seen.values())
    if count > MOST:
        raise EnumerationError(
            f"{count} thinned networks would have to be run (mask elements by site: {elements}); at most {MOST} are. "
            "Take a model with fewer masked units, or sample: committee.predict(x)."
        )
    masks = {node: noise.every() for node, noise in look.seen.items()}
    choices = [torch.arange(len(chances)) for _, chances in masks.values()]
    index = (
        torch.cartesian_prod(*choices).reshape(count, len(choices)) if choices else torch.zeros(1, 0).long()
    )
    weights = torch.ones(count, dtype=torch.float64)
    for place, (_, chances) in enumerate(masks.values()):
        weights = weights * chances[index[:, place]]

    def network(which: Tensor) -> Tensor:
        noise = {node: factors[which[place]] for place, (node, (factors, _)) in enumerate(masks.items())}
        output: Tensor = _Masked(graph, noise).run(x)
        return output

    with torch.no_grad():
        outputs = vmap(network, chunk_size=CHUNK)(index) if masks else plain[None]
    return Enumeration(outputs, weights, likelihood)


@dataclass(frozen=True, slots=True)
class _Noise:
    """A mask that can be visited: its shape, and which sets of elements it drops."""

    shape: tuple[int, ...]
    scale: float
    drop: int | None  # exactly so many, or None: each by itself

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        if self.drop is not None:
            return math.comb(self.elements, self.drop)
        return 2**self.elements if self.scale > 1 else 1

    def every(self) -> tuple[Tensor, Tensor]:
        """(K, *shape) factors and (K,) chances."""
        n = self.elements
        if self.drop is not None:
            keep = torch.ones(self.count, n, dtype=torch.float64)
            for row, dropped in zip(keep, itertools.combinations(range(n), self.drop), strict=True):
                row[list(dropped)] = 0
            chances = torch.full((self.count,), 1 / self.count, dtype=torch.float64)
        elif self.scale <= 1:  # p is 0 or 1: nothing is left to chance
            keep, chances = torch.ones(1, n, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        else:
            keep = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).double()
            kept = 1 / self.scale
            chances = (keep * kept + (1 - keep) * (1 - kept)).prod(dim=1)
        return (keep * self.scale).reshape(-1, *self.shape), chances


class _Masked(fx.Interpreter):
    """A recorded model with the noise that it is given, in place of the one it would draw.

    Args:
        graph: of the model.
        noise: factors by the node they stand for; a node without any leaves its input as it is, and is noted.
    """

    def __init__(self, graph: Graph, noise: dict[fx.Node, Tensor]) -> None:
        super().__init__(graph.module)
        self.sites = graph.draws
        self.noise = noise
        self.seen: dict[fx.Node, _Noise] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does it, but for draws and what uses them."""
        if n.target is DRAW:
            return None
        drawn = [source for source in n.all_input_nodes if source in self.sites]
        if not drawn:
            return super().run_node(n)
        x, _, p, shared, *law = self.fetch_args_kwargs_from_env(n)[0]
        if n in self.noise:
            factor = self.noise[n].to(x.dtype)
            return torch.where(factor == 0, 0.0, x * factor)
        self.seen[n] = _noise(n, self.sites[drawn[0]], x, p, shared, law)
        return x


def _noise(node: fx.Node, site: str, x: Tensor, p: Tensor, shared: Sequence[int], law: list[str]) -> _Noise:
    if node.target not in (DROPOUT_AT, NOISE_AT) or law not in ([], ["exact"]) or p.ndim:
        what = f"{law[0]} noise" if law else str(node.target)
        raise EnumerationError(
            f"the noise at {site!r} ({what}) has more values than can be visited; masks with one rate have two."
        )
    shape = tuple(1 if dim == 0 or dim in shared else size for dim, size in enumerate(x.shape))
    n = math.prod(shape)
    if not law:
        return _Noise(shape, float(survivor_scale(p)), None)
    drop = exact_count(float(p), n)
    return _Noise(shape, n / (n - drop) if drop < n else 0.0, drop)
