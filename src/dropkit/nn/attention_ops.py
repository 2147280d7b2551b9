"""Attention with masks on its weights as one operator, for graphs that are recorded to be run.

The kernels of `attention.py` keep no scores; taken apart into torch's operators, a graph would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropkit.masks import compiled
from dropkit.nn.attention import attend_at

_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "attention_at(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor address, Tensor p, bool causal, "
    "float scale) -> Tensor"
)
_library.define(
    "attention_at_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor address, "
    "Tensor p, bool causal, float scale) -> (Tensor, Tensor, Tensor)"
)


def _attention_at(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, address: Tensor, p: Tensor, causal: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    return attend_at(query, key, value, mask, compiled.read_address(address), p, causal, scale)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, mask, where, p, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, where, p)


def _attention_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.dropkit.attention_at_backward(gradient, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *found, *[None] * 5


def _attention_at_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = tuple(x.detach().requires_grad_() for x in arguments[:3])
    with torch.enable_grad():
        out = _attention_at(*inputs, *arguments[3:])
    return tuple(x.contiguous() for x in torch.autograd.grad(out, inputs, gradient))


def _attention_backward_fake(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[:3])


_library.impl("attention_at", _attention_at, "CompositeExplicitAutograd")
torch.library.register_fake("dropkit::attention_at", _attention_fake, lib=_library)
_library.impl("attention_at_backward", _attention_at_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dropkit::attention_at_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd(
    "dropkit::attention_at", _attention_backward, setup_context=_save_inputs, lib=_library
)

ATTENTION_AT = torch.ops.dropkit.attention_at.default
