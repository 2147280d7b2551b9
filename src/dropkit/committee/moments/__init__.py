"""Mean and variance of a committee in one pass through the network, without asking its members.

Each operator of the recorded graph is handed the mean and variance of its input and gives those of its output. Masks,
weights, sums and views are exact; where the network bends, its input is taken as Gaussian. `Moments.checked` says by
how much that is off, against members that were asked.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.func import vmap

from dropkit.committee.graph import Graph
from dropkit.committee.moments.call import operator_name
from dropkit.committee.moments.propagation import MASKS, Pass, attribute, output_of
from dropkit.committee.moments.record import Factors, Joint, LastLayer, Moments
from dropkit.committee.moments.values import Account, Spread
from dropkit.errors import MomentsError, OptionError

Covariance = Literal["diagonal", "full"]
Row = Callable[[Tensor], tuple[Tensor, ...]]

# Values that a chunk of rows may hold in its widest tensor with all its sources: 64 MiB in float32.
CHUNK_VALUES = 1 << 24
# Sources of one row. Shared masks need one for each element; with covariance="full" each value that varies has one.
SOURCES: dict[str, int] = {"diagonal": 1024, "full": 8192}
# Beyond means and variances, a row holds its values at the points of a quadrature.
BESIDES = 32
# What may stand behind a last layer: a straight line for each output by itself.
AFTER_LAST = ("add", "sub", "rsub", "mul", "div", "neg", "to", "clone")


def moments(
    graph: Graph, x: Tensor, *, covariance: Covariance = "diagonal", sources: int | None = None
) -> Moments:
    """Mean and variance of a committee's output in one pass.

    Args:
        graph: `record(network, x[:1])`, the model on one row: rows go through it side by side.
        x: (B, ...).
        covariance: "diagonal": values vary independently, but for masks that are shared by several values (channels,
            paths, locked masks), whose elements are carried to the end; about 3 plain passes, and one more for each
            such element. "full": every chance is carried, so that correlations between units and between branches
            count, and the covariance between outputs can be had; a pass for each source, which is a mask element or
            a unit behind a curve.
        sources: most sources of one row; beyond them independence is assumed, and said. 1024, or 8192 for "full".

    Raises:
        MomentsError: an operator below the masks has no rule and no derivative, or the result is not finite.
        OptionError: covariance or sources are out of range.

    Source: Wang and Manning 2013, Fast dropout training, ICML; Postels et al. 2019, arXiv:1908.00598.
    """
    if covariance not in SOURCES:
        raise OptionError(f"covariance={covariance!r} was given; it is 'diagonal' or 'full'.")
    limit = SOURCES[covariance] if sources is None else sources
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise OptionError(f"sources={sources!r} was given; a whole number from 0 on is allowed.")
    full = covariance == "full"
    output = output_of(graph)
    account = Account(full, limit)

    def row(x: Tensor) -> tuple[Tensor, ...]:
        result = Pass(graph, account, output).spread(x)
        factor = (_factor(result),) if full else ()
        return result.mean[0], result.variance.expand(result.mean.shape)[0], *factor

    mean, variance, *factor = _side_by_side(row, x, account, rows_at_once(graph, full, limit))
    bad = ~(mean.isfinite() & variance.isfinite())
    if bool(bad.any()):
        rows = bad.flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise MomentsError(
            f"mean or variance is not finite in {len(rows)} rows, the first ones {rows[:5]}. Look at their inputs and "
            "at the plain network's output for them."
        )
    left = tuple(f"{where}: {what}" for where, what in account.left.items())
    joint: Joint | None = Factors(factor[0], variance) if full else None
    if joint is None:
        joint = last_layer(graph, x, limit)
    return Moments(mean, variance, not left, left, account.sources, joint)


def last_layer(graph: Graph, x: Tensor, limit: int = SOURCES["diagonal"]) -> LastLayer | None:
    """What gives the covariance between outputs where the last layer is linear; None where it is not.

    cov[b] = a a^T * (W diag(own[b]) W^T + sum over s of (W f[b, s]) (W f[b, s])^T)

    own = p / (1 - p) h**2 for one mask, and a is what the output is multiplied with behind the layer. As exact as own
    and f are: without error where one mask alone stands before the layer. Nothing is computed until it is asked for.
    """
    node, behind = output_of(graph), []
    while operator_name(node.target) != "linear":
        touched = [n for n in node.all_input_nodes if n in graph.touched]
        if len(touched) != 1 or operator_name(node.target) not in AFTER_LAST:
            return None
        behind.append(node)
        node = touched[0]
    features = node.args[0]
    if not isinstance(features, fx.Node) or features not in graph.touched or node.args[1] in graph.touched:
        return None
    shape = features.meta["val"].shape
    if len(shape) != 2 or any(len(n.users) > 1 for n in (node, *behind[1:])):
        return None
    weight = attribute(graph.module, str(node.args[1].target)) if isinstance(node.args[1], fx.Node) else None
    if weight is None or node.args[1].op != "get_attr":  # type: ignore[union-attr]
        return None
    chunk = rows_at_once(graph, full=False, limit=limit)

    def scale() -> Tensor:
        """(n,), a: what one unit at the layer's output is at the network's."""
        one = Spread(weight.new_zeros(1, len(weight)), {0: weight.new_ones(1, 1, len(weight))})
        with torch.no_grad():
            result = Pass(graph, Account(False, limit), output_of(graph), {node: one}).spread(x[0])
        return result.factors[0][0, 0]

    def laws(rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) own variances and (B, S, D) factors of the layer's inputs."""

        def row(x: Tensor) -> tuple[Tensor, ...]:
            result = Pass(graph, account, features).spread(x)
            own = torch.zeros_like(result.mean) if result.own is None else result.own
            return own[0], _factor(result)

        account = Account(False, limit)
        own, factor = _side_by_side(row, rows, account, chunk)
        return own, factor

    return LastLayer(x, weight, scale, laws)


