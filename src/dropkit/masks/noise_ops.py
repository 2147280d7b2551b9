"""The torch operator over the laws of `noise.py`: `dropkit::noise`, deterministic, because its address is an input.

    y[b, e] = x[b, e] * (1 + spread(p) * noise[b, e])           uniform, Gaussian
    y[b, e] = x[b, e] * n / (n - k)  where the exact mask keeps e, else 0;  k = round(p n)

All are linear in x, so every derivative is the same operator again, and nothing is saved but the address. Under
torch.func.vmap the networks are computed one after another: the same numbers as a loop, and no faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropkit.errors import ProbabilityError
from dropkit.masks import address, noise_cpu
from dropkit.masks.compiled import HEAD
from dropkit.masks.cpu import BATCH
from dropkit.masks.noise import WORDS
from dropkit.masks.ops import _row_ids
from dropkit.masks.threads import in_parallel

Array = np.ndarray[Any, Any]

PURPOSES = {"uniform": address.UNIFORM, "gaussian": address.GAUSSIAN, "exact": address.EXACT}
_FUSED = (torch.float32, torch.float64)

_library = torch.library.Library("dropkit", "FRAGMENT")
_library.define(
    "noise(Tensor x, Tensor key, Tensor member, Tensor p, Tensor? samples, SymInt step, SymInt row_offset, "
    "int[] shared, str law) -> Tensor"
)
_library.define("noise_at(Tensor x, Tensor address, Tensor p, int[] shared, str law) -> Tensor")


def spread(p: float, law: str) -> float:
    """What a law's noise is multiplied with, so that the factor on x has mean 1 and variance p / (1 - p).

    sqrt(p / (1 - p)) for Gaussian noise, sqrt(3 p / (1 - p)) for uniform noise v in (-1, 1), rounded in that order.

    Raises:
        ProbabilityError: p is outside [0, 1); at 1 the variance is infinite.
    """
    if not 0.0 <= p < 1.0:
        raise ProbabilityError(
            f"p={p!r} was given; {law} noise has variance p / (1 - p), so p lies in [0, 1), without the 1."
        )
    return math.sqrt(p / (1 - p)) if law == "gaussian" else math.sqrt(3 * p / (1 - p))


def exact_count(p: float, n: int) -> int:
    """How many of n elements an exact mask drops: round(p n), a half going to the even number."""
    return round(p * n)


def _times_noise(
    x: Array, out: Array, where: tuple[np.uint64, np.uint64, Array, int], factor: float, law: str, width: int
) -> None:
    """`noise_cpu.noise_rows` on as many threads as the work is worth."""
    key, member, ids, step = where

    def run(start: int, stop: int) -> None:
        noise_cpu.noise_rows(x, out, key, member, ids, step, factor, law == "gaussian", width, start, stop)

    in_parallel(run, len(ids) * -(-width // WORDS), len(out), grain=BATCH)


def noise_on_cpu(
    x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int, row_offset: int,
    shared: Sequence[int], law: str,
) -> Tensor:  # fmt: skip
    """`dropkit::noise` on a CPU.

    Args:
        x: (B, *features), any floating or complex dtype.
        key, member, p: 0-d.
        samples: (B,) or None for row_offset, row_offset + 1, ...
        step, row_offset: numbers.
        shared: dims along which the noise is constant; 0 among them means sample 0 for all.
        law: a key of PURPOSES.

    Returns:
        (B, *features), memory format of x.
    """
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    ids = _row_ids(samples, x.shape[0] if x.ndim else 1, row_offset, 0 in shared).reshape(-1)
    mask_shape = [1 if dim in shared else size for dim, size in enumerate(x.shape)]
    width = math.prod(mask_shape if 0 in shared else mask_shape[1:])
    where = np.uint64(int(key) % 2**64), np.uint64(int(member)), ids, step
    x = x.detach()
    if law == "exact":
        drop = exact_count(float(p), width)
        keep = torch.from_numpy(noise_cpu.exact_keep_rows(*where, width, drop)).view(mask_shape)
        torch.mul(x, width / (width - drop) if drop < width else 0.0, out=out)
        return out.masked_fill_(~keep, 0)
    factor = spread(float(p), law)
    if x.dtype in _FUSED and x.is_contiguous() and len(ids) * width == x.numel():
        _times_noise(x.numpy().reshape(-1), out.numpy().reshape(-1), where, factor, law, width)
        return out
    precision = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    ones = np.ones(len(ids) * width, np.float64 if precision == torch.float64 else np.float32)
    _times_noise(ones, ones, where, factor, law, width)
    return out.copy_(x * torch.from_numpy(ones).view(mask_shape))


def _noise_at(x: Tensor, where: Tensor, p: Tensor, shared: Sequence[int], law: str) -> Tensor:
    """The same with the address in one tensor, as `compiled.py` draws it inside a graph."""
    step, row_offset, batch_shared = where[2:HEAD].tolist()
    samples = where[HEAD:] if len(where) > HEAD else None
    dims = (0, *shared) if batch_shared and x.ndim and 0 not in shared else shared
    return torch.ops.dropkit.noise(x, where[0], where[1], p, samples, step, row_offset, dims, law)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _save_address(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, where, p, ctx.shared, ctx.law = inputs
    ctx.save_for_backward(where, p)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    where, p = ctx.saved_tensors
    return torch.ops.dropkit.noise_at(gradient, where, p, ctx.shared, ctx.law), None, None, None, None


_library.impl("noise", noise_on_cpu, "CPU")
_library.impl("noise_at", _noise_at, "CompositeExplicitAutograd")
torch.library.register_fake("dropkit::noise", _fake, lib=_library)
torch.library.register_fake("dropkit::noise_at", _fake, lib=_library)
torch.library.register_autograd("dropkit::noise_at", _backward, setup_context=_save_address, lib=_library)


class _Noise(torch.autograd.Function):
    """Derivatives of every order, forward mode and vmap."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.dropkit.noise(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, member, p, samples, *ctx.rest = inputs
        ctx.save_for_backward(key, member, p, samples)  # the address; neither x nor the noise
        ctx.save_for_forward(key, member, p, samples)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return noise(gradients[0], *ctx.saved_tensors, *ctx.rest), *[None] * 8

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return noise(tangent, *ctx.saved_tensors, *ctx.rest)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        networks = [
            [
                arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            for i in range(info.batch_size)
        ]
        return torch.stack([noise(*network) for network in networks]), 0


def noise(x: Tensor, *where: Any) -> Tensor:
    """`dropkit::noise` with derivatives of every order, forward mode and vmap; arguments as in `noise_on_cpu`."""
    return _Noise.apply(x, *where)


def compiled_noise(
    x: Tensor, p: Tensor, shared: Sequence[int], law: str, name: str | None, layer: bool
) -> Tensor:
    """The law inside a graph that torch.compile makes; see `compiled.py`."""
    where = torch.ops.dropkit.draw(name, layer, PURPOSES[law])
    return torch.ops.dropkit.noise_at(x, where, p, shared, law)
