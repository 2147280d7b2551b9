"""Frozen records out of JSON that nobody vouches for."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any


def as_list(value: Any) -> list[Any]:
    """The value, if it is a list."""
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, not {type(value).__name__}")
    return value


def as_record(kind: type[Any], item: Any) -> Any:
    """Build a frozen record from a JSON object with exactly its fields, each of its type."""
    given, wanted = set(item), {f.name for f in fields(kind)}
    if given != wanted:
        raise ValueError(f"{kind.__name__} has the fields {sorted(wanted)}, not {sorted(given)}")
    return kind(
        **{f.name: _value(f"{kind.__name__}.{f.name}", str(f.type), item[f.name]) for f in fields(kind)}
    )


def _value(name: str, kind: str, value: Any) -> Any:
    match kind:
        case "str" | "Kind":
            good = isinstance(value, str)
        case "str | None":
            good = value is None or isinstance(value, str)
        case "int":
            good = type(value) is int and value >= 0
        case "bool":
            good = type(value) is bool
        case "float":
            good = type(value) in (int, float) and math.isfinite(value)
        case "tuple[str, ...]":
            good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "tuple[float, float] | None":
            good = value is None or (
                isinstance(value, list)
                and len(value) == 2
                and all(type(v) in (int, float) and math.isfinite(v) for v in value)
            )
        case _:
            raise AssertionError(f"{name}: no rule reads a {kind}")
    if not good:
        raise ValueError(f"{name} is {value!r:.80}")
    if isinstance(value, list):
        return tuple(map(float, value)) if "float" in kind else tuple(value)
    return float(value) if kind == "float" else value
