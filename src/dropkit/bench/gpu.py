"""What is timed on a GPU: calls that follow one another, and the wait for the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from dropkit.bench.machine import gpu_missing
from dropkit.bench.work import Function, Pair, Work, check_dropped, positive, require

CALLS = 10  # launched before the wait, so that the way through Python runs beside the GPU's work
DTYPE = torch.bfloat16


def kernels_missing() -> str:
    """Why our kernels do not run on a GPU here; "" where they do."""
    return gpu_missing() or ("" if find_spec("triton") else "Triton is not installed")


def in_a_row(call: Function, x: Tensor) -> Work:
    """CALLS forward passes; the last result is what is checked. Our backward pass is the same kernel."""

    def forward() -> Tensor:
        for _ in range(CALLS - 1):
            call(x)
        result = call(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return result

    return Work(forward)


def against_copy(ours: Function, shape: Sequence[int], p: float, device: str = "cuda") -> Pair:
    """Dropout against a copy: the same bytes read and written, which nothing elementwise can beat."""
    x = positive(shape, DTYPE).to(device)
    left, right = in_a_row(ours, x), in_a_row(torch.clone, x)

    def check() -> None:
        check_dropped(left, x, p, (), "ours")
        require(torch.equal(right.run()[0], x), "the peer", "a copy is not its source")

    return Pair(left, right, check, x.numel())


def against_torch(
    ours: Function, peer: Function, shape: Sequence[int], p: float, device: str = "cuda"
) -> Pair:
    """Dropout against torch's, of an input that requires gradients, so that torch keeps its mask."""
    x = positive(shape, DTYPE).to(device).requires_grad_()
    left, right = in_a_row(ours, x), in_a_row(peer, x)

    def check() -> None:
        for side, work in (("ours", left), ("the peer", right)):
            check_dropped(work, x, p, (), side)

    return Pair(left, right, check, x.numel())
