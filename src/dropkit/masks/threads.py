"""Work shared out among threads, as many as torch is set to use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

PARALLEL_ELEMENTS = 1 << 17  # below this a second thread costs more than it brings (about 40 us to wake it)

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """Threads do not survive a fork; the child starts its own when it needs them."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def in_parallel(run: Callable[[int, int], None], units: int, elements: int, grain: int = 1) -> None:
    """Call run(start, stop) over all units, on as many threads as torch is set to use.

    The kernels release the interpreter lock, so plain threads share the work. (Numba's own thread layers either
    break after a fork or refuse two callers at a time.)

    Args:
        run: does the units start <= i < stop.
        units: how many there are.
        elements: size of the work, which decides whether threads are worth waking.
        grain: starts are multiples of this, so that a split falls between batches of counters.
    """
    global _pool
    threads = min(torch.get_num_threads(), elements // PARALLEL_ELEMENTS + 1, max(units // grain, 1))
    if threads <= 1:
        run(0, units)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="dropkit")
    share = -(-units // threads // grain) * grain if units // threads >= grain else grain
    starts = list(range(share, units, share))
    futures: list[Future[None]] = [_pool.submit(run, i, min(i + share, units)) for i in starts]
    run(0, min(share, units))
    for future in futures:
        future.result()
