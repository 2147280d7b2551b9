"""Which masks multiply a weight's gradient: those on what its layer reads, and those on what it puts out."""

from __future__ import annotations

from torch import fx

from dropkit.measure.noise import NoisyNetwork, perturb

# What stands between a layer and its mask without mixing units.
_PASSING = {
    *("relu", "gelu", "tanh", "sigmoid", "silu", "elu", "leaky_relu", "hardtanh", "softplus", "mish", "selu"),
    *("view", "reshape", "flatten", "unsqueeze", "squeeze", "permute", "transpose", "contiguous", "clone"),
    *("_to_copy", "to"),
}
_PRODUCTS = {"linear", "conv1d", "conv2d", "conv3d", "addmm", "mm", "matmul"}


def masks_on_gradients(noise: NoisyNetwork) -> dict[str, tuple[int, ...]]:
    """For each weight of a linear or convolutional layer: the sites whose masks multiply its gradient, unit by unit.

    A weight reads one masked unit and feeds another; a bias only feeds one. Sites further away reach the gradient too,
    but not as one factor.

    Returns:
        By name, places in `noise.sites`.
    """
    graph = noise.module.graph
    places = {node: i for i, node in enumerate(_in_order(graph))}
    found: dict[str, tuple[int, ...]] = {}
    for node in graph.find_nodes(op="get_attr"):
        sites: list[int] = []
        for user in node.users:
            if _name(user) not in _PRODUCTS:
                continue
            sites += [places[n] for n in _after(user) if n in places]
            if len(user.args) > 1 and user.args[1] is node:
                sites += [places[n] for n in _before(user.args[0]) if n in places]
        found[str(node.target)] = tuple(sites)
    return found


def _in_order(graph: fx.Graph) -> list[fx.Node]:
    """The multiplications by noise, in the order of the noise arguments."""
    noisy = [node for node in graph.nodes if node.target is perturb]
    return sorted(noisy, key=lambda node: int(str(node.args[1].name).rpartition("_")[2]))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _after(node: fx.Node) -> list[fx.Node]:
    found = []
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is perturb:
            found.append(node)
        elif _name(node) not in _PASSING:
            break
    return found


def _before(node: fx.Node) -> list[fx.Node]:
    found = []
    while node.op == "call_function":
        if node.target is perturb:
            found.append(node)
        elif _name(node) not in _PASSING:
            break
        node = node.args[0]  # type: ignore[assignment]
    return found
