"""The torch operator over the kernels: `dropkit::dropout`, deterministic, because its address is an input.

    y[k, b, e] = x[k, b, e] * scale[k]  where the mask at (key[k], member[k], sample[b], step) keeps e, else 0

Backward is the same operator on the gradient: nothing is saved but the address. Under torch.func.vmap a batched
key or member gives masks of their own, and everything that is not batched is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropkit.errors import AddressError, ShapeError
from dropkit.masks import cpu, threads
from dropkit.masks.address import SAMPLES, SEEDS, as_int64
from dropkit.masks.pages import FRESH_BYTES, prefer_large_pages
from dropkit.masks.philox import LANES, survivor_scale, threshold

Array = np.ndarray[Any, Any]
Dims = tuple[int, int, int, int]

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_COLLAPSED_DIMS = 4

# K, the leading axis of every batched argument, is either one and the same size or 1.
_library = torch.library.Library("dropkit", "DEF")
_library.define(
    "dropout(Tensor x, Tensor key, Tensor member, Tensor p, Tensor? samples, SymInt step, SymInt row_offset, "
    "int[] shared) -> Tensor"
)


def normalise_shared(shared: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Dims along which the mask is constant, as sorted non-negative numbers.

    Raises:
        ShapeError: a dim that x does not have.
    """
    if not shared:
        return ()
    for dim in shared:
        if not -ndim <= dim < ndim:
            raise ShapeError(
                f"shared={tuple(shared)} was given for an input with {ndim} dims; allowed: {-ndim} to {ndim - 1}."
            )
    return tuple(sorted({dim % ndim for dim in shared}))


@lru_cache(maxsize=4096)
def _quantised(p: float) -> tuple[int, int, float]:
    """Thresholds and scale of one rate, kept: a model asks for the same few again and again."""
    rate = torch.tensor(p, dtype=torch.float64)
    t, fine = threshold(rate)
    return int(t), int(fine), float(survivor_scale(rate))


@lru_cache(maxsize=256)
def _quantised_rates(rates: tuple[float, ...], groups: int, replicas: int) -> tuple[Array, Array, Array]:
    """t, fine (int64) and scale (float64), each (A, R), of the rates of all networks; read, never written."""
    if len(rates) == 1:
        rates *= groups * replicas
    t, fine, scale = (
        np.array(column).reshape(groups, replicas) for column in zip(*map(_quantised, rates), strict=True)
    )
    return t, fine, scale


def _check_rows(rows: int, row_offset: int) -> None:
    if row_offset + rows > SAMPLES:
        raise AddressError(
            f"{rows} rows from row_offset={row_offset} on were given; a row id lies in [0, 2**40)."
        )


def _row_ids(samples: Tensor | None, rows: int, row_offset: int, batch_shared: bool) -> Array:
    """(1 or A, B) uint64."""
    if batch_shared:
        return np.zeros((1, 1), np.uint64)
    if samples is None:
        _check_rows(rows, row_offset)
        return np.arange(row_offset, row_offset + rows, dtype=np.uint64).reshape(1, rows)
    ids = np.ascontiguousarray(samples.numpy()).view(np.uint64)
    if ids.shape[-1] != rows:
        raise ShapeError(
            f"{ids.shape[-1]} sample ids were given for {rows} rows; one id for each row is needed."
        )
    return ids.reshape(-1, rows)


def _per_group(values: Tensor, groups: int) -> Array:
    """(A,) uint64 of a key or member, one for each group of bits."""
    words = np.ascontiguousarray(values.numpy()).view(np.uint64).reshape(-1)
    return words if len(words) == groups else np.repeat(words, groups)


def _collapse(sizes: Sequence[int], shared: Sequence[bool]) -> tuple[Dims, Dims] | None:
    """Merge neighbouring dims of one kind; sizes and mask strides of at most four, or None where more alternate."""
    merged: list[tuple[int, bool]] = []
    for size, is_shared in zip(sizes, shared, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == is_shared:
            merged[-1] = (merged[-1][0] * size, is_shared)
        else:
            merged.append((size, is_shared))
    if len(merged) > _COLLAPSED_DIMS:
        return None
    strides, stride = [], 1
    for size, is_shared in reversed(merged):
        strides.append(0 if is_shared else stride)
        stride *= 1 if is_shared else size
    padding = _COLLAPSED_DIMS - len(merged)
    full = [(1, 0)] * padding + [
        (size, stride) for (size, _), stride in zip(merged, strides[::-1], strict=True)
    ]
    a, b, c, d = full
    return (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1])


