"""Frozen records to plain JSON values and back, the way back not trusting what it reads."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from dropkit.errors import ModelDirectoryError


def finite(value: Any) -> Any:
    """The same nested value with null for NaN and infinity, which JSON has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def rebuild(kind: Any, value: Any, where: str) -> Any:
    """A value of type `kind` from what JSON gave.

    Args:
        kind: a record, a tuple, a union, a literal, or str, int, float, bool.
        value: dicts, lists, strings, numbers, booleans, None.
        where: path inside the file, for the error.

    Raises:
        ModelDirectoryError: the value does not fit the type.
    """
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return rebuild_record(kind, value, where)
    if origin is tuple:
        return rebuild_tuple(typing.get_args(kind), value, where)
    if origin in (types.UnionType, typing.Union):
        return rebuild_union(typing.get_args(kind), value, where)
    if origin is Literal:
        if value in typing.get_args(kind):
            return value
    elif kind is float and value is None:
        return math.nan  # what `finite` replaced
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    raise ModelDirectoryError(
        f"{where} is {shorten(value)}; the file is damaged or altered. Copy it anew or fit again."
    )


def rebuild_record(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from a dict with exactly its fields."""
    names = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        found = sorted(names ^ set(value)) if isinstance(value, dict) else shorten(value)
        raise ModelDirectoryError(
            f"{where} does not have the parts of a {kind.__name__} (missing or unknown: {found}); "
            "the file is damaged or altered. Copy it anew or fit again."
        )
    hints = typing.get_type_hints(kind)
    return kind(**{name: rebuild(hints[name], value[name], f"{where}.{name}") for name in value})


def rebuild_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple from a list: of one type throughout, or of as many values as types."""
    if isinstance(value, list) and kinds[-1] is Ellipsis:
        return tuple(rebuild(kinds[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, list) and len(value) == len(kinds):
        return tuple(
            rebuild(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True))
        )
    raise ModelDirectoryError(
        f"{where} is {shorten(value)} instead of a list; the file is damaged or altered. Copy it anew or fit again."
    )


def rebuild_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The member of a union that fits: None for null, else the record with the same fields, else the first kind."""
    if value is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    fitting = [
        kind
        for kind in rest
        if dataclasses.is_dataclass(kind)
        and isinstance(value, dict)
        and {f.name for f in dataclasses.fields(kind)} == set(value)
    ]
    return rebuild((fitting or rest)[0], value, where)


def shorten(value: Any) -> str:
    """repr of a value, cut to a length that fits in an error's line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
