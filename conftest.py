"""The examples of README and docs are tests: every python block runs, in the order of its page.

A page is one story, so parallel runs keep it in one worker: pytest -n 2 --dist loadfile, as the Makefile does.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from dropkit.bench.peers import name_torchvision_operators

name_torchvision_operators()  # timm and torchmetrics import it, and beside a CPU build of torch it cannot be imported
collect_ignore_glob = ["docs/*.py", "docs/extensions/*"]
collect_ignore = ["src/dropkit/masks/gpu_kernels.py"]  # needs Triton to be imported, and has no examples


def enter_own_folder(namespace: dict[str, Any]) -> None:
    """Run a page's examples in an empty folder, so that they may write files."""
    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_home"] = Path.cwd()
    os.chdir(namespace["_folder"].name)


def leave_own_folder(namespace: dict[str, Any]) -> None:
    """Go back, and remove what the examples wrote."""
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    setup=enter_own_folder,
    teardown=leave_own_folder,
).pytest()