def _side_by_side(row: Row, x: Tensor, account: Account, chunk: int) -> list[Tensor]:
    """A function of one row for all rows; one after the other where torch.func.vmap cannot."""
    given = x if len(x) else x.new_zeros(1, *x.shape[1:])
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch.func says where it is slow, and forward mode scripts its rules
        together = True
        for rows in torch.split(given, chunk):
            if together:
                try:
                    parts.append(vmap(row)(rows))
                    continue
                except (
                    RuntimeError
                ):  # an operator that vmap cannot run; what is wrong with the row itself comes again
                    together = False
            try:
                parts.append(tuple(torch.stack(each) for each in zip(*map(row, rows), strict=True)))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise MomentsError(
                    f"the network's mean and variance cannot be had in one pass: {str(error).strip().splitlines()[0]} "
                    "Sample instead: committee.predict(x)."
                ) from error
    return [torch.cat(each)[: len(x)] for each in zip(*parts, strict=True)]


def _factor(x: Spread) -> Tensor:
    """(S, *out) of a spread of (1, *out)."""
    parts = [factor[:, 0] for _, factor in sorted(x.factors.items())]
    return torch.cat(parts) if parts else x.mean.new_zeros(0, *x.mean.shape[1:])


def rows_at_once(graph: Graph, full: bool, limit: int) -> int:
    """Rows whose widest touched tensor, with all sources it may have, stays within memory."""
    widest, carried = 1, 0
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        if node not in graph.touched or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        shape = [int(size) for size in value.shape]
        widest = max(widest, math.prod(shape))
        shared: Any = node.args[3] if operator_name(node.target) in MASKS else None
        elements = math.prod(n for d, n in enumerate(shape) if d and d not in (shared or ()))
        if full or (shared is not None and elements < math.prod(shape)):
            carried += elements
    return max(1, CHUNK_VALUES // (widest * (min(carried, limit) + BESIDES)))
