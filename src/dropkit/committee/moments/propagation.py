"""One row's way through a recorded graph, each node by its rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dropkit.committee.graph import DRAW, Graph
from dropkit.committee.moments.call import Call, operator_name, tangent
from dropkit.committee.moments.rules import RULES
from dropkit.committee.moments.values import Account, Spread, spelled
from dropkit.errors import MomentsError

MASKS = ("dropout_at", "noise_at")


class Pass:
    """One row through the graph, each node by its rule.

    Args:
        graph: of one row.
        account: where sources are counted and approximations noted.
        output: the node to stop at.
        given: nodes whose value is known.
    """

    def __init__(
        self, graph: Graph, account: Account, output: fx.Node, given: dict[fx.Node, Spread] | None = None
    ) -> None:
        self.graph = graph
        self.account = account
        self.output = output
        self.given = given or {}
        self.last = _last_uses(graph.module.graph.nodes)
        self.sites: dict[fx.Node, frozenset[str]] = {}

    def spread(self, row: Tensor) -> Spread:
        """(...) one row -> the law of the output, (1, *out)."""
        self.account.sources = self.account.families = 0
        values: dict[fx.Node, Any] = {}
        for node in self.graph.module.graph.nodes:
            values[node] = self._value(node, values, row)
            if node is self.output:
                break
            for done in self.last.get(node, ()):
                values.pop(done, None)
        result = values[self.output]
        if isinstance(result, Tensor):
            result = Spread(result, {})
        if not isinstance(result, Spread) or result.mean.ndim == 0 or result.mean.shape[0] != 1:
            what = tuple(result.mean.shape) if isinstance(result, Spread) else type(result).__name__
            raise MomentsError(f"the model made {what} of one row; moments need one tensor (rows, *out).")
        return result

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], row: Tensor) -> Any:
        if node in self.given:
            return self.given[node]
        if node.op == "placeholder":
            return row[None]
        if node.op == "get_attr":
            return attribute(self.graph.module, str(node.target))
        if node.target is DRAW:
            self.sites[node] = frozenset((self.graph.draws[node],))
            return None
        args: Any = fx.node.map_arg(tuple(node.args), values.__getitem__)
        kwargs: Any = fx.node.map_arg(dict(node.kwargs), values.__getitem__)
        assert callable(node.target)
        if node not in self.graph.touched:
            return node.target(*args, **kwargs)
        above = [self.sites.get(n, frozenset()) for n in node.all_input_nodes]
        self.sites[node] = frozenset().union(*above)
        name = operator_name(node.target)
        site = ", ".join(repr(s) for s in sorted(self.sites[node]))
        draws = [n for n in node.all_input_nodes if n in self.graph.draws]
        if draws:
            site = repr(self.graph.draws[draws[0]])
            if len(draws[0].users) > 1:
                self.account.leave(
                    site, "one draw acts on several values; they are taken as masked independently"
                )
            if name not in MASKS:
                raise MomentsError(
                    f"the mask at {site} acts through {name!r}, which has no mean and variance in one pass. Sample "
                    "instead: committee.predict(x)."
                )
        elif not any(_varies(value) for value in tree_leaves((args, kwargs))):
            return node.target(*args, **kwargs)  # it hangs on the shape of what varies, and not on its value
        result = _by_rule(Call(node, args, kwargs, self.account, site), name)
        users = [user for user in node.users if user in self.graph.touched]
        if isinstance(result, Spread) and len(users) > 1:
            # Two branches start here: what varies is the same chance in both.
            result = spelled(result, self.account)
            result = result if result.own is None else replace(result, mixed=True)
        return result


def _varies(value: Any) -> bool:
    return not isinstance(value, Tensor | int | float | bool | str | torch.dtype | torch.device | None)


def _by_rule(call: Call, name: str) -> Any:
    try:
        return RULES.get(name, tangent)(call)
    except MomentsError:
        raise
    except (TypeError, AttributeError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MomentsError(
            f"the operator {name!r} below the masks at {call.site} is used in a way that its rule does not know "
            f"({first}). Sample instead: committee.predict(x)."
        ) from error


def attribute(module: torch.nn.Module, path: str) -> Any:
    """A weight, buffer or constant of a recorded module."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value


def output_of(graph: Graph) -> fx.Node:
    """The node of the model's one output.

    Raises:
        MomentsError: the model returns several things.
    """
    (last,) = graph.module.graph.find_nodes(op="output")
    result = last.args[0]
    if isinstance(result, list | tuple) and len(result) == 1:
        result = result[0]
    if not isinstance(result, fx.Node):
        raise MomentsError(
            "the model returns several things; moments need one tensor (rows, *out). Sample instead: "
            "committee.predict(x)."
        )
    return result


def _last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Which values are used for the last time at each node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    done: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        done.setdefault(node, []).append(source)
    return done
