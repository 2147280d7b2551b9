"""Dropout on an NVIDIA or AMD GPU: what the kernels in `gpu_kernels.py` are called with.

Triton comes with torch's builds for GPUs on Linux and is loaded with the first tensor that lies on one. Where it is
missing, and for the dtypes and layouts the kernels leave, `anywhere.py` gives the same bits. Key, member and rate are
usually 0-d tensors of the processor, so that nothing is read back from the GPU and nobody waits for it; where they lie
on the GPU, the table of networks is made there.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dropkit.masks import anywhere, ops
from dropkit.masks.gpu_layout import Layout
from dropkit.masks.philox import WORD, survivor_scale, threshold

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The module of Triton kernels, or None where Triton is not installed."""
    try:
        return importlib.import_module("dropkit.masks.gpu_kernels")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None


def dropout_gpu(
    x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int, row_offset: int,
    shared: Sequence[int],
) -> Tensor:  # fmt: skip
    """`dropkit::dropout` where an argument lies on a GPU; arguments as in `ops.dropout_cpu`.

    Returns:
        (*shape), or (K, *shape), memory format of x, where x lies.
    """
    if x.device.type == "cpu":  # only the address came from a GPU
        ids = None if samples is None else samples.cpu()
        return ops.dropout_cpu(x, key.cpu(), member.cpu(), p.cpu(), ids, step, row_offset, shared)
    triton = kernels()
    result = None
    if triton is not None and x.dtype in KERNEL_DTYPES:
        result = launch(triton, x, key, member, p, samples, step, row_offset, shared)
    if result is None:
        result = anywhere.dropout_anywhere(x, key, member, p, samples, step, row_offset, shared)
    return result


def launch(
    triton: Any, x: Tensor, key: Tensor, member: Tensor, p: Tensor, samples: Tensor | None, step: int,
    row_offset: int, shared: Sequence[int],
) -> Tensor | None:  # fmt: skip
    """Run the kernel that fits; None where no kernel can serve this layout."""
    batched = key.ndim > 0
    many = x if batched else x.unsqueeze(0)
    networks = len(many)
    if batched:
        own = [key, member, p, *([samples] if samples is not None and samples.ndim > 1 else [])]
        networks = max(networks, *map(len, own))
    out = torch.empty_like(x) if len(many) == networks else x.new_empty((networks, *x.shape[1:]))
    if out.numel() == 0:
        return out
    rows = many.shape[1] if many.ndim > 1 and 0 not in shared else 1
    if 0 in shared:
        samples, row_offset = None, 0  # one mask for all rows, that of sample 0
    else:
        anywhere.check_rows(samples, rows, row_offset)
    results = out if batched else out.unsqueeze(0)
    layout, direct = Layout.of(many, results, shared), True
    if layout is None:  # memory runs across the mask, or dims alternate too often: in logical order, and back
        many, results = many.contiguous(), torch.empty_like(results, memory_format=torch.contiguous_format)
        layout, direct = Layout.of(many, results, shared), False
        if layout is None:
            return None
    own_bits = batched and (
        key.shape[0] > 1 or member.shape[0] > 1 or (samples is not None and samples.numel() > rows)
    )
    groups, replicas = (networks, 1) if own_bits else (1, networks)
    arguments = layout.arguments(many, results, groups)
    arguments |= _numbers(x, key, member, p, networks, step) | _row_numbers(
        samples, rows, row_offset, x.device
    )
    with _on(x.device):
        layout.kernel(triton)[(layout.programs(groups),)](
            many.detach(), results, replicas=replicas, REFINED=_refined(p), **arguments
        )
    return out if direct else out.copy_(results.view(out.shape))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be that of x."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def signed_word(value: int) -> int:
    """The lower 32 bits as a signed number: every address has one type then, and one kernel."""
    return ((value & WORD) ^ 0x80000000) - 0x80000000


def _refined(p: Tensor) -> bool:
    """Whether a second block may be needed: for a rate below 2**-16, or one that cannot be read without waiting."""
    return p.device.type != "cpu" or any(ops._quantised(rate)[1] > 0 for rate in p.reshape(-1).tolist())


def _numbers(x: Tensor, key: Tensor, member: Tensor, p: Tensor, networks: int, step: int) -> dict[str, Any]:
    """Key, member, step and rate, as scalars or in a table (networks, FIELDS)."""
    unused: dict[str, Any] = dict.fromkeys(("key_low", "key_high", "member", "t", "fine"), 0)
    numbers = unused | {"step": signed_word(step)}
    on_processor = all(t.device.type == "cpu" for t in (key, member, p))
    if networks == 1 and on_processor and x.dtype != torch.float64:  # a scalar float has 32 bits
        word = int(key)
        t, fine, scale = ops._quantised(float(p))
        return numbers | {
            "key_low": signed_word(word), "key_high": signed_word(word >> 32), "member": int(member), "t": t,
            "fine": fine, "scale": scale, "table": None, "scales": None,
        }  # fmt: skip
    if not on_processor:
        key, member, p = (t.to(x.device, non_blocking=True) for t in (key, member, p))
    fields = (key, member, *threshold(p.double()))
    table = torch.stack([field.reshape(-1).expand(networks) for field in fields], dim=1)
    scales = survivor_scale(p.double()).to(anywhere.working_dtype(x)).reshape(-1).expand(networks)
    table, scales = (t.contiguous().to(x.device, non_blocking=True) for t in (table, scales))
    return numbers | {"scale": 1.0, "table": table, "scales": scales}


def _row_numbers(samples: Tensor | None, rows: int, row_offset: int, device: torch.device) -> dict[str, Any]:
    if samples is None:
        return {"rows": rows, "row_offset": row_offset, "samples": None, "samples_stride": 0}
    ids = samples.to(device, non_blocking=True).reshape(-1, rows).contiguous()
    return {"rows": rows, "row_offset": 0, "samples": ids, "samples_stride": rows if len(ids) > 1 else 0}


_library = torch.library.Library("dropkit", "FRAGMENT")
_library.impl("dropout", dropout_gpu, "CUDA")
