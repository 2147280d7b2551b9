"""A committee's members as one plain module, each without the units that it drops; see `thinning` and `frozen.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dropkit.committee.frozen import lean
from dropkit.committee.graph import Graph, halve
from dropkit.committee.thinning import thin


class ThinnedMembers(nn.Module):
    """x -> what each member puts out, (M, B, *out), one member after the other on weights of its own.

    Less is computed and more is stored: each member's weights, q_in x q_out of the whole, where shares q of the units
    stay. What no member changes is stored once.

    Args:
        graph: as recorded.
        seed, members: which committee.

    Attributes:
        left: (name, why) of sites whose masks are not cut out of weights. Where they are still drawn, `export.py`
            refuses the graph.
    """

    def __init__(self, graph: Graph, seed: int, members: int) -> None:
        super().__init__()
        self.prefix = lean(halve(graph).prefix)
        thinning = thin(graph, delta=False)
        self.left = thinning.left
        self.suffix = lean(thinning.suffix)
        self.members = members
        whole = thinning.whole()
        stored: dict[tuple[Any, ...], str] = {}
        # For each member: names of buffers, and values that are no tensors.
        self._rest: list[list[Any]] = []
        with torch.no_grad():
            for member in range(members):
                self._rest.append(
                    [self._keep(value, stored) for value in thinning.arguments(seed, member, whole)]
                )

    def forward(self, *inputs: Tensor) -> Tensor:
        """(B, ...) -> (M, B, *out)."""
        front = self.prefix(*inputs)
        return torch.stack([self.suffix(*front, *map(self._value, rest))[0] for rest in self._rest])

    def _keep(self, value: Any, stored: dict[tuple[Any, ...], str]) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (
            (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if value.numel()
            else (id(value),)
        )
        if key not in stored:
            stored[key] = f"part_{len(stored)}"
            self.register_buffer(
                stored[key], value.detach()
            )  # held from here on, so its memory is not used again
        return _Name(stored[key])

    def _value(self, kept: Any) -> Any:
        return getattr(self, kept) if isinstance(kept, _Name) else kept


class _Name(str):
    """The name of a buffer."""
