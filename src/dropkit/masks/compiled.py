"""Dropout inside a compiled graph: reading the address is the effect, dropping is a pure function of it.

The compiler sees two operators. `dropkit::draw` asks the open context, or torch's generator, for an address each time
the graph runs; it is marked as random, so it is neither merged nor moved nor run again in backward.
`dropkit::dropout_at` takes the address as an input, so nothing can draw its mask anew. Step, seed and member are in
neither, so a new step compiles nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from dropkit.masks import address

HEAD = 5  # key, member, step, row_offset, batch_shared; row ids follow where the context has them

Recording = Literal["no", "operators", "kernels"]
_recording: ContextVar[Recording] = ContextVar("dropkit.recording", default="no")


@contextmanager
def recording(how: Recording) -> Iterator[None]:
    """Within it, a graph that is made of an evaluation pass is one for committee members: it holds the masks.

    Args:
        how: "operators": of torch's operators and masks alone, for who reads the graph; "kernels": attention with
            masks on its weights stays one operator, which has a kernel of its own.
    """
    token = _recording.set(how)
    try:
        yield
    finally:
        _recording.reset(token)


def members_recorded() -> bool:
    """Whether the graph that is being made is one for committee members."""
    # The compiler of torch.compile, which cannot look into a ContextVar, makes graphs for all contexts.
    return not torch.compiler.is_dynamo_compiling() and _recording.get() != "no"


def kernels_recorded() -> bool:
    """Whether it may hold operators that only dropkit knows."""
    return not torch.compiler.is_dynamo_compiling() and _recording.get() == "kernels"


def context_to_read() -> address.masks | None:
    """The open context where code may look at it: a graph for members is theirs alone, any other graph for all."""
    return address.current() if members_recorded() or not torch.compiler.is_compiling() else None


_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "draw(str? name, bool layer, int purpose=1) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
_library.define("dropout_at(Tensor x, Tensor address, Tensor p, int[] shared) -> Tensor")


def drawn(name: str | None, layer: bool, purpose: int = address.NOISE) -> address.Draw:
    """The address of the next draw of a site that a graph knows by its name alone; arguments as in `_draw`."""
    owner = sys.intern(name) if layer and name is not None else None
    return address.draw(owner, name, purpose)


def _draw(name: str | None, layer: bool, purpose: int = address.NOISE) -> Tensor:
    """The address of the next draw as numbers, (5,) or (5 + B,) int64.

    Args:
        name: of the site; None is known by its order in the pass.
        layer: True for a layer, which may be called several times in a pass under one name.
        purpose: which use of the site's bits.
    """
    where = drawn(name, layer, purpose)
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


def read_address(numbers: Tensor) -> address.Draw:
    """What `_draw` wrote down."""
    step, row_offset, batch_shared = numbers[2:HEAD].tolist()
    samples = numbers[HEAD:] if len(numbers) > HEAD else None
    return address.Draw(numbers[0], numbers[1], samples, step, row_offset, bool(batch_shared))


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
