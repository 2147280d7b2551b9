"""A committee's members as one plain module: the masks are constants, and nothing is drawn when it runs.

The graph of a model (`graph.py`) is cut where chance enters. What stands before is computed once; what follows is
computed for all members, in one of two forms:

    batched     the members stand among the rows, member m's row b at m B + b; a mask (m, 1, C) multiplies x seen as
                (m, B, C)
    unrolled    the members one after the other, each with constants of its own

Both use torch's operators alone, so that exporters can read them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dropkit.committee.graph import DRAW, DROPOUT_AT, Graph, halve
from dropkit.errors import ExportError
from dropkit.masks.address import masks

NOISE_AT = torch.ops.dropkit.noise_at.default
_MULTIPLYING = (DROPOUT_AT, NOISE_AT)
# Checks that torch.export writes between the operators; they compute nothing.
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default)

Form = Literal["batched", "unrolled", "thinned"]


class NotBatchableError(Exception):
    """Why the members of a graph cannot stand among its rows."""


@dataclass(frozen=True, slots=True)
class SiteMask:
    """The masks of one site, all members of them.

    Attributes:
        site: its name.
        keep: (M, 1, *features) bool where the law keeps or drops, else None. Shared dims have size 1.
        factor: what a kept value is multiplied with: () for dropout at one rate, else (M, 1, *features).
    """

    site: str
    keep: Tensor | None
    factor: Tensor


def site_masks(graph: Graph, seed: int, members: int) -> dict[fx.Node, SiteMask | Tensor]:
    """What each mask of a graph is for members 0 .. M - 1, bit for bit what the members have.

    Args:
        graph: as recorded.
        seed, members: which committee.

    Returns:
        For each node that reads an address: a `SiteMask` where it multiplies a tensor, else its values (M, ...).

    Raises:
        ExportError: a mask's rate or its shape depends on the rows.
    """
    noisy = [
        node
        for node in graph.module.graph.nodes
        if any(source in graph.draws for source in node.all_input_nodes)
    ]
    values: dict[fx.Node, list[Tensor]] = {node: [] for node in noisy}
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for member in range(members):
            with masks(seed=seed, member=member):
                drawn = {node: node.target(*node.args, **node.kwargs) for node in graph.draws}  # type: ignore[operator]
            for node in noisy:
                values[node].append(_one_mask(node, known | drawn, known, _site(graph, node)))
    return {
        node: _site_mask(node, torch.stack(several), _site(graph, node)) for node, several in values.items()
    }


def _one_mask(node: fx.Node, env: dict[fx.Node, Any], known: dict[fx.Node, Any], site: str) -> Tensor:
    """The noise of one node for the member whose addresses are in `env`; what all members share goes to `known`."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target not in _MULTIPLYING:
        arguments = [_value(a, env, known, site) for a in node.args]
        return node.target(*arguments)
    source, where, rate, shared, *law = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(shared, Sequence)
    p = _value(rate, env, known, site)
    value = source.meta["val"]
    one = {0, *shared}
    own = [1] * (value.ndim - p.ndim) + list(p.shape)
    # A rate that differs along a dim makes the factors differ there, even where all share one decision.
    shape = [1 if i in one and own[i] == 1 else size for i, size in enumerate(value.shape)]
    if not all(fixed(size) for size in shape):
        raise ExportError(
            f"the mask at {site!r} has the shape {tuple(shape)}, which depends on the number of rows, so no constant "
            "can stand for it. Give the model its rows first: (B, ...)."
        )
    ones = torch.ones([rows_now(size) for size in shape], dtype=value.dtype, device=value.device)
    return node.target(ones, env[where], p, shared, *law)  # type: ignore[index]


def _site_mask(node: fx.Node, values: Tensor, site: str) -> SiteMask | Tensor:
    """Masks as small as they can be kept: a bool for each element, and one number, where the rate is one."""
    if node.target not in _MULTIPLYING:
        return values
    keep = values != 0
    kept = values[keep]
    if node.target is not DROPOUT_AT and not (node.target is NOISE_AT and node.args[-1] == "exact"):
        return SiteMask(site, None, values)
    return SiteMask(site, keep, kept[0] if len(kept) else values.new_zeros(()))


