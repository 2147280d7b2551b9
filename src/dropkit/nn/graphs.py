"""Dropout on graphs: nodes, messages, features; the edges themselves are in `edges.py`.

Conventions are PyTorch Geometric's: x (N, D), edge_index (2, E) of source and target, and for several graphs in one
batch the vector `batch` (N,), the graph of each node. That package is not needed.

A row of the address is a graph: its id is its place in the batch, or what the context says, and a graph's mask depends
on nothing else that is in the batch. A committee member has one mask, by numbers within the graph, for all graphs. What
has which number is told in `masks/scattered.py`: the i-th node, edge or message of a graph, in the order given; for
undirected edges the pair of nodes, so that the order of edges does not matter, and parallel edges fall together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropkit.errors import OptionError, ProbabilityError, ShapeError, check_probability
from dropkit.masks.laws import multiply
from dropkit.masks.philox import survivor_scale
from dropkit.masks.scattered_ops import draw_address, keep_rows
from dropkit.nn.layer import Rate, RateLayer


def check_graph_rate(p: float | Tensor) -> float | Tensor:
    """The one rate of a graph, or what is wrong with it."""
    if not isinstance(p, Tensor):
        return check_probability(p)
    if p.ndim:
        raise ProbabilityError(
            f"p of shape {tuple(p.shape)} was given; graphs take one rate: a number or 0-d tensor."
        )
    return p


def check_batch(batch: Tensor | None, items: int, what: str) -> Tensor | None:
    """(items,) int64 on the CPU, where masks of graphs are made."""
    if batch is None:
        return None
    if not isinstance(batch, Tensor) or batch.dtype not in (torch.int64, torch.int32):
        raise OptionError(
            f"batch={batch!r} was given; it is an int64 tensor, the graph of each of the {what}."
        )
    if batch.shape != (items,):
        raise ShapeError(
            f"batch of shape {tuple(batch.shape)} was given for {items} {what}; it needs one number for each."
        )
    if not torch.compiler.is_compiling() and items and int(batch.min()) < 0:
        raise OptionError(f"batch with {int(batch.min())} was given; graphs are numbered from 0 on.")
    return batch.to("cpu", torch.int64)


def scale_of(p: float | Tensor, x: Tensor) -> Tensor:
    """1 / (1 - p) of the rounded rate, in the dtype of x."""
    return survivor_scale(torch.as_tensor(p, dtype=torch.float64)).to(
        x.device, x.real.dtype if x.is_complex() else x.dtype
    )


def _drop(
    x: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    batch: Tensor | None,
    shared: Sequence[int],
    what: str,
    site: str | None,
    owner: object | None,
) -> Tensor:
    """Inverted dropout of items (n, *features), of which each belongs to a graph."""
    p = check_graph_rate(p)
    if not x.ndim:
        raise ShapeError(f"a tensor without dims was given; it needs one row for each of the {what}.")
    if not (x.is_floating_point() or x.is_complex()):
        raise OptionError(f"a tensor of {x.dtype} was given; dropout works on floating or complex values.")
    graphs = check_batch(batch, len(x), what)
    if not training:
        return x
    if graphs is None:  # the mask of one row, all of it
        result = multiply("bernoulli", x[None], p, tuple(dim + 1 for dim in shared), site, owner)[0]
        return x.copy_(result) if inplace else result
    where, rate = draw_address(owner, site), torch.as_tensor(p, dtype=torch.float64)
    if not isinstance(p, Tensor) and p == 0:
        return x
    sizes = [1 if dim in shared else x.shape[dim] for dim in range(1, x.ndim)]
    keep = keep_rows(where, graphs, rate, len(x), math.prod(sizes), 0 in shared).view(len(x), *sizes)
    result = torch.where(keep.to(x.device), x * scale_of(p, x), 0)
    return x.copy_(result) if inplace else result


def drop_node(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    batch: Tensor | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop all features of a node; its edges stay, and carry nothing.

    y[n] = x[n] * keep[n] / (1 - p),    keep[n] ~ Bernoulli(1 - p)

    Args:
        x: (N, *features), floating or complex.
        p: chance to drop a node, in [0, 1]; a number, or a 0-d tensor.
        training: False gives x back.
        inplace: write the result into x.
        batch: (N,) int64, the graph of each node; None: one graph.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        The shape of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: batch has not one number for each node.
        OptionError: x or batch of a dtype that does not fit.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Feng et al. 2020, arXiv:2005.11079 (GRAND).
    """
    return _drop(x, p, training, inplace, batch, tuple(range(1, x.ndim)), "nodes", site, owner)


def drop_message(
    messages: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    batch: Tensor | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop single elements of the messages on the edges.

    y[e, d] = m[e, d] * keep[e, d] / (1 - p),    keep[e, d] ~ Bernoulli(1 - p)

    Of dropping elements, edges and nodes at one rate, this has the least variance in the sums over neighbours.

    Args:
        messages: (E, *features), floating or complex.
        batch: (E,) int64, the graph of each edge, batch[edge_index[0]]; None: one graph.
        p, training, inplace, site, owner: as in `drop_node`.

    Returns:
        The shape of the messages.

    Raises:
        As `drop_node`.

    Source: Fang et al. 2023, arXiv:2204.10037.
    """
    return _drop(messages, p, training, inplace, batch, (), "messages", site, owner)


def drop_feature(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    columns: bool = False,
    batch: Tensor | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop features of nodes, one by one or whole columns of a graph.

    y[n, d] = x[n, d] * keep[n, d] / (1 - p);    columns: keep[g, d] of the graph g of node n

    Args:
        x: (N, *features), floating or complex.
        columns: whether a feature falls for all nodes of a graph together.
        p, training, inplace, batch, site, owner: as in `drop_node`.

    Returns:
        The shape of x.

    Raises:
        As `drop_node`.

    Source: elements: Srivastava et al. 2014, JMLR 15; columns: You et al. 2020, arXiv:2010.13902 ("attribute masking").
    """
    return _drop(x, p, training, inplace, batch, (0,) if columns else (), "nodes", site, owner)


class DropNode(RateLayer):
    """Layer around `drop_node`; the identity while nobody asks for noise.

    Args:
        p: chance to drop a node, in [0, 1].
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        """(N, *features) -> the same shape; batch: (N,), the graph of each node."""
        return drop_node(x, self.rate, self.active, self.inplace, batch=batch, site=self.site, owner=self)


class DropMessage(RateLayer):
    """Layer around `drop_message`; the identity while nobody asks for noise.

    Args:
        p: chance to drop an element of a message, in [0, 1].
        inplace: write the result into the input.
    """

    def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        """(E, *features) -> the same shape; batch: (E,), the graph of each edge."""
        return drop_message(x, self.rate, self.active, self.inplace, batch=batch, site=self.site, owner=self)


class DropFeature(RateLayer):
    """Layer around `drop_feature`; the identity while nobody asks for noise.

    Args:
        p: chance to drop a feature, in [0, 1].
        inplace: write the result into the input.
        columns: whether a feature falls for all nodes of a graph together.
    """

    def __init__(self, p: Rate = 0.5, inplace: bool = False, columns: bool = False) -> None:
        super().__init__(p, inplace)
        self.columns = columns

    def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        """(N, *features) -> the same shape; batch: (N,), the graph of each node."""
        return drop_feature(
            x,
            self.rate,
            self.active,
            self.inplace,
            columns=self.columns,
            batch=batch,
            site=self.site,
            owner=self,
        )
