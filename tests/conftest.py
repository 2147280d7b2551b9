"""What all tests share: where the data lie, how chance is fixed, and that nothing is skipped in silence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from skip_watch import data_folder
from skip_watch import pytest_configure as pytest_configure  # pytest finds its hooks in this module

# Examples are drawn anew on a developer's machine, so that the search goes on; in continuous integration they are
# the same on every run, so that a red build can be had again. No clocks: a compiled kernel's first call is slow, and
# so is a machine that does something else as well.
UNTIMED = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("developer", UNTIMED)
settings.register_profile("ci", UNTIMED, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "developer")

# What cannot run here is not collected, and the head of the run says so. Triton is part of the test extra on Linux.
NEEDS = {
    "test_gpu_triton.py": find_spec("triton") is not None,
    "test_gpu_device.py": torch.cuda.is_available(),
}
collect_ignore = [name for name, there in NEEDS.items() if not there]


def pytest_report_header() -> list[str]:
    """Say which tests are left out for want of Triton or a GPU."""
    return [f"left out: tests/{name}" for name in collect_ignore]


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="session")
def shared_data() -> Path | None:
    """The folder of shared data sets, or None on a machine that has not got it."""
    return data_folder()


@pytest.fixture(autouse=True)
def known_torch_generator() -> None:
    """Start every test from one state of torch's generator, whatever ran before it."""
    torch.manual_seed(20140615)


@pytest.fixture(autouse=True)
def no_graphs_of_others() -> None:
    """Torch allows 8 compiled versions of code that all modules share, and counts those of other tests too."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on two CPUs of this machine, and nothing that anybody is told."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
