"""A model as a function of its noise: what its masks multiply by, as an argument.

Each mask, or other noise with mean 1, is written 1 + e. The network is then f(x, e_1, ..., e_S), smooth in e where its
layers are smooth, and at e = 0 the noise is gone. With Var e = p / (1 - p) all that dropout does to second order is
read from the derivatives of f by e.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropkit.committee.graph import DROPOUT_AT, NOISE_AT, Graph, record
from dropkit.masks import masks
from dropkit.masks.laws import LawName, multiply


@dataclass(frozen=True, slots=True)
class Site:
    """A place where noise multiplies.

    Attributes:
        name: its qualified name in the model.
        law: of the noise.
        rate: chance to drop p; of noise that drops nothing, the p with the same variance.
        shape: of one noise tensor for these rows; dim 0 is the rows, unless `tied`.
        tied: whether all rows share one mask, in training too.
    """

    name: str
    law: LawName
    rate: float
    shape: tuple[int, ...]
    tied: bool

    @property
    def variance(self) -> float:
        """Var e = p / (1 - p), infinite at p = 1."""
        return self.rate / (1 - self.rate) if self.rate < 1 else float("inf")

    @property
    def width(self) -> int:
        """Noise values of one row (of all rows, where they share them)."""
        return int(torch.Size(self.shape if self.tied else self.shape[1:]).numel())

    def draw(self, rate: float, seed: int, member: int) -> Tensor:
        """Noise of this law, 1 + e, at an address of its own: float64, of `shape`; each row has its own."""
        ones = torch.ones(self.shape, dtype=torch.float64)
        samples = None if self.tied else torch.arange(self.shape[0])
        with masks(seed=seed, member=member, samples=samples):
            return multiply(self.law, ones, rate, (), self.name, None)


class NoisyNetwork:
    """A recorded network whose noise is an argument.

    Args:
        network: in evaluation mode, its sites named.
        x: (B, ...) rows.

    Attributes:
        sites: where noise enters with a rate above 0.
        module: (x, e_1, ..., e_S) -> the network's output, around the network's own weights.
        rough: sites whose noise changes the output by jumps alone (it is only compared with a number, as in zoneout),
            so that the derivative by it is 0 and says nothing.
        hidden: sites that draw in a way that is no multiplication.

    Raises:
        RecordingError: the model's way depends on values.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        graph = record(network, x)
        found = _multiplications(graph, x)
        acting = {node: site for node, site in found.items() if site.rate > 0}
        self.sites = tuple(acting.values())
        self.module = _with_arguments(graph.module, list(acting), [n for n in found if n not in acting])
        self.rough = tuple(site.name for i, site in enumerate(self.sites) if self._jumps(i, x))
        multiplied = {node.args[1] for node in found}
        self.hidden = tuple(name for draw, name in graph.draws.items() if draw not in multiplied)

    def __call__(
        self, x: Tensor, noise: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Output at noise 1 + e; with other weights by name, if given."""
        if weights is None:
            return self.module(x, *noise)
        return torch.func.functional_call(self.module, dict(weights), (x, *noise))

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each site multiplies, without noise."""
        nodes = {node.args[1].name: node for node in self.module.graph.nodes if node.target is perturb}
        watch = _Watch(self.module, set(nodes.values()))
        like = x if x.is_floating_point() else torch.zeros((), device=x.device)
        with torch.no_grad():
            watch.run(x.clone(), *self.none(like))
        return tuple(watch.seen[nodes[f"noise_{i}"]][0] for i in range(len(self.sites)))

    def none(self, like: Tensor) -> tuple[Tensor, ...]:
        """e = 0 everywhere."""
        return tuple(torch.zeros(site.shape, dtype=like.dtype, device=like.device) for site in self.sites)

    def drawn(self, like: Tensor, seed: int, member: int, only: int | None = None) -> tuple[Tensor, ...]:
        """e of all sites, or of one with the others at 0."""
        return tuple(
            (site.draw(site.rate, seed, member) - 1).to(like)
            if only in (None, i)
            else torch.zeros(site.shape, dtype=like.dtype, device=like.device)
            for i, site in enumerate(self.sites)
        )

    def _jumps(self, site: int, x: Tensor) -> bool:
        """Whether noise of one site moves the output, and yet the slope by it is 0 everywhere."""
        like = x if x.is_floating_point() else torch.zeros((), device=x.device)
        start, drawn = self.none(like), self.drawn(like, 0, 0, only=site)
        e = start[site].requires_grad_()
        with torch.enable_grad(), differentiable():
            output = self(x, (*start[:site], e, *start[site + 1 :]))
            weighting = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape)
            if output.requires_grad:
                (slope,) = torch.autograd.grad((output * weighting).sum(), e, allow_unused=True)
                if slope is not None and bool((slope != 0).any()):
                    return False
        with torch.no_grad():
            return not torch.equal(output, self(x, drawn))


@contextmanager
def differentiable() -> Iterator[None]:
    """Within it, attention takes the way of which torch has derivatives of every order."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def perturb(x: Tensor, e: Tensor) -> Tensor:
    """x (1 + e); one e for several values of x where a dim of e has size 1."""
    return x * (1 + e)


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the inputs and rates of its noise."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self.watched, self.seen = nodes, {}  # type: ignore[var-annotated]

    def run_node(self, n: fx.Node) -> Any:
        if n in self.watched:
            self.seen[n] = self.fetch_args_kwargs_from_env(n)[0]
        return super().run_node(n)


def _multiplications(graph: Graph, x: Tensor) -> dict[fx.Node, Site]:
    """The nodes that multiply by noise, as a pass over x meets them."""
    nodes = [n for n in graph.module.graph.nodes if n.target in (DROPOUT_AT, NOISE_AT)]
    watch = _Watch(graph.module, set(nodes))
    with torch.no_grad(), masks(seed=0, member=0):
        watch.run(x.clone())
    found = {}
    for node in nodes:
        shape, p = tuple(watch.seen[node][0].shape), watch.seen[node][2]
        shared: Sequence[int] = node.args[3]
        law: LawName = "bernoulli" if node.target is DROPOUT_AT else node.args[4]
        sizes = tuple(1 if dim in shared else size for dim, size in enumerate(shape))
        tied = 0 in shared or not shape or shape[0] != len(x)
        name = graph.draws.get(node.args[1], "")
        found[node] = Site(name, law, float(p), sizes, tied)
    return found


def _with_arguments(
    module: fx.GraphModule, noisy: Sequence[fx.Node], idle: Sequence[fx.Node]
) -> fx.GraphModule:
    """The graph with e as further inputs in place of the draws."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names = {node: f"noise_{i}" for i, node in enumerate(noisy)}
    begun = False
    for node in module.graph.nodes:
        if not begun and node.op not in ("placeholder", "get_attr"):
            begun = True
            arguments = {n: graph.placeholder(name) for n, name in names.items()}
        if node in names:
            copies[node] = graph.call_function(perturb, (copies[node.args[0]], arguments[node]))
            copies[node].meta = dict(node.meta)
        elif node in idle:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.set_codegen(fx.graph.CodeGen())  # the recorded one knows of x alone
    for node in list(graph.nodes):
        if node.op == "output" and isinstance(node.args[0], tuple | list) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))  # the draws, too
    return fx.GraphModule(module, graph)
