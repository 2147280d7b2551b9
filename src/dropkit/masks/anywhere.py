"""Masks on any device, in torch's own operations: the definitions of `philox.py` and `noise.py` where x lies.

    y[k, b, e] = x[k, b, e] * scale[k]  where the mask at (key[k], member[k], sample[b], step) keeps e, else 0

Slow, some 200 bytes of integers for each element of a few rows at a time, and the same bits everywhere. It serves
devices without a kernel of ours, a GPU without Triton, and the dtypes and layouts that a kernel leaves. It asks
nothing of a device, so nothing waits for one: rates, keys and members usually lie in the memory of the processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dropkit.errors import AddressError, ShapeError
from dropkit.masks import noise
from dropkit.masks.address import SAMPLES
from dropkit.masks.noise_ops import exact_count, spread
from dropkit.masks.philox import bernoulli_keep, survivor_scale

CHUNK = 1 << 20  # mask elements made at a time
WITHOUT_FLOAT64 = ("mps",)  # noise is made by the processor, and copied


def row_ids(
    samples: Tensor | None, rows: int, row_offset: int, batch_shared: bool, device: torch.device
) -> Tensor:
    """Sample ids on the device, (1 or A, B) int64; one 0 where the mask is shared over the batch.

    Raises:
        AddressError: ids beyond 2**40.
        ShapeError: samples that are not one for each row.
    """
    if batch_shared:
        return torch.zeros((1, 1), dtype=torch.int64, device=device)
    check_rows(samples, rows, row_offset)
    if samples is None:
        return torch.arange(row_offset, row_offset + rows, dtype=torch.int64, device=device)[None]
    ids = samples.to(device, non_blocking=True)
    return ids if ids.ndim > 1 else ids[None]


def check_rows(samples: Tensor | None, rows: int, row_offset: int) -> None:
    """Whether each row has an id in range; ids that are given were looked at when the context was made."""
    if samples is None and row_offset + rows > SAMPLES:
        raise AddressError(
            f"{rows} rows from row_offset={row_offset} on were given; a row id lies in [0, 2**40)."
        )
    if samples is not None and samples.shape[-1] != rows:
        raise ShapeError(
            f"{samples.shape[-1]} sample ids were given for {rows} rows; one id for each row is needed."
        )


def mask_sizes(shape: Sequence[int], shared: Sequence[int]) -> tuple[int, list[int]]:
    """Mask elements of one sample, and the mask's shape, which broadcasts to `shape`."""
    sizes = [1 if dim in shared else size for dim, size in enumerate(shape)]
    return math.prod(sizes if 0 in shared else sizes[1:]), sizes


def working_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: 16-bit types in float32, so that they round once; complex ones by a real number."""
    return torch.promote_types(x.real.dtype if x.is_complex() else x.dtype, torch.float32)


def dropout_anywhere(
    x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int, row_offset: int,
    shared: Sequence[int],
) -> Tensor:  # fmt: skip
    """`dropkit::dropout` on the device of x; arguments as in `ops.dropout_cpu`, on that device or a processor's.

    Returns:
        (*shape), or (K, *shape), memory format of x.
    """
    if key.ndim == 0:
        ids = row_ids(samples, x.shape[0] if x.ndim else 1, row_offset, 0 in shared, x.device)
        return _one(x, torch.empty_like(x), key, member, p, ids[0], step, shared)
    batched = [x, key, member, p, *([samples] if samples is not None and samples.ndim > 1 else [])]
    networks = max(len(t) for t in batched)
    out = torch.empty_like(x) if len(x) == networks else x.new_empty((networks, *x.shape[1:]))
    ids = row_ids(samples, x.shape[1] if x.ndim > 1 else 1, row_offset, 0 in shared, x.device)
    for k in range(networks):
        x_k, out_k, key_k, member_k, p_k, ids_k = (
            t[min(k, len(t) - 1)] for t in (x, out, key, member, p, ids)
        )
        _one(x_k, out_k, key_k, member_k, p_k, ids_k, step, shared)
    return out


def _one(
    x: Tensor, out: Tensor, key: Tensor, member: Tensor, p: Tensor, ids: Tensor, step: int, shared: Sequence[int]
) -> Tensor:  # fmt: skip
    """Write dropout of one x, (*shape), into out."""
    if out.numel() == 0:
        return out
    width, sizes = mask_sizes(x.shape, shared)
    key, member, p = (_reachable(t, x.device) for t in (key, member, p))
    scale = survivor_scale(p).to(working_dtype(x)).to(x.device, non_blocking=True)
    out.copy_(x.detach() * scale.reshape([1] * x.ndim))
    keep = [bernoulli_keep(key, member, some, step, width, p) for some in ids.split(max(CHUNK // width, 1))]
    return out.masked_fill_(~torch.cat(keep).view(sizes), 0)


def noise_anywhere(
    x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int, row_offset: int,
    shared: Sequence[int], law: str,
) -> Tensor:  # fmt: skip
    """`dropkit::noise` on the device of x; arguments as in `noise_ops.noise_on_cpu`.

    Each operation is a kernel of its own, so no product and sum are contracted into one rounding, and float64 is that
    of IEEE 754: the noise has the same bits as on a processor. A rate that lies on the device is waited for.
    """
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    device = x.device if x.device.type not in WITHOUT_FLOAT64 else torch.device("cpu")
    ids = row_ids(samples, x.shape[0] if x.ndim else 1, row_offset, 0 in shared, device)[0]
    width, sizes = mask_sizes(x.shape, shared)
    rate, chunks = float(p), ids.split(max(CHUNK // width, 1))
    key, member = (_reachable(t, device) for t in (key, member))
    x = x.detach()
    if law == "exact":
        drop = exact_count(rate, width)
        keep = [noise.exact_keep(key, member, some, step, width, drop) for some in chunks]
        torch.mul(x, width / (width - drop) if drop < width else 0.0, out=out)
        return out.masked_fill_(~torch.cat(keep).view(sizes).to(x.device), 0)
    factor, draw = spread(rate, law), noise.gaussian_noise if law == "gaussian" else noise.uniform_noise
    dtype = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    factors = [(1.0 + factor * draw(key, member, some, step, width)).to(dtype) for some in chunks]
    return out.copy_(x * torch.cat(factors).view(sizes).to(x.device))


def _reachable(scalar: Tensor, device: torch.device) -> Tensor:
    """A 0-d tensor that goes together with tensors on the device: those of the processor go with all."""
    return scalar if scalar.device.type == "cpu" else scalar.to(device)


_library = torch.library.Library("dropkit", "FRAGMENT")
_library.impl("dropout", dropout_anywhere, "CompositeExplicitAutograd")
_library.impl("noise", noise_anywhere, "CompositeExplicitAutograd")
