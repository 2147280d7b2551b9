"""Say whether the installed torch is the pinned one, and whether CUDA packages came in beside a CPU build.

Many packages of the torch family, installed without constraints, replace a CPU torch by a CUDA build of another
version and several GB of libraries. This finds it right after the installation, not as a strange error later.

    python .ci/check_torch.py constraints.txt [--cpu]

With --cpu a CUDA build of torch is refused as well: continuous integration runs on the CPU build.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

# Not triton: the tests run the GPU's kernels in its interpreter, beside a CPU torch.
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)[-_]|pytorch[-_]triton")


def complaints(constraints: Path, cpu: bool) -> list[str]:
    """What is wrong with this environment, one line each; nothing where all is well."""
    pin = re.search(r"^torch==(\S+)$", constraints.read_text(), flags=re.MULTILINE)
    if pin is None:
        return [f"{constraints} has no line torch==VERSION."]
    found = []
    version = torch.__version__.partition("+")[0]
    if version != pin[1]:
        found.append(f"torch {torch.__version__} is installed; {constraints} pins {pin[1]}.")
    if torch.version.cuda is None:
        names = sorted({d.name for d in distributions() if CUDA_PACKAGE.match(d.name.lower())})
        if names:
            found.append(f"CUDA packages came in beside a CPU build of torch: {', '.join(names)}.")
    elif cpu:
        found.append(f"torch {torch.__version__} is a CUDA build; the CPU build is wanted here.")
    return found


def main() -> int:
    """Print the complaints; 1 where there are any."""
    constraints = Path(sys.argv[1])
    found = complaints(constraints, cpu="--cpu" in sys.argv[2:])
    for line in found:
        print(line, file=sys.stderr)
    if found:
        print("Remove the virtual environment and run make again.", file=sys.stderr)
    else:
        print(f"torch {torch.__version__}: as pinned.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
