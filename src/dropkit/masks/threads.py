"""Work shared out among threads, as many as torch is set to use.

Torch's own team of OpenMP threads does it where that can be had. Its threads wait for their next work by spinning, some
milliseconds long: a thread of ours would share a core with one that spins for nothing, and get half of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PARALLEL_ELEMENTS = 1 << 17  # below this a second thread costs more than it brings (about 40 us to wake it)

Shares = list[tuple[int, int]]
_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_pool: ThreadPoolExecutor | None = None
_forked = False


def _after_fork() -> None:
    """Threads do not survive a fork, and GNU's OpenMP hangs in a child: it starts threads of its own."""
    global _pool, _forked
    _pool, _forked = None, True


os.register_at_fork(after_in_child=_after_fork)


def in_parallel(run: Callable[[int, int], None], units: int, elements: int, grain: int = 1) -> None:
    """Call run(start, stop) over all units, on as many threads as torch is set to use.

    The kernels release the interpreter lock, so threads share the work. (Numba's own thread layers either break after
    a fork or refuse two callers at a time.)

    Args:
        run: does the units start <= i < stop.
        units: how many there are.
        elements: size of the work, which decides whether threads are worth waking.
        grain: starts are multiples of this, so that a split falls between batches of counters.
    """
    threads = min(torch.get_num_threads(), elements // PARALLEL_ELEMENTS + 1, max(units // grain, 1))
    if threads <= 1:
        run(0, units)
        return
    share = -(-units // threads // grain) * grain if units // threads >= grain else grain
    shares = [(start, min(start + share, units)) for start in range(0, units, share)]
    team = None if _forked else _openmp()
    if team is None:
        _by_pool(run, shares)
    else:
        _by_team(team, run, shares)


def _by_pool(run: Callable[[int, int], None], shares: Shares) -> None:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="dropkit")
    futures: list[Future[None]] = [_pool.submit(run, *share) for share in shares[1:]]
    run(*shares[0])
    for future in futures:
        future.result()


class _Job:
    """What a team is doing; the first error of its threads."""

    def __init__(self, run: Callable[[int, int], None], shares: Shares) -> None:
        self.run, self.shares = run, shares
        self.error: BaseException | None = None


_jobs: dict[int, _Job] = {}


def _by_team(team: Any, run: Callable[[int, int], None], shares: Shares) -> None:
    job = _Job(run, shares)
    _jobs[id(job)] = job
    try:
        team.GOMP_parallel(_enter, id(job), len(shares), 0)
    finally:
        del _jobs[id(job)]
    if job.error is not None:
        raise job.error


@_Entry
def _enter(number: int) -> None:
    """What each thread of a team does."""
    job, team = _jobs[number], _openmp()
    try:
        for share in job.shares[team.omp_get_thread_num() :: team.omp_get_num_threads()]:
            job.run(*share)
    except BaseException as error:  # no error can cross the team; the caller raises it
        job.error = job.error or error


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """The GNU OpenMP library that torch has loaded into this process, or None: other systems, other builds."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
        # Other packages bring libraries of the same name; torch's lies in its own folder, or is the only one.
        own = {path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)} or paths
        if len(own) != 1:
            return None
        library = ctypes.CDLL(own.pop())
        library.GOMP_parallel.argtypes = (
            _Entry, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint,
        )  # fmt: skip
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num.restype = library.omp_get_num_threads.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library
