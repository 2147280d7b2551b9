"""`python -m dropkit.testing`: what torch's dropouts and dropkit's keep, side by side, as a Markdown table."""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
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
    versions = f"dropkit {version('dropkit')}, torch {torch.__version__}, CPU"
    alarm = f"False alarm of a column: at most {max(report.false_alarm for report in reports):.1g}."
    sys.stdout.write(f"{versions}. {alarm}\n\n{compare(reports)}\n\n")
    sys.stdout.write("\n\n".join(reasons(report) for report in reports) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
