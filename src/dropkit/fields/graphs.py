"""Dropout on graphs for PyTorch Geometric's models: edges, nodes and features of the input, messages inside.

A model of PyTorch Geometric takes node features and an edge_index, model(x, edge_index). `GraphDropout` stands around
it and thins what it is given; `drop_messages` reaches into its convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dropkit.errors import OptionError
from dropkit.nn.edges import DropEdge
from dropkit.nn.graphs import DropFeature, DropMessage, DropNode
from dropkit.nn.layer import Rate, name_sites


class GraphDropout(nn.Module):
    """A graph model whose input graph is thinned first; one thinned graph serves all of its layers.

    y = model(drop_feature(drop_node(x)), drop_edge(edge_index))

    Degrees are normalised by the model, after edges have gone, as DropEdge wants it. Where the model's convolutions
    cache their normalisation (`cached=True`), they would keep the first thinned graph for good; that is refused.

    Args:
        model: takes (x, edge_index) and more.
        edges, nodes, features: chances to drop an edge, a node's features, a single feature.
        undirected: both directions of an edge fall together.

    Raises:
        ProbabilityError: a chance outside [0, 1].
        OptionError: the model caches its normalised graph.

    Source: Rong et al. 2020, arXiv:1907.10903 (edges); Feng et al. 2020, arXiv:2005.11079 (nodes).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        edges: Rate = 0.0,
        nodes: Rate = 0.0,
        features: Rate = 0.0,
        undirected: bool = True,
    ) -> None:
        super().__init__()
        cached = [name for name, layer in model.named_modules() if getattr(layer, "cached", False)]
        if cached:
            raise OptionError(
                f"{', '.join(cached)} caches the normalised graph, so a thinned one would stay. "
                "Build it with cached=False."
            )
        self.model = model
        self.drop_edge = DropEdge(edges, undirected=undirected)
        self.drop_node = DropNode(nodes)
        self.drop_feature = DropFeature(features)
        name_sites(self)

    def forward(self, x: Tensor, edge_index: Tensor, *arguments: Any, **options: Any) -> Any:
        """x: (N, D) features, edge_index: (2, E); what else is given goes to the model as it is."""
        thinned, _ = self.drop_edge(edge_index, num_nodes=len(x))
        return self.model(self.drop_feature(self.drop_node(x)), thinned, *arguments, **options)


def drop_messages(model: nn.Module, p: Rate) -> tuple[DropMessage, ...]:
    """Let every convolution of a PyTorch Geometric model drop elements of its messages, in place.

    m[e] = drop_message(message of edge e)

    Each convolution gets a `DropMessage` as its child `drop_message`, which is named, trained and evaluated with the
    model, and asked by a hook behind `message`.

    Args:
        model: holds convolutions (torch_geometric.nn.MessagePassing).
        p: chance to drop an element of a message.

    Returns:
        The layers, in the order of the model's modules.

    Raises:
        OptionError: no convolution is there, or messages are dropped already.
        ProbabilityError: p outside [0, 1].

    Source: DropMessage, Fang et al. 2023, arXiv:2204.10037.
    """
    hooked = [layer for layer in model.modules() if hasattr(layer, "register_message_forward_hook")]
    if not hooked:
        raise OptionError(
            f"{type(model).__name__} has no convolution that sends messages (torch_geometric.nn.MessagePassing)."
        )
    if any(hasattr(layer, "drop_message") for layer in hooked):
        raise OptionError(f"The messages of this {type(model).__name__} are dropped already.")
    made = []
    for layer in hooked:
        layer.drop_message = DropMessage(p)
        layer.register_message_forward_hook(_after_message)  # type: ignore[operator]
        made.append(layer.drop_message)
    name_sites(model)
    return tuple(made)


def _after_message(layer: Any, _: Any, messages: Tensor) -> Tensor:
    return layer.drop_message(messages)


def false_edges(edge_index: Tensor, nodes: int, count: int, *, seed: int = 0) -> Tensor:
    """The graph with `count` undirected edges between random pairs of nodes, for tests of robustness.

    Args:
        edge_index: (2, E); nodes: N, at least 2; count: pairs, each adds both directions.
        seed: of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(nodes, (count,), generator=generator)
    second = (first + torch.randint(1, nodes, (count,), generator=generator)) % nodes
    pairs = torch.stack((first, second))
    return torch.cat((edge_index, pairs, pairs.flip(0)), dim=1)