def dropout_cpu(
    x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int, row_offset: int,
    shared: Sequence[int],
) -> Tensor:  # fmt: skip
    """`dropkit::dropout` on a CPU for one x, or for K of them at once on a leading axis.

    Args:
        x: (*shape), or (1 or K, *shape) when any other argument has its leading K.
        key, member, p: () or (1 or K,).
        samples: (B,) or (1 or K, B), or None for row_offset, row_offset + 1, ...
        step, row_offset: numbers.
        shared: dims of *shape along which the mask is constant; 0 among them means sample 0 for all.

    Returns:
        (*shape), or (K, *shape).
    """
    if key.ndim == 0:  # the vmap rule gives all of x, key, member and p a leading axis, or none
        return dropout_once(x, int(key), int(member), float(p), samples, step, row_offset, tuple(shared))
    shape = x.shape[1:]
    networks = max(x.shape[0], key.shape[0], member.shape[0], p.shape[0])
    if samples is not None and samples.ndim > 1:
        networks = max(networks, samples.shape[0])
    out = torch.empty_like(x) if x.shape[0] == networks else x.new_empty((networks, *shape))
    if out.numel() == 0:
        return out
    ids = _row_ids(samples, shape[0] if shape else 1, row_offset, 0 in shared)
    own_bits = key.shape[0] > 1 or member.shape[0] > 1 or len(ids) > 1
    groups, replicas = (networks, 1) if own_bits else (1, networks)
    t, fine, scale = _quantised_rates(tuple(p.tolist()), groups, replicas)
    address = (_per_group(key, groups), _per_group(member, groups), ids, step, t, fine)
    size = math.prod(shape)
    strides = (0, 0) if x.shape[0] == 1 else (size, 0) if own_bits else (0, size)
    _fill(x.detach(), strides, out, shape, address, scale, shared)
    return out


