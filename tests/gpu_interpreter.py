"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

from dropkit.masks import gpu_kernels

KERNELS = ("elementwise", "strided")


@contextmanager
def interpreting() -> Iterator[None]:
    """What is jitted here runs in Triton's interpreter."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


def interpreted(path: str | None = gpu_kernels.__file__) -> Any:
    """A second copy of the module of kernels, for the interpreter."""
    assert path is not None
    spec = importlib.util.spec_from_file_location("interpreted_gpu_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with interpreting():
        spec.loader.exec_module(module)
    return module


_convert_float = interpreter._convert_float


def round_as_hardware(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter's conversion of floats, but bfloat16 is rounded to even, as `cvt.rn` does.

    Its own takes every half up, and loses the carry into the exponent.
    """
    if (source, target) == (tl.float32, tl.bfloat16):
        values = torch.from_numpy(np.array(data, np.float32).reshape(-1))
        return values.bfloat16().view(torch.uint16).numpy().reshape(data.shape)
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.array(data).view(np.uint16).astype(np.uint32) << 16
    return _convert_float(data, source, target, rounding)


class _Elsewhere:
    """Takes the place of a GPU's driver: names the GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class _Kernel:
    """Stands for a kernel; compiles in place of running, as the same call on a GPU would."""

    def __init__(self, kernel: Any, compiled: list[Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.compiled.append(self.kernel.run(*arguments, grid=grid, warmup=True, **named))

        return launch


class Compiling:
    """Stands for the module of kernels within `compiling_for`; `compiled` has what each launch would have run."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        for name in KERNELS:
            setattr(self, name, _Kernel(getattr(gpu_kernels, name), self.compiled))


@contextmanager
def compiling_for(capability: int) -> Iterator[Compiling]:
    """Compile for an NVIDIA GPU of this compute capability (80: A100, 90: H100), which need not be there."""
    config = triton.runtime.driver
    before = config._active
    config._active = _Elsewhere(capability)
    try:
        yield Compiling()
    finally:
        config._active = before
