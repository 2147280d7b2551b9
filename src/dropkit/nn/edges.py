"""Dropout of edges, each for itself or along random walks; conventions and numbering as in `graphs.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.errors import OptionError, ShapeError
from dropkit.masks.scattered import graphs_of_edges
from dropkit.masks.scattered_ops import draw_address, keep_pairs, keep_rows
from dropkit.masks.walks import keep_off_walks
from dropkit.nn.graphs import check_batch, check_graph_rate, scale_of
from dropkit.nn.graphs_cpu import take_columns
from dropkit.nn.layer import Rate, RateLayer

NODES = 1 << 31  # so that every pair of nodes has a number in 64 bits


@dataclass(frozen=True, slots=True)
class _Edges:
    """Edges that were checked, int64 on the CPU, where masks of graphs are made.

    Attributes:
        ends: (2, E).
        batch, graphs: (N,) and (E,), the graph of each node and edge; both None for one graph.
    """

    ends: Tensor
    batch: Tensor | None
    graphs: Tensor | None

    def __len__(self) -> int:
        return self.ends.shape[1]

    def keep(self, p: float | Tensor, undirected: bool, site: str | None, owner: object | None) -> Tensor:
        """(E,) bool, at the address of the next draw."""
        where, rate = draw_address(owner, site), torch.as_tensor(p, dtype=torch.float64)
        if undirected:
            keep: Tensor = keep_pairs(where, self.ends, self.batch, self.graphs, rate)
            return keep
        keep = keep_rows(where, self.graphs, rate, len(self), 1, False)
        return keep[:, 0]


def _check_edges(edge_index: Tensor, batch: Tensor | None, num_nodes: int | None) -> _Edges:
    """The edges, or what is wrong with them."""
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int64, torch.int32):
        kind = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise OptionError(
            f"edge_index of {kind} was given; node numbers are int64, as a dense tensor (2, E)."
        )
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ShapeError(
            f"edge_index of shape {tuple(edge_index.shape)} was given; it is (2, E), sources above targets"
            + (": give edge_index.t()." if edge_index.ndim == 2 and edge_index.shape[1] == 2 else ".")
        )
    if batch is not None:
        if num_nodes is not None and batch.ndim == 1 and num_nodes != len(batch):
            raise OptionError(
                f"num_nodes={num_nodes} was given, and a batch of {len(batch)} nodes; they must agree."
            )
        num_nodes = len(batch)
        batch = check_batch(batch, num_nodes, "nodes")
    ends = edge_index.to("cpu", torch.int64)
    if torch.compiler.is_compiling():
        return _Edges(ends, batch, None if batch is None else batch[ends[0]])
    if ends.numel():
        low, high = (int(x) for x in torch.aminmax(ends))
        if low < 0 or high >= (NODES if num_nodes is None else num_nodes):
            allowed = "0 to 2**31 - 1" if num_nodes is None else f"0 to {num_nodes - 1}, of {num_nodes} nodes"
            raise OptionError(f"edge_index with nodes {low} to {high} was given; allowed: {allowed}.")
    if batch is None:
        return _Edges(ends, None, None)
    graphs = torch.empty(ends.shape[1], dtype=torch.int64)
    joining = graphs_of_edges(ends[0].numpy(), ends[1].numpy(), batch.numpy(), graphs.numpy())
    if joining >= 0:
        u, v = ends[:, joining].tolist()
        raise OptionError(
            f"edge {joining}, from node {u} to node {v}, joins two graphs of the batch; each edge lies within one."
        )
    return _Edges(ends, batch, graphs)


def edge_mask(
    edge_index: Tensor,
    p: float | Tensor = 0.5,
    *,
    undirected: bool = False,
    batch: Tensor | None = None,
    num_nodes: int | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Which edges stay: the mask of `drop_edge` itself.

    keep[e] ~ Bernoulli(1 - p);  undirected: keep of (u, v) is keep of (v, u)

    Args:
        edge_index, p, undirected, batch, num_nodes, site, owner: as in `drop_edge`.

    Returns:
        (E,) bool.

    Raises:
        As `drop_edge`.
    """
    p = check_graph_rate(p)
    edges = _check_edges(edge_index, batch, num_nodes)
    return edges.keep(p, undirected, site, owner).to(edge_index.device)


