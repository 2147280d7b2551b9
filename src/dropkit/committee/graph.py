"""A model as a graph of torch's operators, in which one can see where its masks act.

`record` runs the model once, on tensors without values, and writes down what it does. In the graph each draw of a
mask is a node (`dropkit::draw`) that knows the name of its site. From there on downwards the graph is touched by
chance; all else is the prefix, the same for all members. Thinning, moments and export read this graph.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from dropkit.masks import compiled, noise_ops, ops
from dropkit.masks.address import Draw, masks
from dropkit.nn.attention import attend_at
from dropkit.nn.attention_ops import ATTENTION_AT

DRAW = torch.ops.dropkit.draw.default
DROPOUT_AT = torch.ops.dropkit.dropout_at.default
NOISE_AT = torch.ops.dropkit.noise_at.default
# Operators that only make another name for their input's memory, besides those that torch says do so.
_SAME_MEMORY = {operator.getitem}


class RecordingError(Exception):
    """Why a model cannot be recorded; the committee then runs it as it is."""


@dataclass(frozen=True, slots=True)
class Graph:
    """What a model does to one tile of rows.

    Attributes:
        module: x -> the model's output; a plain module around the model's own weights and buffers. Its masks act
            when it runs within `masks(seed, member=k)`, and are those of the model itself.
        draws: the nodes at which an address is drawn, in the order of the pass, and the names of their sites.
        touched: all nodes that depend on a draw.
        frontier: untouched nodes whose value a touched one (or the output) uses: where the prefix ends.
    """

    module: fx.GraphModule
    draws: dict[fx.Node, str]
    touched: frozenset[fx.Node]
    frontier: tuple[fx.Node, ...]

    @property
    def is_open(self) -> bool:
        """Whether it takes any number of rows, from 2 on."""
        inputs = [n.meta.get("val") for n in self.module.graph.find_nodes(op="placeholder")]
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        return bool(tensors) and all(v.ndim > 0 and isinstance(v.shape[0], torch.SymInt) for v in tensors)


def record(
    network: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    how: compiled.Recording = "operators",
) -> Graph:
    """Write down what an evaluation pass with masks does; the number of rows stays open where the model allows it.

    Args:
        network: a committee's copy of a model: evaluation mode, sites named.
        inputs: what it is called with, the rows first in each tensor; rows of the kind that will come.
        kwargs: the same by name.
        how: as in `compiled.recording`: "operators" to be read, "kernels" to be run.

    Raises:
        RecordingError: the model's way depends on values, or it writes where others read.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    kwargs = kwargs or {}
    rows = _open_rows(network, inputs, kwargs)
    try:
        with _quietly(), masks(seed=0, member=0), compiled.recording(how), torch.no_grad():
            program = torch.export.export(network, inputs, kwargs, dynamic_shapes=rows, strict=False)
            module = program.module(check_guards=False)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "data-dependent" in lines[0]:
            raise RecordingError("its code goes one way or another by the values that it meets") from error
        raise RecordingError(lines[0]) from error
    assert isinstance(module, fx.GraphModule)
    share_weights(module, network)
    inline(module)
    for node in list(
        module.graph.nodes
    ):  # of what `torch.export` cannot know: how many numbers an address has
        if node.target is torch.ops.aten._assert_scalar.default:
            module.graph.erase_node(node)
    without_writes(module.graph)
    module.graph.eliminate_dead_code(_must_stay)
    module.graph.lint()
    module.recompile()
    return read(module)


@contextmanager
def _quietly() -> Iterator[None]:
    """What torch has to say of a model that cannot be recorded, pages of it, is said by us in a line."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.fx", "torch.fx.experimental.symbolic_shapes", "torch.export")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _open_rows(network: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Dim 0 of every tensor as `torch.export` is told that it may vary; None where its number is fixed."""
    given = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
    if any(leaf.ndim == 0 or leaf.shape[0] < 2 for leaf in given):
        return None  # one row is a special case for many operators
    try:
        bound = inspect.signature(network.forward).bind(*inputs, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    if any(name in bound for name in ("args", "kwargs")):
        return None
    return {
        name: tree_map(lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) else None, value)
        for name, value in bound.items()
    }


def read(module: fx.GraphModule) -> Graph:
    """Find where chance enters a recorded module, and what it touches."""
    draws = {n: str(n.args[0]) for n in module.graph.nodes if n.target is DRAW}
    touched: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node in draws or any(source in touched for source in node.all_input_nodes):
            touched.add(node)
    frontier = tuple(
        n
        for n in module.graph.nodes
        if n not in touched
        and n.op not in ("output", "get_attr")
        and any(u in touched or u.op == "output" for u in n.users)
    )
    return Graph(module, draws, frozenset(touched), frontier)


@dataclass(frozen=True, slots=True)
class Halves:
    """A recorded model cut where chance enters.

    Attributes:
        prefix: the model's inputs, flat, -> the values of the frontier, in its order.
        suffix: these values -> the model's outputs, a flat tuple; run within `masks(seed, member=k)`, once for each
            member.
    """

    prefix: fx.GraphModule
    suffix: fx.GraphModule


def halve(graph: Graph) -> Halves:
    """Cut a graph into what is computed once and what each member computes."""
    module = graph.module
    prefix, suffix = fx.Graph(), fx.Graph()
    first: dict[fx.Node, fx.Node] = {}
    second: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            suffix.node_copy(node, second.__getitem__)
            continue
        if node not in graph.touched:
            first[node] = prefix.node_copy(node, first.__getitem__)
        if node in graph.frontier:
            second[node] = suffix.placeholder(node.name)
            second[node].meta = dict(node.meta)
        elif node in graph.touched or node.op == "get_attr":
            second[node] = suffix.node_copy(node, second.__getitem__)
    prefix.output(tuple(first[n] for n in graph.frontier))
    for half in (prefix, suffix):
        half.eliminate_dead_code(_must_stay)
    return Halves(fx.GraphModule(module, prefix), fx.GraphModule(module, suffix))


