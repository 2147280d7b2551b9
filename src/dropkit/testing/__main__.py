"""`python -m dropkit.testing`: what torch's dropouts, others' and dropkit's keep, side by side, as a Markdown table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dropkit.nn import features
from dropkit.testing import Report, check_dropout, compare

SUBJECTS = (
    ("dropkit.nn.Dropout", features.Dropout),
    ("dropkit.functional.dropout", features.dropout),
    ("torch.nn.Dropout", torch.nn.Dropout),
    ("F.dropout", F.dropout),
    ("torch.nn.Dropout1d", torch.nn.Dropout1d),
    ("torch.nn.Dropout2d", torch.nn.Dropout2d),
    ("torch.nn.Dropout3d", torch.nn.Dropout3d),
    ("torch.nn.AlphaDropout", torch.nn.AlphaDropout),
    ("torch.nn.FeatureAlphaDropout", torch.nn.FeatureAlphaDropout),
)

# Others, where they are installed and can be imported: name, distribution, module, how to make it, how it is checked.
OTHERS: tuple[tuple[str, str, str, Callable[[Any], Any], dict[str, Any]], ...] = (
    ("timm.layers.DropPath", "timm", "timm.layers", lambda timm: timm.DropPath, {"kind": "rows"}),
    ("torchvision.ops.StochasticDepth", "torchvision", "torchvision.ops",
     lambda ops: ops.StochasticDepth(0.3, "row"), {"kind": "rows"}),
    ("torch_geometric.utils.mask_feature", "torch-geometric", "torch_geometric.utils",
     lambda utils: mask_feature(utils), {"law": "classic"}),
)  # fmt: skip


def mask_feature(utils: Any) -> Callable[..., Tensor]:
    """PyTorch Geometric's dropout of node features, element by element; it does not scale."""

    def masked(x: Tensor, p: float = 0.3, training: bool = True) -> Tensor:
        result: Tensor = utils.mask_feature(x, p, mode="all", training=training)[0]
        return result

    return masked


def others() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Those of OTHERS that are here; the rest is named on stderr."""
    for name, distribution, module, make, options in OTHERS:
        try:
            yield f"{name} {version(distribution)}", make(importlib.import_module(module)), options
        except PackageNotFoundError:
            sys.stderr.write(f"{name}: not installed\n")
        except Exception as error:  # a package that breaks on import is missing too
            sys.stderr.write(f"{name}: cannot be imported ({type(error).__name__}: {error})\n")


def reasons(report: Report) -> str:
    """What was seen where a law is broken, as a list."""
    lines = [f"- `{name}`: {report[name].reason}" for name in report.failed]
    return "\n".join([f"{report.subject} ({report.contract})", "", *(lines or ["- all that apply are kept"])])


def main(arguments: list[str]) -> int:
    """Print the table, then what was seen where a law is broken; --quick leaves out compilers and export."""
    if unknown := [word for word in arguments if word != "--quick"]:
        sys.stderr.write(f"unknown: {unknown}. Usage: python -m dropkit.testing [--quick]\n")
        return 2
    slow = "--quick" not in arguments
    reports = [check_dropout(thing, name=name, slow=slow) for name, thing in SUBJECTS]
    reports += [check_dropout(thing, name=name, slow=slow, **options) for name, thing, options in others()]
    versions = f"dropkit {version('dropkit')}, torch {torch.__version__}, CPU"
    alarm = f"False alarm of a column: at most {max(report.false_alarm for report in reports):.1g}."
    sys.stdout.write(f"{versions}. {alarm}\n\n{compare(reports)}\n\n")
    sys.stdout.write("\n\n".join(reasons(report) for report in reports) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
