"""Maps in which every row has a weight mask of its own, without masked weights for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropkit.errors import ShapeError
from dropkit.masks import ops
from dropkit.masks.address import SEEDS, Draw
from dropkit.masks.cpu import EVERYTHING
from dropkit.masks.philox import LANES, REFINE
from dropkit.masks.threads import in_parallel
from dropkit.nn import weights_cpu
from dropkit.nn.convolution import Convolution, as_autocast, map_of

CHUNK = 1 << 21  # masked weights that are there at a time where no kernel serves: 8 MiB in float32


def is_served(x: Tensor, weight: Tensor, p: float | Tensor) -> bool:
    """Whether nothing of torch stands between the call and the memory: no transform, no compiler, one rate."""
    return (
        not torch.compiler.is_compiling()
        and not x.is_meta
        and not (isinstance(p, Tensor) and p.ndim > 0)
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, weight))
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def row_masked(x: Tensor, weight: Tensor, where: Draw, p: float, convolution: Convolution | None) -> Tensor:
    """The map of x by the weight, masked anew for each row at this address, without a bias.

    Args:
        x: (B, *, I) or (B, I, *space).
        weight: (O, I) or (O, I / groups, *kernel).
        where: the address; its mask is not shared over rows.
        p: chance to drop.
        convolution: what kind of map.

    Returns:
        (B, *, O) or (B, O, *space).

    Raises:
        ShapeError: samples are not one for each row, or a row's mask has more than 2**34 elements.
    """
    if weight.numel() > LANES * REFINE:
        raise ShapeError(f"{weight.numel()} weights were given; at most 2**34 have a mask.")
    if where.samples is not None and len(where.samples) != len(x):
        raise ShapeError(
            f"{len(where.samples)} sample ids were given for {len(x)} rows; one id for each row is needed."
        )
    x, weight = as_autocast(x, weight)
    if x.numel() == 0 or p == 0:
        return map_of(convolution)(x, weight, None)
    with torch.autocast(x.device.type, enabled=False):
        return _RowMasked.apply(x, weight, where, p, convolution)


class _RowMasked(torch.autograd.Function):
    """Kept for backward: x and the weight, which exist anyway, and the address."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, where: Draw, p: float, convolution: Convolution | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = where, p, convolution
        if _has_kernel(x, weight, p, convolution):
            return _kernel_forward(x, weight, where, p)
        return torch.cat(
            [_masked_map(x[rows], weight, where, p, convolution, rows.start) for rows in _chunks(x, weight)]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        where, p, convolution = ctx.rest
        if (
            torch.is_grad_enabled()
        ):  # create_graph: by operations that have derivatives themselves, all rows at once
            inputs = [t for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed]
            again = _masked_map(x, weight, where, p, convolution, 0)
            found = iter(torch.autograd.grad(again, inputs, gradients[0], create_graph=True))
            pair = [next(found) if needed else None for needed in ctx.needs_input_grad[:2]]
        elif _has_kernel(x, weight, p, convolution):
            pair = _kernel_backward(x, weight, where, p, gradients[0], ctx.needs_input_grad)
        else:
            pair = _chunked_backward(x, weight, where, p, convolution, gradients[0], ctx.needs_input_grad)
        return *pair, None, None, None


# --- by the kernels of weights_cpu.py -----------------------------------------------------------------


def _has_kernel(x: Tensor, weight: Tensor, p: float, convolution: Convolution | None) -> bool:
    return (
        convolution is None
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() > 0
        and weight.numel() > 0
        and ops._quantised(p)[0] < EVERYTHING
    )


def _working(x: Tensor) -> Tensor:
    """The 16-bit types are summed in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.detach().to(wide).reshape(-1, x.shape[-1]).contiguous()


def _kernel_address(x: Tensor, where: Draw, p: float) -> tuple[tuple[Any, ...], float]:
    """What the kernels take, and the scale of the survivors."""
    ids = ops._row_ids(where.samples, len(x), where.row_offset, False).reshape(-1)
    ids = np.repeat(ids, x.numel() // x.shape[-1] // len(x))  # rows of a sequence share their sample's mask
    t, fine, scale = ops._quantised(p)
    return (ids, np.uint64(int(where.key) % SEEDS), np.uint64(int(where.member)), where.step, t, fine), scale


def _kernel_forward(x: Tensor, weight: Tensor, where: Draw, p: float) -> Tensor:
    address, scale = _kernel_address(x, where, p)
    rows, w = _working(x), _working(weight)
    out = rows.new_zeros(len(rows), len(w))
    arrays = rows.numpy(), w.numpy(), out.numpy()
    kernel: Any = weights_cpu.forward_rows

    def run(start: int, stop: int) -> None:
        kernel(*arrays, *address, start, stop)

    in_parallel(run, len(w), len(rows) * w.numel())
    return out.mul_(scale).reshape(*x.shape[:-1], len(w)).to(x.dtype)


def _kernel_backward(
    x: Tensor, weight: Tensor, where: Draw, p: float, gradient: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    address, scale = _kernel_address(x, where, p)
    rows, w = _working(x), _working(weight)
    g = (_working(gradient) * scale).T.contiguous()
    groups, columns = weights_cpu.group_count(len(w)), w.shape[1]
    dx = rows.new_zeros(groups if needed[0] else 0, *rows.shape)
    dw = w.new_zeros(len(w) if needed[1] else 0, columns)
    arrays = rows.numpy(), w.numpy(), g.numpy(), dx.numpy(), dw.numpy()
    kernel: Any = weights_cpu.backward_rows

    def run(start: int, stop: int) -> None:
        kernel(*arrays, *address, start, stop)

    in_parallel(run, -(-columns // weights_cpu.tile_width(columns)) * groups, len(rows) * w.numel())
    return [
        dx.sum(dim=0).reshape(x.shape).to(x.dtype) if needed[0] else None,
        dw.to(weight.dtype) if needed[1] else None,
    ]


# --- by torch's operations, a few rows at a time --------------------------------------------------------


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows whose masked weights are made together."""
    size = max(1, CHUNK // max(weight.numel(), 1))
    for start in range(0, len(x), size):
        yield slice(start, min(start + size, len(x)))


def _masked_map(
    part: Tensor, weight: Tensor, where: Draw, p: float, convolution: Convolution | None, start: int
) -> Tensor:
    """The map of the rows from `start` on: their masked weights are made, used and forgotten."""
    ids = None if where.samples is None else where.samples[start : start + len(part)]
    copies = weight.expand(len(part), *weight.shape).contiguous()
    masked = ops.dropout(copies, where.key, where.member, p, ids, where.step, where.row_offset + start, ())
    return map_of(convolution, by_row=True)(part, masked, None)


def _chunked_backward(
    x: Tensor, weight: Tensor, where: Draw, p: float, convolution: Convolution | None, gradient: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x and the weight, from the masked weights of a few rows at a time, made again."""
    dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
    for rows in _chunks(x, weight):
        part, w = x[rows].detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            y = _masked_map(part, w, where, p, convolution, rows.start)
        dx[rows], found = torch.autograd.grad(y, (part, w), gradient[rows])
        dw += found
    return [dx if needed[0] else None, dw if needed[1] else None]