def reach_kernels(suffix: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    """The same graph with its masks drawn by functions, not operators: quicker, and torch.func.vmap can follow.

    Returns:
        The graph, and whether the functions serve all its draws, so that many members can be run at once.
    """
    graph, served = fx.Graph(), True
    copies: dict[fx.Node, fx.Node] = {}
    for node in suffix.graph.nodes:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target is DRAW and all(user.target in _FUNCTIONS for user in node.users):
            copy.target = compiled.drawn
        elif node.target is DRAW:
            served = False
        elif node.target in _FUNCTIONS and any(
            source.target is compiled.drawn for source in copy.all_input_nodes
        ):
            copy.target = cast(Callable[..., Any], _FUNCTIONS[node.target])
    return fx.GraphModule(suffix, graph), served


def _dropped(x: Tensor, where: Draw, p: Tensor, shared: Sequence[int]) -> Tensor:
    """`dropkit::dropout_at` with the address as it was drawn."""
    return ops.dropout(x, where.key, where.member, p, *where[2:5], _dims(x, where, shared))


def _noised(x: Tensor, where: Draw, p: Tensor, shared: Sequence[int], law: str) -> Tensor:
    """`dropkit::noise_at` with the address as it was drawn."""
    return noise_ops.noise(x, *where.tensors(), p, *where[2:5], _dims(x, where, shared), law)


def _dims(x: Tensor, where: Draw, shared: Sequence[int]) -> Sequence[int]:
    return (0, *shared) if where.batch_shared and x.ndim and 0 not in shared else tuple(shared)


_FUNCTIONS = {DROPOUT_AT: _dropped, NOISE_AT: _noised, ATTENTION_AT: attend_at}


def share_weights(module: nn.Module, network: nn.Module) -> None:
    """Put the network's own weights and buffers in place of a recorded module's: both change and learn as one."""
    for tensors in (
        network.named_parameters(remove_duplicate=False),
        network.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in tensors:
            parent, _, last = name.rpartition(".")
            try:
                owner = module.get_submodule(parent)
            except AttributeError:
                continue  # a weight that the pass does not use
            if last in owner._parameters or last in owner._buffers:
                owner._parameters.pop(last, None)
                owner._buffers.pop(last, None)
                if isinstance(tensor, nn.Parameter):
                    owner._parameters[last] = tensor
                else:
                    owner._buffers[last] = tensor


def _must_stay(node: fx.Node) -> bool:
    """A draw that nobody uses counts as a call of its site, which tells the next one apart."""
    return node.op in ("placeholder", "output") or node.target is DRAW


def inline(module: fx.GraphModule) -> None:
    """Put in place what was recorded within a switched-off autocast or another gradient mode: an evaluation pass
    has the mode of its caller.

    Raises:
        RecordingError: a part runs under autocast, or in another way that holds a graph of its own.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        name = node.target.name()
        at = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        switched_off = name == "wrap_with_autocast" and node.args[2] is False
        if at is None or not (switched_off or name == "wrap_with_set_grad_enabled"):
            raise RecordingError(f"a part of it is run by {name}")
        part = module.get_submodule(str(cast(fx.Node, node.args[at]).target))
        assert isinstance(part, fx.GraphModule)
        inline(part)
        inputs = dict(zip(part.graph.find_nodes(op="placeholder"), node.args[at + 1 :], strict=True))
        for inner in part.graph.find_nodes(op="get_attr"):
            raise RecordingError(f"a part of it, run by {name}, has weights of its own ({inner.target})")
        with graph.inserting_before(node):
            results = graph.graph_copy(part.graph, inputs)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(
                results[user.args[1]] if isinstance(results, tuple | list) else results
            )
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code(_must_stay)


def without_writes(graph: fx.Graph) -> None:
    """Write anew what operators such as relu_ and add_ write into their input, so that values can be kept and shared.

    Raises:
        RecordingError: memory that has several names is written to, or the operator has no form without writing.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        schema = node.target._schema
        if not schema.is_mutable:
            continue
        written = node.args[0] if node.args else None
        name = schema.name.partition("::")[2]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        if not name.endswith("_") or packet is None or not isinstance(written, fx.Node):
            raise RecordingError(f"it writes into memory by {schema.name}")
        if not hasattr(packet, node.target._overloadname):
            raise RecordingError(f"it writes into memory by {schema.name}.{node.target._overloadname}")
        later = _after(graph, node)
        aliases = _names_of(written, apart_from=node) - {written}
        if any(user in later for alias in aliases for user in alias.users):
            raise RecordingError(f"it writes by {schema.name} into memory that has several names")
        node.target = getattr(packet, node.target._overloadname)
        for user in [u for u in written.users if u in later]:
            user.replace_input_with(written, node)


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    nodes = list(graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])


def _names_of(node: fx.Node, apart_from: fx.Node) -> set[fx.Node]:
    """Nodes that may stand for the same memory as this one, itself among them."""
    found, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        near = [user for user in here.users if _is_view(user)]
        if _is_view(here):
            near += here.all_input_nodes[:1]
        for other in near:
            if other not in found and other is not apart_from:
                found.add(other)
                waiting.append(other)
    return found


def _is_view(node: fx.Node) -> bool:
    if node.target in _SAME_MEMORY:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is not None for r in returns) or node.target.name().startswith(
        ("aten::reshape", "aten::contiguous", "aten::to", "aten::flatten", "aten::dropout")
    )