def dropout_once(
    x: Tensor, key: int, member: int, p: float, samples: Tensor | None, step: int, row_offset: int,
    shared: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Dropout of one x on a CPU, from plain numbers; what a call outside of all transforms comes down to.

    Args:
        x: (*shape).
        key: the site's 64 bits, signed or not.
        member, p, samples, step, row_offset, shared: as in `dropout_cpu`.
    """
    out = torch.empty_like(x)
    elements = x.numel()
    if elements == 0:
        return out
    if elements * x.element_size() >= FRESH_BYTES:
        prefer_large_pages(out.data_ptr(), elements * out.element_size())
    layout = _layout(x.shape, shared) if x.dtype in cpu.SHARED_DOORS and x.is_contiguous() else None
    if layout is None:
        ids = _row_ids(samples, x.shape[0] if x.ndim else 1, row_offset, 0 in shared)
        limits, fines, scales = _quantised_rates((p,), 1, 1)
        words = np.array((key % SEEDS, member), np.uint64)
        _fill(
            x.detach(), (0, 0), out, x.shape, (words[:1], words[1:], ids, step, limits, fines), scales, shared
        )
        return out
    rows, width, sizes, strides = layout
    where = 0
    if 0 in shared:
        row_offset = 0
    elif samples is None:
        _check_rows(rows, row_offset)
    else:
        if len(samples) != rows or not samples.is_contiguous():
            samples = torch.from_numpy(_row_ids(samples, rows, row_offset, False).view(np.int64))
        where = samples.data_ptr()
    t, fine, scale = _quantised(p)
    address = (rows, width, key if key < 1 << 63 else key - SEEDS, member, where, row_offset, step, t, fine)
    source, target = x.data_ptr(), out.data_ptr()
    if not shared:
        _knock(cpu.DOORS[x.dtype], (source, target, *address, scale), rows * -(-width // LANES), elements)
        return out
    keep = np.ones(rows * width, np.uint8)
    mask = keep.ctypes.data
    _knock(cpu.DOORS[torch.uint8], (mask, mask, *address, 1.0), rows * -(-width // LANES), len(keep))
    lines = (source, target, mask, rows, width, scale, sizes, strides)
    _knock(cpu.SHARED_DOORS[x.dtype], lines, rows * sizes[0], elements, grain=1)
    return out


def _knock(
    door: Callable[..., None], arguments: tuple[Any, ...], units: int, elements: int, grain: int = cpu.BATCH
) -> None:
    """Call a kernel over all units, on as many threads as the work is worth."""
    if elements < 2 * threads.PARALLEL_ELEMENTS:
        door(*arguments, 0, units)
    else:
        threads.in_parallel(lambda start, stop: door(*arguments, start, stop), units, elements, grain)


@lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], shared: tuple[int, ...]) -> tuple[int, int, Dims, Dims] | None:
    """Rows, elements of a row's mask, and its collapsed sizes and their strides in the mask; None as in `_collapse`."""
    first = 0 if 0 in shared or not shape else 1
    row_shared = [dim in shared for dim in range(first, len(shape))]
    width = math.prod(n for n, is_shared in zip(shape[first:], row_shared, strict=True) if not is_shared)
    collapsed = _collapse(shape[first:], row_shared)
    if collapsed is None:
        return None
    return (shape[0] if first else 1), width, collapsed[0], collapsed[1]


def _memory(x: Tensor) -> Array:
    """The elements of a contiguous tensor as they lie in memory; bfloat16, which numpy has not got, as its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().reshape(-1)


def _fill(
    x: Tensor, strides: tuple[int, int], out: Tensor, shape: Sequence[int], address: tuple[Any, ...], scale: Array,
    shared: Sequence[int],
) -> None:  # fmt: skip
    """Write dropout of x into out, (A R, *shape); `cpu.py` has the layout and the meaning of the address."""
    groups, replicas = scale.shape
    rows = address[2].shape[1]
    first = 0 if 0 in shared else 1  # where the mask is shared over the batch, dim 0 is part of the one "row"
    row_sizes = shape[first:]
    row_shared = [dim in shared for dim in range(first, len(shape))]
    width = math.prod(n for n, is_shared in zip(row_sizes, row_shared, strict=True) if not is_shared)
    fused = x.dtype in _KERNEL_DTYPES and x.is_contiguous() and out.is_contiguous()
    if fused and not any(row_shared):
        _elementwise(_memory(x), strides, _memory(out), address, scale, rows, width)
        return
    keep = torch.empty((groups * replicas, rows, width), dtype=torch.uint8, device="cpu")
    _keep(keep.numpy().reshape(-1), address, np.ones_like(scale), rows, width)
    collapsed = _collapse(row_sizes, row_shared)
    if fused and collapsed is not None:
        sizes, mask_strides = collapsed
        source, target, mask, factors = _memory(x), _memory(out), keep.numpy().reshape(-1), scale.reshape(-1)

        def run(start: int, stop: int) -> None:
            cpu.dropout_shared(
                source, *strides, target, mask, factors, replicas, rows, width, sizes, mask_strides, start, stop
            )  # fmt: skip

        threads.in_parallel(run, groups * replicas * rows * collapsed[0][0], out.numel())
        return
    # Other dtypes and memory formats: torch multiplies, in whatever order the memory lies; 16 bits in float32.
    wide = torch.promote_types(out.real.dtype if out.is_complex() else out.dtype, torch.float32)
    factor = torch.from_numpy(scale).to(wide).reshape(-1, *[1] * len(shape))
    many = out.view(groups * replicas, *shape) if out.dim() == len(shape) else out
    many.copy_(x * factor)
    lead = [rows] if first and shape else []
    mask_shape = [1 if is_shared else n for n, is_shared in zip(row_sizes, row_shared, strict=True)]
    many.masked_fill_(keep.view(-1, *lead, *mask_shape) == 0, 0)


def _keep(target: Array, address: tuple[Any, ...], ones: Array, rows: int, width: int) -> None:
    """Whether each element is kept, 1 or 0."""
    keys, members, ids, step, t, fine = address
    if len(keys) > 1 and ids.shape == (1, 1) and all((v == v.flat[0]).all() for v in (keys, ids, t, fine)):
        # Many members of one site, a mask for all rows each: they go through the kernel as the rows of one member. Its
        # counter holds sample + member * 2**40, so that a row with the id member * 2**40 of member 0 is that member.
        as_rows = (ids[0, 0] + (members << np.uint64(40))).reshape(1, -1)
        address = (keys[:1], np.zeros(1, np.uint64), as_rows, step, t[:1], fine[:1])
        rows, ones = len(members), ones[:1]
    _elementwise(np.ones(rows * width, np.uint8), (0, 0), target, address, ones, rows, width)


def _elementwise(
    source: Array, strides: tuple[int, int], target: Array, address: tuple[Any, ...], scale: Array, rows: int,
    width: int,
) -> None:  # fmt: skip
    """`cpu.dropout_rows` on as many threads as the work is worth."""
    keys, members, ids, step, t, fine = address

    def run(start: int, stop: int) -> None:
        cpu.dropout_rows(
            source, *strides, target, keys, members, ids, 0, step, t, fine, scale, rows, width, start, stop
        )

    threads.in_parallel(run, rows * -(-width // LANES), len(target), grain=cpu.BATCH)


_library.impl("dropout", dropout_cpu, "CPU")
_operator = torch.ops.dropkit.dropout.default


def _dropout_fake(
    x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int, row_offset: int,
    shared: Sequence[int],
) -> Tensor:  # fmt: skip
    if key.ndim == 0:
        return torch.empty_like(x)
    networks = max(
        len(x), len(key), len(member), len(p), len(samples) if samples is not None and samples.ndim > 1 else 1
    )
    return torch.empty_like(x) if len(x) == networks else x.new_empty((networks, *x.shape[1:]))


torch.library.register_fake("dropkit::dropout", _dropout_fake, lib=_library)


class _Plain(torch.autograd.Function):
    """Reverse mode alone, for calls outside of all transforms: a fraction of the overhead of `_Transformable`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, address: tuple[Any, ...]) -> Tensor:
        ctx.address = address  # neither x nor the mask; no tensor in it is ever written
        return dropout_once(x, *address)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return dropout(gradients[0], *ctx.address), None


