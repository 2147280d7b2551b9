"""What a call allocates at its peak, and what it leaves behind for the backward pass; counted, not sampled."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

_BEGIN, _FORWARD_DONE = "dropkit bench: begin", "dropkit bench: forward done"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on top of the inputs.

    Attributes:
        peak: most that was allocated at one time, results among it.
        kept: what lives after the forward pass beside its result: masks, copies, addresses.
    """

    peak: int
    kept: int


def measure_memory(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, *, again: bool = False
) -> Memory:
    """Count every allocation of torch and numpy during one pass, wherever a function keeps what it keeps.

    Args:
        forward: gives one tensor, in memory of its own.
        backward: is given that tensor, or None: forward alone.
        again: whether forward has been called before.
    """
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or torch's profiler reports its own start on standard error
    if not again:
        forward()  # what is made once for all calls is no cost of this one
    tracemalloc.start()  # where numpy reports its arrays
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with record_function(_BEGIN):
                before = tracemalloc.get_traced_memory()[0]
            result = forward()
            with record_function(_FORWARD_DONE):
                arrays_kept = max(0, tracemalloc.get_traced_memory()[0] - before - _PYTHON_OBJECTS)
            if backward is not None:
                backward(result)
            arrays_peak = max(0, tracemalloc.get_traced_memory()[1] - before - _PYTHON_OBJECTS)
    finally:
        tracemalloc.stop()
    result_bytes = result.untyped_storage().nbytes()
    peak, after_forward = _tensors(profiler)
    return Memory(peak + arrays_peak, after_forward - result_bytes + arrays_kept)


_PYTHON_OBJECTS = (
    32_768  # tracemalloc also counts what the interpreter and the profiler themselves need, some KiB
)


def _tensors(profiler: Any) -> tuple[int, int]:
    """Bytes of tensors at the peak, and at the end of the forward pass."""
    events = [
        (event.start_ns(), event.name(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() in ("[memory]", _BEGIN, _FORWARD_DONE)
    ]
    live = peak = after_forward = 0
    for _, name, size in sorted(events, key=lambda event: event[0]):
        if name == _BEGIN:
            live = peak = 0
        elif name == _FORWARD_DONE:
            after_forward = live
        else:
            live += size
            peak = max(peak, live)
    return peak, after_forward
