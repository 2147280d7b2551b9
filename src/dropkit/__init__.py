"""dropkit: dropout for PyTorch, from the mask up. A mask is a pure function of its address."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dropkit import errors, functional, nn
from dropkit.masks import masks

if TYPE_CHECKING:
    from dropkit import measure
    from dropkit.committee import Committee
    from dropkit.conversion import convert, insert, restore, scan
    from dropkit.estimators import DropoutClassifier, DropoutRegressor
    from dropkit.measure.inspection import inspect

__version__ = "0.1.0"

__all__ = [
    "Committee",
    "DropoutClassifier",
    "DropoutRegressor",
    "__version__",
    "convert",
    "errors",
    "functional",
    "insert",
    "inspect",
    "masks",
    "measure",
    "nn",
    "restore",
    "scan",
]

# Loaded when asked for: the estimators bring pandas and scikit-learn, which `import dropkit` does not need.
_LAZY = {
    "Committee": "dropkit.committee",
    "DropoutClassifier": "dropkit.estimators",
    "DropoutRegressor": "dropkit.estimators",
    "convert": "dropkit.conversion",
    "insert": "dropkit.conversion",
    "inspect": "dropkit.measure.inspection",
    "restore": "dropkit.conversion",
    "scan": "dropkit.conversion",
}


def __getattr__(name: str) -> Any:
    if name == "measure":
        return importlib.import_module("dropkit.measure")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dropkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
