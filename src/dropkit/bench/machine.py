"""What the figures were measured on, and what is missing there."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numba
import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run took place.

    Attributes:
        processor: its name.
        cores: processors this process may use.
        load: processes that wanted one during the last minute, before the run began; -1 where unknown.
        python, torch, numba: versions.
    """

    processor: str
    cores: int
    load: float
    python: str
    torch: str
    numba: str


def this_machine() -> Machine:
    """The machine that runs this."""
    return Machine(
        processor=_processor(),
        cores=cores_at_hand(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        python=platform.python_version(),
        torch=str(torch.__version__),
        numba=str(numba.__version__),
    )


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores_at_hand() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiler_missing() -> str:
    """Why torch.compile cannot build for the CPU; "" where it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "torch.compile finds no C++ compiler"
    return ""


def gpu_missing() -> str:
    """Why nothing runs on a GPU; "" where it could."""
    return "" if torch.cuda.is_available() else "torch finds no GPU"