# Function.apply less what it does for torch.func, which is not at work where this is used.
_apply_plain = super(torch.autograd.Function, _Plain).apply


class _Transformable(torch.autograd.Function):
    """Derivatives and vmap for torch.func. Dropout is linear in x: every derivative is dropout again."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, key, member, p, samples, *ctx.rest = inputs
        ctx.save_for_backward(key, member, p, samples)  # the address; neither x nor the mask
        ctx.save_for_forward(key, member, p, samples)
        ctx.expanded = x.shape != output.shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        result = dropout(gradients[0], *ctx.saved_tensors, *ctx.rest)
        if ctx.expanded:  # one x went through K masks
            result = result.sum(dim=0, keepdim=True)
        return result, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return dropout(tangent, *ctx.saved_tensors, *ctx.rest)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap(info, in_dims, *args)


def dropout(
    x: Tensor, key: Tensor | int, member: Tensor | int, p: Tensor | float, samples: Tensor | None, step: int,
    row_offset: int, shared: Sequence[int],
) -> Tensor:  # fmt: skip
    """`dropkit::dropout` with derivatives of every order, forward mode and vmap.

    Args:
        x, samples, step, row_offset, shared: as in `dropout_cpu`.
        key, member, p: as there, or plain numbers.
    """
    if _is_plain(x, key, member, p):
        address = (int(key), int(member), float(p), samples, step, row_offset, tuple(shared))
        if x.requires_grad and torch.is_grad_enabled():
            return _apply_plain(x, address)
        return dropout_once(x, *address)
    key, member = as_int64(key), as_int64(member)
    if not isinstance(p, Tensor):
        p = torch.tensor(p, dtype=torch.float64, device="cpu")
    return _Transformable.apply(x, key, member, p.to(torch.float64), samples, step, row_offset, shared)


def _is_plain(x: Tensor, *address: Tensor | float) -> bool:
    """Whether nothing of torch stands between the call and the memory: no transform, fake tensor or other device."""
    for value in address:
        if isinstance(value, Tensor) and value.ndim:
            return False
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and x.is_cpu
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """Put the vmapped axis first; an argument that is not batched stays one, and is used K times."""
    x, key, member, p, samples, step, row_offset, shared = args
    if key.ndim > (in_dims[1] is not None):  # the call has a leading axis already, from an inner vmap
        return _nested_vmap(info, in_dims, *args)

    def lead(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor[None] if dim is None else tensor.movedim(dim, 0)

    ids = samples if samples is None or in_dims[4] is None else samples.movedim(in_dims[4], 0)
    x, key, member, p = (lead(t, dim) for t, dim in zip((x, key, member, p), in_dims[:4], strict=True))
    out = dropout(x, key, member, p, ids, step, row_offset, shared)
    if len(out) != info.batch_size:  # only one of K was there: samples of size one, or a vmap of size one
        out = out.expand(info.batch_size, *out.shape[1:])
    return out, 0


def _nested_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """A second vmapped axis: both axes become one, (outer, inner) in row-major order."""
    x, key, member, p, samples, step, row_offset, shared = args
    outer = info.batch_size
    tensors, dims = [x, key, member, p], in_dims[:4]
    plain = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    inner = max(t.shape[0 if d is None else 1] for t, d in zip(plain, dims, strict=True))

    def merge(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            tensor = tensor[None]
        return tensor.expand(outer, inner, *tensor.shape[2:]).flatten(0, 1)

    x, key, member, p = (merge(t, d) for t, d in zip(plain, dims, strict=True))
    ids = samples
    if samples is not None and (in_dims[4] is not None or samples.ndim > 1):
        ids = samples if in_dims[4] is None else samples.movedim(in_dims[4], 0)
        if in_dims[4] is None:
            ids = ids[None]
        elif ids.ndim == 2:
            ids = ids[:, None]
        ids = ids.expand(outer, inner, ids.shape[-1]).flatten(0, 1)
    out = dropout(x, key, member, p, ids, step, row_offset, shared)
    return out.unflatten(0, (outer, inner)), 0
