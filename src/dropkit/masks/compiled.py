"""Dropout inside a compiled graph: reading the address is the effect, dropping is a pure function of it.

The compiler sees two operators. `dropkit::draw` asks the open context, or torch's generator, for an address each time
the graph runs; it is marked as random, so it is neither merged nor moved nor run again in backward.
`dropkit::dropout_at` takes the address as an input, so nothing can draw its mask anew. Step, seed and member are in
neither, so a new step compiles nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropkit.masks import address

HEAD = 5  # key, member, step, row_offset, batch_shared; row ids follow where the context has them

_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "draw(str? name, bool layer, int purpose=1) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
_library.define("dropout_at(Tensor x, Tensor address, Tensor p, int[] shared) -> Tensor")


def _draw(name: str | None, layer: bool, purpose: int = address.NOISE) -> Tensor:
    """The address of the next draw as numbers, (5,) or (5 + B,) int64.

    Args:
        name: of the site; None is known by its order in the pass.
        layer: True for a layer, which may be called several times in a pass under one name.
        purpose: which use of the site's bits.
    """
    owner = sys.intern(name) if layer and name is not None else None
    where = address.draw(owner, name, purpose)
    numbers = (where.step, where.row_offset, int(where.batch_shared))
    head = torch.stack((*where.tensors(), *map(address.as_int64, numbers)))
    return head if where.samples is None else torch.cat((head, where.samples))


def _draw_fake(name: str | None, layer: bool, purpose: int = address.NOISE) -> Tensor:
    # Where gradients are needed, torch merges equal nodes of a graph, and spares random ones by a list, not by the tag:
    # two draws of a layer, or of two without a name, would be one. Here a graph is being made, so the list is loaded.
    spared = getattr(sys.modules.get("torch._functorch.compile_utils"), "rand_ops", [])
    if torch.ops.dropkit.draw not in spared:
        spared.append(torch.ops.dropkit.draw)
    return torch.empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _dropout_at(x: Tensor, address: Tensor, p: Tensor, shared: Sequence[int]) -> Tensor:
    step, row_offset, batch_shared = address[2:HEAD].tolist()
    samples = address[HEAD:] if len(address) > HEAD else None
    dims = (0, *shared) if batch_shared and x.ndim and 0 not in shared else shared
    # By way of the operator, which has a kernel for the device of x.
    return torch.ops.dropkit.dropout(x, address[0], address[1], p, samples, step, row_offset, dims)


def _dropout_at_fake(x: Tensor, address: Tensor, p: Tensor, shared: Sequence[int]) -> Tensor:
    return torch.empty_like(x)


def _save_address(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, where, p, ctx.shared = inputs
    ctx.save_for_backward(where, p)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    where, p = ctx.saved_tensors
    return torch.ops.dropkit.dropout_at(gradient, where, p, ctx.shared), None, None, None


_library.impl("draw", _draw, "CompositeExplicitAutograd")
_library.impl("dropout_at", _dropout_at, "CompositeExplicitAutograd")
torch.library.register_fake("dropkit::draw", _draw_fake, lib=_library)
torch.library.register_fake("dropkit::dropout_at", _dropout_at_fake, lib=_library)
torch.library.register_autograd("dropkit::dropout_at", _backward, setup_context=_save_address, lib=_library)


def dropout(x: Tensor, p: Tensor, shared: Sequence[int], name: str | None, layer: bool) -> Tensor:
    """Dropout as the compiler sees it; arguments as in `dropkit.functional.dropout`."""
    where = torch.ops.dropkit.draw(name, layer)
    return torch.ops.dropkit.dropout_at(x, where, p, shared)