def _value(of: Any, env: dict[fx.Node, Any], known: dict[fx.Node, Any], site: str) -> Any:
    """The value of a node, or of a list of nodes, that does not depend on the input."""
    if isinstance(of, list | tuple):
        return type(of)(_value(item, env, known, site) for item in of)
    if not isinstance(of, fx.Node):
        return of
    if of in env:
        return env[of]
    if of.op == "get_attr":
        found: Any = of.graph.owning_module
        for part in str(of.target).split("."):
            found = getattr(found, part)
        return found
    if of.op != "call_function":
        raise ExportError(
            f"the mask at {site!r} depends on the rows themselves (by {of.name}), so no constant can stand for it. "
            "Such a committee can be asked in Python alone."
        )
    result = of.target(  # type: ignore[operator]
        *_value(of.args, env, known, site), **{k: _value(v, env, known, site) for k, v in of.kwargs.items()}
    )
    if not any(source in env and source not in known for source in of.all_input_nodes):
        known[of] = result
    return result


def widest(graph: Graph, rows: int) -> int:
    """The most values per row that an operator puts out after a mask, of a graph recorded with this many rows."""
    sizes = [
        math.prod(rows_now(size) for size in value.shape)
        for node in graph.touched
        if isinstance(value := node.meta.get("val"), Tensor) and node.target is not DRAW
    ]
    return -(-max(sizes, default=1) // rows)


def _site(graph: Graph, node: fx.Node) -> str:
    return next(graph.draws[source] for source in node.all_input_nodes if source in graph.draws)


class FrozenMembers(nn.Module):
    """x -> what each member puts out, (M, B, *out); masks inside.

    Args:
        graph: as recorded; it is used up.
        site_masks: of all members, see `site_masks`.
        members: M.
        at_once: members that are computed together; memory grows with it.
        form: "batched" or "unrolled".

    Raises:
        NotBatchableError: form is "batched", and the rows of this graph cannot hold members.
    """

    def __init__(
        self,
        graph: Graph,
        site_masks: dict[fx.Node, SiteMask | Tensor],
        members: int,
        at_once: int,
        form: Form,
    ) -> None:
        super().__init__()
        named = {node.name: mask for node, mask in site_masks.items()}
        halves = halve(graph)
        suffix = lean(halves.suffix)
        self.prefix = lean(halves.prefix)
        self.members = members
        self.names = tuple(named)
        for name, mask in named.items():
            if isinstance(mask, Tensor):
                self.register_buffer(f"{name}_value", mask)
                continue
            self.register_buffer(f"{name}_factor", mask.factor)
            if mask.keep is not None:
                self.register_buffer(f"{name}_keep", mask.keep)
        self.step = min(at_once, members) if form == "batched" else 1
        sizes = {min(self.step, members - start) for start in range(0, members, self.step)}
        self.suffixes = nn.ModuleDict(
            {str(size): _suffix(suffix, named, size if form == "batched" else None) for size in sizes}
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """(B, ...) -> (M, B, *out)."""
        front = self.prefix(*inputs)
        parts = []
        for start in range(0, self.members, self.step):
            stop = min(start + self.step, self.members)
            noise = [part for name in self.names for part in self._parts(name, start, stop)]
            parts.append(self.suffixes[str(stop - start)](*front, *noise))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, name: str, start: int, stop: int) -> list[Tensor]:
        found = [getattr(self, f"{name}_{part}", None) for part in ("value", "keep", "factor")]
        # All members at once take the constants as they are: a slice would be an operator of its own.
        whole = stop - start == self.members
        return [
            part if part.ndim == 0 or whole else part[start:stop]
            for part in found
            if isinstance(part, Tensor)
        ]


def _suffix(suffix: fx.GraphModule, named: dict[str, SiteMask | Tensor], size: int | None) -> fx.GraphModule:
    """The suffix for `size` members among the rows, or for one (None): (*frontier, *masks) -> (size, B, *out)."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    starts = [node for node in suffix.graph.nodes if node.op == "placeholder"]
    for node in starts:
        copies[node] = graph.placeholder(node.name)
    inputs: dict[str, list[fx.Node]] = {}
    for name, mask in named.items():
        parts = (
            ("value",)
            if isinstance(mask, Tensor)
            else ("factor",)
            if mask.keep is None
            else ("keep", "factor")
        )
        inputs[name] = [graph.placeholder(f"{name}_{part}") for part in parts]
    alone = dict(copies)  # frontier values as they are: rows without members
    if size is not None:
        for node in starts:
            copies[node] = _spread(graph, node, copies[node], size)
    for node in suffix.graph.nodes:
        if node.op == "placeholder" or node.target is DRAW:
            continue
        if node.name in named:
            mask = named[node.name]
            if isinstance(mask, Tensor):
                if size is not None:
                    raise NotBatchableError(f"{node.target} gives no factor for rows")
                copies[node] = graph.call_method("squeeze", (inputs[node.name][0], 0))
            else:
                copies[node] = _multiply(graph, node, copies, alone, mask, inputs[node.name], size)
        elif node.op == "output":
            copies[node] = graph.output(_output(graph, node, copies, size))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return fx.GraphModule(suffix, graph)


def _spread(graph: fx.Graph, node: fx.Node, value: fx.Node, size: int) -> fx.Node:
    """A frontier value for all members: member m's rows stand at m B, m B + 1, ... of the dim that holds the rows."""
    given = node.meta.get("val")
    if isinstance(given, torch.SymInt) and not fixed(given):
        if _rows_of(given) is None:
            raise NotBatchableError(f"{node.name} depends on the number of rows in another way than c B")
        return graph.call_function(operator.mul, (value, size))
    if not isinstance(given, Tensor):
        return value
    dims = [i for i, n in enumerate(given.shape) if not fixed(n)]
    if not dims:
        return value
    dim = dims[0]
    if len(dims) > 1 or _rows_of(given.shape[dim]) is None:
        raise NotBatchableError(f"{node.name} has the rows in {len(dims)} dims")
    opened = graph.call_method("unsqueeze", (value, dim))
    shape = [-1] * (given.ndim + 1)
    shape[dim] = size
    copied = graph.call_method("expand", (opened, *shape))
    return graph.call_method("flatten", (copied, dim, dim + 1))


def _multiply(
    graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], alone: dict[fx.Node, Any], mask: SiteMask,
    inputs: list[fx.Node], size: int | None,
) -> fx.Node:  # fmt: skip
    """x times its mask; what is dropped is 0 whatever it was."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    if size is None:
        x = copies[source]
        inputs = [graph.call_method("squeeze", (i, 0)) if _per_member(mask, i) else i for i in inputs]
    elif not shape or _rows_of(shape[0]) is None:
        raise NotBatchableError(f"the mask at {mask.site!r} is not one for rows")
    elif source.op == "placeholder" and copies[source] is not alone[source]:
        x = graph.call_method("unsqueeze", (alone[source], 0))  # not copied for each member, but broadcast
    else:
        x = graph.call_method("unflatten", (copies[source], 0, (size, -1)))
    y = graph.call_function(torch.ops.aten.mul.Tensor, (x, inputs[-1]))
    if mask.keep is not None:
        y = graph.call_function(torch.ops.aten.where.ScalarOther, (inputs[0], y, 0.0))
    return y if size is None else graph.call_method("flatten", (y, 0, 1))


def _per_member(mask: SiteMask, input_: fx.Node) -> bool:
    return mask.factor.ndim > 0 or input_.name.endswith("_keep")


def _output(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], size: int | None) -> fx.Node:
    outputs = fx.node.map_arg(node.args[0], lambda n: copies[n])
    flat = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if len(flat) != 1:
        raise ExportError(
            f"the model puts out {len(flat)} tensors; a committee is exported with one, (B, *out). Wrap the model in a "
            "module that returns the one you need."
        )
    if size is None:
        return graph.call_method("unsqueeze", (flat[0], 0))
    return graph.call_method("unflatten", (flat[0], 0, (size, -1)))


def fixed(size: Any) -> bool:
    """Whether a size does not depend on the number of rows."""
    return not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols


def rows_now(size: Any) -> int:
    """A size of the recorded rows; int() of an open one would tell torch to close it."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _rows_of(size: Any) -> int | None:
    """c where a size is c times the number of rows, else None."""
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    symbols = expression.free_symbols
    if len(symbols) != 1:
        return None
    factor = expression / next(iter(symbols))
    return int(factor) if factor.is_Integer and factor > 0 else None


def lean(module: fx.GraphModule) -> fx.GraphModule:
    """The same without what checks and computes nothing, and with the weights that are used alone."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.target in _CHECKS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
    return fx.GraphModule(module, graph)