def drop_edge(
    edge_index: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    edge_attr: Tensor | None = None,
    undirected: bool = False,
    rescale: bool = False,
    remove: bool = True,
    batch: Tensor | None = None,
    num_nodes: int | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Take edges out of a graph.

    keep[e] ~ Bernoulli(1 - p);  undirected: keep of (u, v) is keep of (v, u);  rescale: edge_attr[e] / (1 - p)

    With `rescale`, the mean of every sum over neighbours is that of the whole graph, exactly. Normalise degrees after
    this, not before, where the layer should see the thinner graph.

    Args:
        edge_index: (2, E) int64.
        p: chance to drop an edge, in [0, 1]; a number, or a 0-d tensor.
        training: False gives edges and attributes back.
        edge_attr: (E, ...), which go along; weights, where they are to be rescaled.
        undirected: both directions of an edge fall together, and a self-loop counts once. For an edge_index that holds
            both; one that stands alone falls as its pair does. Parallel edges fall together.
        rescale: multiply edge_attr, by default ones, with 1 / (1 - p).
        remove: False keeps all edges, and multiplies edge_attr, by default ones, with 0 where an edge is dropped: for
            layers that take edge weights; shapes then stay, as torch.func.vmap and compiled graphs need it.
        batch: (N,) int64, the graph of each node; None: one graph.
        num_nodes: N, to check edge_index against.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        edge_index (2, K) of the K edges that stay, in their order, and their attributes (K, ...), None where there are
        none to be told; with remove=False edge_index itself, and (E, ...).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: edge_index is not (2, E), or something else has not one value for each edge or node.
        OptionError: edge_index is not of whole numbers or out of range, or an edge joins two graphs.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Rong et al. 2020, arXiv:1907.10903.

    Example:
        >>> import torch, dropkit as dk
        >>> edge_index = torch.tensor([[0, 1, 1, 2, 2], [1, 0, 2, 1, 2]])
        >>> with dk.masks(seed=4):
        ...     dk.functional.drop_edge(edge_index, 0.5, undirected=True, rescale=True)
        (tensor([[1, 2, 2],
                [2, 1, 2]]), tensor([2., 2., 2.]))
    """
    p = check_graph_rate(p)
    if rescale and edge_attr is not None and not (edge_attr.is_floating_point() or edge_attr.is_complex()):
        raise OptionError(
            f"edge_attr of {edge_attr.dtype} was given with rescale=True; only real weights can be scaled."
        )
    edges = _check_edges(edge_index, batch, num_nodes)
    _check_attributes(edge_attr, len(edges))
    if not training:
        return edge_index, edge_attr
    keep = edges.keep(p, undirected, site, owner).to(edge_index.device)
    if rescale:
        edge_attr = torch.ones(len(edges), device=edge_index.device) if edge_attr is None else edge_attr
        edge_attr = edge_attr * scale_of(p, edge_attr)
    return _apply(edge_index, edge_attr, keep, remove)


def _check_attributes(edge_attr: Tensor | None, edges: int) -> None:
    if edge_attr is not None and (not edge_attr.ndim or len(edge_attr) != edges):
        raise ShapeError(
            f"edge_attr {tuple(edge_attr.shape)} was given for {edges} edges; it needs one row for each."
        )


def _apply(
    edge_index: Tensor, edge_attr: Tensor | None, keep: Tensor, remove: bool
) -> tuple[Tensor, Tensor | None]:
    """The edges that stay, or all of them with attributes of 0 where one does not."""
    if remove:
        return take_columns(edge_index, edge_attr, keep)
    if edge_attr is None:
        edge_attr = torch.ones(len(keep), device=edge_index.device)
    return edge_index, torch.where(keep.view(-1, *[1] * (edge_attr.ndim - 1)), edge_attr, 0)


def drop_edge_path(
    edge_index: Tensor,
    p: float | Tensor = 0.2,
    training: bool = True,
    *,
    edge_attr: Tensor | None = None,
    walks: int = 1,
    length: int = 3,
    undirected: bool = False,
    remove: bool = True,
    batch: Tensor | None = None,
    num_nodes: int | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Take the edges out that random walks pass.

    Each edge starts `walks` walks from its source with chance p; a walk takes `length` steps, each along one of the
    edges that leave where it is, all equally likely, and ends early where none does. Every edge passed is dropped.

    What stays is not a share of 1 - p, and depends on the graph. In an undirected graph a step of a walk passes every
    edge equally likely, so an edge is passed p walks length times in the mean, and about exp(-p walks length) stay; a
    little more, as walks turn back. Nothing is rescaled.

    Args:
        edge_index, training, edge_attr, remove, batch, num_nodes, site, owner: as in `drop_edge`.
        p: chance of an edge to start walks, in [0, 1]; a number, or a 0-d tensor.
        walks: from each start.
        length: steps of a walk.
        undirected: the other direction of a dropped edge falls too.

    Returns:
        As `drop_edge`.

    Raises:
        As `drop_edge`; OptionError also for walks or length below 1.

    Source: Li et al. 2023, arXiv:2205.10053 (MaskGAE, "path-wise masking").
    """
    p = check_graph_rate(p)
    for name, value in (("walks", walks), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r} was given; it is a whole number from 1 on.")
    edges = _check_edges(edge_index, batch, num_nodes)
    _check_attributes(edge_attr, len(edges))
    if not training:
        return edge_index, edge_attr
    named = owner is None and site is not None
    starts = draw_address(owner, f"{site}.starts" if named else site)
    steps = draw_address(owner, f"{site}.steps" if named else site)
    nodes = num_nodes if edges.batch is None else len(edges.batch)
    if nodes is None:
        nodes = int(edges.ends.max()) + 1 if len(edges) else 0
    rate = torch.as_tensor(p, dtype=torch.float64)
    keep = keep_off_walks(starts, steps, edges.ends, edges.graphs, rate, nodes, walks, length, undirected)
    return _apply(edge_index, edge_attr, keep.to(edge_index.device), remove)


class DropEdge(RateLayer):
    """Layer around `drop_edge`; gives its input back while nobody asks for noise.

    Args:
        p: chance to drop an edge, in [0, 1].
        undirected: both directions of an edge fall together.
        rescale: multiply the weights of edges with 1 / (1 - p).
        remove: False keeps all edges, with weight 0 where one is dropped.
    """

    def __init__(
        self, p: Rate = 0.5, undirected: bool = False, rescale: bool = False, remove: bool = True
    ) -> None:
        super().__init__(p)
        self.undirected, self.rescale, self.remove = undirected, rescale, remove

    def forward(  # type: ignore[override]
        self,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        num_nodes: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(2, E) and (E, ...) or None -> (2, K) and (K, ...) or None; batch: (N,), the graph of each node."""
        return drop_edge(
            edge_index, self.rate, self.active, edge_attr=edge_attr, undirected=self.undirected, rescale=self.rescale,
            remove=self.remove, batch=batch, num_nodes=num_nodes, site=self.site, owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """All arguments."""
        return f"p={self.p}, undirected={self.undirected}, rescale={self.rescale}, remove={self.remove}"


class DropEdgePath(RateLayer):
    """Layer around `drop_edge_path`; gives its input back while nobody asks for noise.

    Args:
        p: chance of an edge to start walks, in [0, 1].
        walks: from each start.
        length: steps of a walk.
        undirected: the other direction of a dropped edge falls too.
        remove: False keeps all edges, with weight 0 where one is dropped.
    """

    def __init__(
        self, p: Rate = 0.2, walks: int = 1, length: int = 3, undirected: bool = False, remove: bool = True
    ) -> None:
        super().__init__(p)
        self.walks, self.length, self.undirected, self.remove = walks, length, undirected, remove

    def forward(  # type: ignore[override]
        self,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        num_nodes: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(2, E) and (E, ...) or None -> (2, K) and (K, ...) or None; batch: (N,), the graph of each node."""
        return drop_edge_path(
            edge_index, self.rate, self.active, edge_attr=edge_attr, walks=self.walks, length=self.length,
            undirected=self.undirected, remove=self.remove, batch=batch, num_nodes=num_nodes, site=self.site,
            owner=self,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """All arguments."""
        walk = f"walks={self.walks}, length={self.length}"
        return f"p={self.p}, {walk}, undirected={self.undirected}, remove={self.remove}"
