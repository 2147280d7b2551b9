"""What is timed of graphs: edges taken out of an edge list."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from dropkit import functional
from dropkit.bench.work import FALSE_ALARM, Pair, Work, require

HAS_PYG = find_spec("torch_geometric") is not None
PEER = (
    "torch_geometric.utils.dropout_edge"
    if HAS_PYG
    else "the formula of PyTorch Geometric's dropout_edge in torch"
)

Edges = Callable[[Tensor, float], Tensor]


def peer_drop_edge(edge_index: Tensor, p: float, undirected: bool) -> Tensor:
    """PyTorch Geometric's dropout_edge, or what it does: a number for each edge; undirected, half of them, mirrored."""
    if HAS_PYG:
        found: Tensor = importlib.import_module("torch_geometric.utils").dropout_edge(
            edge_index, p, force_undirected=undirected
        )[0]
        return found
    stays = torch.rand(edge_index.shape[1]) >= p
    if not undirected:
        return edge_index[:, stays]
    stays[edge_index[0] > edge_index[1]] = False
    half = edge_index[:, stays]
    stays.nonzero().repeat((2, 1)).squeeze()  # it also says which edges these are
    return torch.cat((half, half.flip(0)), dim=1)


def dropping_edges(edges: int, p: float, undirected: bool) -> Pair:
    """Edge dropout of both kinds on one graph, in which every edge stands in both directions.

    The check: what stays are edges of the graph, none twice, as many as the rate says, in their order, and for the
    undirected kind in both directions.

    Args:
        edges: E, counting both directions.
        p: chance to drop.
        undirected: whether both directions fall together.
    """
    half = edges // 2
    side = math.isqrt(half) + 1
    number = torch.arange(half)
    u, v = number % side, side + number // side
    edge_index = torch.stack((torch.cat((u, v)), torch.cat((v, u))))

    def ours() -> Tensor:
        return functional.drop_edge(edge_index, p, undirected=undirected)[0]

    def peer() -> Tensor:
        return peer_drop_edge(edge_index, p, undirected)

    def check() -> None:
        for side_name, edges_left in (("ours", ours()), ("the peer", peer())):
            low, high = edges_left.amin(dim=0), edges_left.amax(dim=0) - side
            place = high * side + low + half * (edges_left[0] > edges_left[1])
            known = torch.equal(edge_index[:, place.clamp(0, 2 * half - 1)], edges_left)
            require(
                known and bool((place.diff() > 0).all()),
                side_name,
                "other edges than those of the graph, in order",
            )
            draws = half if undirected else 2 * half
            allowed = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * draws))
            share = len(place) / (2 * half)
            require(
                abs(share - (1 - p)) <= allowed,
                side_name,
                f"kept {share:.4f} of the edges instead of {1 - p:.4f}",
            )
            if undirected:
                there, back = place[place < half], place[place >= half] - half
                require(
                    torch.equal(there, back), side_name, "one direction of an edge fell without the other"
                )

    return Pair(Work(ours), Work(peer), check, edge_index.numel() // 2)
