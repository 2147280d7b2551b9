"""Where dropout lives in most models: a branch's bias, dropout, residual sum, and the norm behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.errors import ShapeError, check_probability
from dropkit.masks import address, ops, residual_cpu
from dropkit.masks.cpu import EVERYTHING
from dropkit.masks.threads import in_parallel
from dropkit.nn.features import dropout

_NONE, _LAYER, _RMS = 0, 1, 2
_FUSED = (torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def _check_shapes(x: Tensor, residual: Tensor, vectors: dict[str, Tensor | None]) -> None:
    if x.ndim < 2 or x.shape != residual.shape:
        raise ShapeError(
            f"x of shape {tuple(x.shape)} and a residual of shape {tuple(residual.shape)} were given; both need the "
            "same shape, (B, *, D), of two dims or more."
        )
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ShapeError(
                f"{name} of shape {tuple(vector.shape)} was given; it has one number for each of the last dim's "
                f"elements, ({x.shape[-1]},)."
            )


def _fusible(x: Tensor, p: float | Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the kernels can do this call; what they cannot do, separate operations do with the same mask."""
    return (
        not torch.compiler.is_compiling()
        and not isinstance(p, Tensor)
        and x.numel() > 0
        and x.dtype in _FUSED
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and all(type(t) in _PLAIN and t.dtype == x.dtype and t.device.type == "cpu" for t in (x, *others))
        and ops._quantised(p)[0] < EVERYTHING
        and ops._quantised(p)[1] == 0  # rates below 2**-16 need a second block
    )


def _array(tensor: Tensor | None, like: Tensor, *shape: int) -> Any:
    """A kernel's view of a tensor; None is an empty one."""
    if tensor is None:
        return like.new_empty(0 if len(shape) < 2 else (0, shape[1])).numpy()
    return tensor.detach().contiguous().reshape(shape).numpy()


class _Tail(torch.autograd.Function):
    """The fused kernels and their derivative.

    Kept for backward: with a norm, the sum (n elements) and mean and inverse deviation of each row; without, nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, bias: Tensor | None, weight: Tensor | None, norm_bias: Tensor | None,
        where: tuple[Any, ...], norm: int, eps: float,
    ) -> tuple[Tensor, Tensor] | Tensor:  # fmt: skip
        width = x.shape[-1]
        rows = x.numel() // width
        total = torch.empty(x.shape, dtype=x.dtype)
        out = torch.empty(x.shape if norm else (0, width), dtype=x.dtype)
        means, inverses = (torch.empty(rows if norm else 0, dtype=x.dtype) for _ in range(2))
        kernel: Any = residual_cpu.add_rows
        arguments = (
            _array(x, x, rows, width), _array(bias, x, width), _array(residual, x, rows, width),
            _array(total, x, rows, width), *where, norm, _array(weight, x, width), _array(norm_bias, x, width), eps,
            _array(out, x, rows if norm else 0, width), means.numpy(), inverses.numpy(),
        )  # fmt: skip

        def run(start: int, stop: int) -> None:
            kernel(*arguments, start, stop)

        in_parallel(run, rows, x.numel(), grain=residual_cpu.tile_rows(width))
        ctx.where, ctx.norm, ctx.eps = where, norm, eps
        ctx.set_materialize_grads(False)
        if not norm:
            return total
        ctx.save_for_backward(total, means, inverses, weight)
        return out, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.norm or gradients[0] is None:
            return _sum_backward(ctx, gradients[-1])
        # A gradient of this gradient is wanted: the same formula in operations that have derivatives themselves.
        through = _composite_backward if torch.is_grad_enabled() else _fused_backward
        return through(ctx, gradients[0], gradients[1])


def _dropped(ctx: Any, gradient: Tensor) -> Tensor:
    """Dropout of a gradient, at the address and rate of the forward pass."""
    _, key, member, samples, step, t, _ = ctx.where
    if t == 0:
        return gradient
    site, network = torch.from_numpy(np.array([key, member], np.uint64).view(np.int64))
    rate = torch.tensor(t / EVERYTHING, dtype=torch.float64)
    ids = torch.from_numpy(samples.view(np.int64))
    return ops.dropout(gradient, site, network, rate, ids, step, 0, [])


def _sum_backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of residual + dropout(x + bias), to which nothing else was done."""
    if gradient is None:
        return (None,) * 8
    d_x = _dropped(ctx, gradient) if ctx.needs_input_grad[0] or ctx.needs_input_grad[2] else None
    d_bias = d_x.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] and d_x is not None else None
    return d_x, gradient, d_bias, None, None, None, None, None


def _fused_backward(ctx: Any, gradient: Tensor, extra: Tensor | None) -> tuple[Tensor | None, ...]:
    total, means, inverses, weight = ctx.saved_tensors
    width = total.shape[-1]
    rows = total.numel() // width
    chunks = -(-rows // residual_cpu.CHUNK)
    d_x, d_residual = torch.empty_like(total), torch.empty_like(total)
    d_weight, d_norm_bias, d_bias = (
        torch.zeros(chunks, width if needed else 0, dtype=total.dtype)
        for needed in (ctx.needs_input_grad[3], ctx.needs_input_grad[4], ctx.needs_input_grad[2])
    )
    kernel: Any = residual_cpu.norm_backward_rows
    arguments = (
        _array(gradient, total, rows, width), _array(extra, total, rows, width), _array(total, total, rows, width),
        means.numpy(), inverses.numpy(), *ctx.where, ctx.norm, _array(weight, total, width),
        _array(d_x, total, rows, width), _array(d_residual, total, rows, width),
        d_weight.numpy(), d_norm_bias.numpy(), d_bias.numpy(),
    )  # fmt: skip

    def run(start: int, stop: int) -> None:
        kernel(*arguments, start, stop)

    in_parallel(run, chunks, total.numel())
    sums = [part.sum(0) if part.shape[1] else None for part in (d_bias, d_weight, d_norm_bias)]
    return d_x, d_residual, *sums, None, None, None


def _composite_backward(ctx: Any, gradient: Tensor, extra: Tensor | None) -> tuple[Tensor | None, ...]:
    total, _, _, weight = ctx.saved_tensors
    centred = total - total.mean(-1, keepdim=True) if ctx.norm == _LAYER else total
    inverse = (centred.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
    normalised = centred * inverse
    weighted = gradient if weight is None else gradient * weight
    rest = weighted - normalised * (weighted * normalised).mean(-1, keepdim=True)
    if ctx.norm == _LAYER:
        rest = rest - weighted.mean(-1, keepdim=True)
    d_total = rest * inverse if extra is None else rest * inverse + extra
    d_x = _dropped(ctx, d_total)
    return (
        d_x,
        d_total,
        d_x.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None,
        (gradient * normalised).flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None,
        gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None,
        None, None, None,
    )  # fmt: skip


def _tail(
    x: Tensor, residual: Tensor, p: float | Tensor, bias: Tensor | None, training: bool, site: str | None,
    owner: object | None, norm: int, weight: Tensor | None, norm_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norm's output (without a norm, the sum) and the sum."""
    rate = p if isinstance(p, Tensor) else check_probability(p)
    _check_shapes(x, residual, {"bias": bias, "weight": weight, "norm_bias": norm_bias})
    if not _fusible(x, rate, [t for t in (residual, bias, weight, norm_bias) if t is not None]):
        total = residual + dropout(x if bias is None else x + bias, rate, training, site=site, owner=owner)
        if norm == _LAYER:
            return F.layer_norm(total, total.shape[-1:], weight, norm_bias, eps), total
        return (F.rms_norm(total, total.shape[-1:], weight, eps) if norm == _RMS else total), total
    key, member, ids, step, t, scale = 0, 0, np.zeros(len(x), np.uint64), 0, 0, 1.0
    if training:
        draw = address.draw(owner, site)
        key, member, step = int(draw.key) % 2**64, int(draw.member), draw.step
        ids = (
            ids
            if draw.batch_shared
            else ops._row_ids(draw.samples, len(x), draw.row_offset, False).reshape(-1)
        )
        t, _, scale = ops._quantised(float(rate))
    per_sample = x.numel() // x.shape[-1] // len(x)
    where = (per_sample, np.uint64(key), np.uint64(member), ids, step, t, scale)
    result = _Tail.apply(x, residual, bias, weight, norm_bias, where, norm, eps)
    return result if norm else (result, result)


def dropout_add(
    x: Tensor,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Bias, dropout and the residual sum in one pass over memory.

    y = residual + D(x + bias),    D being `dropout` at the same address, bit for bit

    Nothing is kept for backward. float32 and float64 on a CPU are fused; other dtypes and devices, transforms of
    torch.func, forward mode and torch.compile take separate operations, with the same mask.

    Args:
        x: (B, *, D), the branch; dim 0 counts the rows of the mask.
        residual: (B, *, D), what passes by.
        p: chance to drop, in [0, 1].
        training: False: nothing is dropped.
        bias: (D,), of the linear layer before it, or None.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *, D).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x and residual differ in shape, or have one dim; a bias that is not (D,).
        AddressError: the same address was drawn twice in one `masks` context.
    """
    return _tail(x, residual, p, bias, training, site, owner, _NONE, None, None, 0.0)[1]


@overload
def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = ..., norm_bias: Tensor | None = ...,
    p: float | Tensor = ..., training: bool = ..., *, bias: Tensor | None = ..., eps: float = ...,
    prenorm: Literal[False] = ..., site: str | None = ..., owner: object | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = ..., norm_bias: Tensor | None = ...,
    p: float | Tensor = ..., training: bool = ..., *, bias: Tensor | None = ..., eps: float = ...,
    prenorm: Literal[True], site: str | None = ..., owner: object | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bias, dropout, the residual sum and LayerNorm over the last dim, in one pass over memory each way.

    s = residual + D(x + bias),    y = (s - mean s) / sqrt(var s + eps) * weight + norm_bias

    D is `dropout` at the same address, bit for bit; the norm agrees with torch.nn.functional.layer_norm to rounding.
    Kept for backward: s, and two numbers for each row. What is fused, and what is not, as in `dropout_add`.

    Args:
        x, residual, p, training, bias, site, owner: as in `dropout_add`.
        weight, norm_bias: (D,) each, of the norm, or None.
        eps: added to the variance, which is divided by D.
        prenorm: give s too, for the next residual sum of a network that normalises before its branches.

    Returns:
        (B, *, D); with prenorm the pair (y, s).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x and residual differ in shape, or have one dim; a vector that is not (D,).
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    y, total = _tail(x, residual, p, bias, training, site, owner, _LAYER, weight, norm_bias, eps)
    return (y, total) if prenorm else y


@overload
def dropout_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = ..., p: float | Tensor = ..., training: bool = ...,
    *, bias: Tensor | None = ..., eps: float | None = ..., prenorm: Literal[False] = ...,
    site: str | None = ..., owner: object | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def dropout_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = ..., p: float | Tensor = ..., training: bool = ...,
    *, bias: Tensor | None = ..., eps: float | None = ..., prenorm: Literal[True],
    site: str | None = ..., owner: object | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    bias: Tensor | None = None,
    eps: float | None = None,
    prenorm: bool = False,
    site: str | None = None,
    owner: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bias, dropout, the residual sum and RMSNorm over the last dim, in one pass over memory each way.

    s = residual + D(x + bias),    y = s / sqrt(mean s**2 + eps) * weight

    Args:
        x, residual, p, training, bias, site, owner: as in `dropout_add`.
        weight: (D,), of the norm, or None.
        eps: added to the mean square; None is the smallest step of the dtype at 1, as in torch.
        prenorm: give s too.

    Returns:
        (B, *, D); with prenorm the pair (y, s).

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: x and residual differ in shape, or have one dim; a vector that is not (D,).
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y, total = _tail(x, residual, p, bias, training, site, owner, _RMS, weight, None, eps)
    return (y, total) if prenorm else y
