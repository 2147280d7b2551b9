"""Structured inputs and outputs: what goes in as a mapping or comes out as a dataclass keeps its shape.

A structure is any nesting of tuples (named ones too), lists, mappings, dataclasses (transformers' ModelOutput is one)
and whatever is registered with torch's pytrees. Its leaves are tensors; None, numbers and strings are kept as they are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from dropkit.errors import ShapeError

Array = Tensor | np.ndarray[Any, Any]
# A tensor or array of rows; a tuple of positional arguments; a mapping of named ones.
Inputs = Any


class Flat(NamedTuple):
    """The leaves of a structure, and the way back.

    Attributes:
        leaves: tensors (and arrays), in order.
        names: where each stands, as "logits", "[0]" or "hidden.[2]"; "" for a bare tensor.
        rebuild: as many values as leaves -> the same structure with these in their places.
    """

    leaves: list[Any]
    names: list[str]
    rebuild: Callable[[Sequence[Any]], Any]


def flatten(structure: Any) -> Flat:
    """Take a structure apart.

    Example:
        >>> flat = flatten({"energy": torch.zeros(4), "unit": "eV", "forces": (torch.ones(4, 3), None)})
        >>> flat.names
        ['energy', 'forces.[0]']
        >>> flat.rebuild(["E", "F"])
        {'energy': 'E', 'unit': 'eV', 'forces': ('F', None)}
    """
    leaves: list[Any] = []
    names: list[str] = []
    build = _take_apart(structure, "", leaves, names)

    def rebuild(values: Sequence[Any]) -> Any:
        if len(values) != len(leaves):
            raise ShapeError(f"{len(values)} values were given; the structure has {len(leaves)} tensors.")
        return build(list(values))

    return Flat(leaves, names, rebuild)


def rows_first(flat: Flat, rows: int, what: str = "the model's output") -> None:
    """Check that every leaf counts the rows first.

    Raises:
        ShapeError: there is no tensor, or one has no first axis of `rows`; all such are named.
    """
    if not flat.leaves:
        raise ShapeError(f"{what} holds no tensor; at least one (rows, *out) is needed.")
    wrong = [
        f"{name or 'the tensor'} {tuple(leaf.shape)}"
        for name, leaf in zip(flat.names, flat.leaves, strict=True)
        if leaf.ndim == 0 or leaf.shape[0] != rows
    ]
    if wrong:
        raise ShapeError(
            f"{what} holds {', '.join(wrong)} for {rows} rows; the first axis of every tensor counts the rows. Return "
            "what is about a row, and nothing that is about the batch."
        )


def call_arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called: a tuple's entries by position, a mapping's by name, anything else as the one argument.

    Raises:
        ShapeError: a mapping has keys that are no names.
    """
    if isinstance(x, Mapping):
        if not all(isinstance(key, str) for key in x):
            raise ShapeError(
                f"a mapping with keys {list(x)[:4]} was given; keys are names of the model's arguments."
            )
        return (), dict(x)
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return x, {}
    return (x,), {}


def count_rows(x: Inputs) -> int:
    """How many rows there are; every tensor and array must agree.

    Raises:
        ShapeError: there are no tensors, or they do not agree; named with their shapes.
    """
    flat = flatten(x)
    if not flat.leaves:
        raise ShapeError(
            f"{type(x).__name__} without tensors was given; rows are a tensor or an array (B, ...), a tuple of such by "
            "position, or a mapping by name."
        )
    counts = [leaf.shape[0] if leaf.ndim else None for leaf in flat.leaves]
    if counts[0] is None or set(counts) != {counts[0]}:
        shapes = ", ".join(
            f"{n or 'x'} {tuple(v.shape)}" for n, v in zip(flat.names, flat.leaves, strict=True)
        )
        raise ShapeError(
            f"inputs with other numbers of rows were given: {shapes}. The first axis of each counts the rows; repeat "
            "what all rows share, or make it a buffer of the model."
        )
    return int(counts[0])


def take(x: Inputs, index: slice | Tensor) -> Inputs:
    """Some of the rows of every tensor and array; of an array on disk only these are read."""

    def part(leaf: Array) -> Array:
        if isinstance(leaf, Tensor):
            return leaf[index.to(leaf.device) if isinstance(index, Tensor) else index]
        return leaf[index.cpu().numpy() if isinstance(index, Tensor) else index]

    flat = flatten(x)
    return flat.rebuild([part(leaf) for leaf in flat.leaves])


def moved(x: Inputs, device: torch.device | None, dtype: torch.dtype | None) -> Inputs:
    """Tensors of all leaves on this device; real floating ones in this dtype, all others (indices, masks) in theirs.

    None leaves device and dtype as they are.

    Raises:
        ShapeError: an array holds no numbers.
    """

    def tensor(leaf: Array, name: str) -> Tensor:
        if not isinstance(leaf, Tensor):
            try:
                leaf = torch.tensor(np.ascontiguousarray(leaf))
            except TypeError:
                raise ShapeError(
                    f"{name or 'x'} is an array of {leaf.dtype}; arrays of numbers are allowed."
                ) from None
        to = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
        return leaf.to(leaf.device if device is None else device, to)

    flat = flatten(x)
    return flat.rebuild([tensor(leaf, name) for leaf, name in zip(flat.leaves, flat.names, strict=True)])


Build = Callable[[list[Any]], Any]


def _take_apart(node: Any, name: str, leaves: list[Any], names: list[str]) -> Build:
    if isinstance(node, Tensor | np.ndarray):
        place = len(leaves)
        leaves.append(node)
        names.append(name)
        return lambda values: values[place]

    def inner(items: Sequence[tuple[str, Any]]) -> Callable[[list[Any]], list[Any]]:
        parts = [_take_apart(value, f"{name}.{key}" if name else key, leaves, names) for key, value in items]
        return lambda values: [part(values) for part in parts]

    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = [f.name for f in dataclasses.fields(node)]
        values = inner([(field, getattr(node, field)) for field in fields])
        return lambda new: _with_fields(node, dict(zip(fields, values(new), strict=True)))
    if isinstance(node, Mapping):
        keys = list(node)
        values = inner([(str(key), node[key]) for key in keys])
        return lambda new: _with_items(node, dict(zip(keys, values(new), strict=True)))
    if isinstance(node, tuple | list):
        if hasattr(node, "_fields"):
            values = inner([(field, getattr(node, field)) for field in node._fields])
            return lambda new: type(node)(*values(new))
        values = inner([(f"[{i}]", value) for i, value in enumerate(node)])
        return lambda new: type(node)(values(new))
    registered = _pytree.SUPPORTED_NODES.get(type(node))
    if registered is not None:
        children, context = registered.flatten_fn(node)
        values = inner([(f"[{i}]", child) for i, child in enumerate(children)])
        return lambda new: registered.unflatten_fn(values(new), context)
    return lambda values: node


def _with_fields(node: Any, values: dict[str, Any]) -> Any:
    # A copy with other fields, not a new one: __post_init__ may check or compute what holds for tensors only.
    made = copy.copy(node)
    for field, value in values.items():
        if isinstance(made, MutableMapping) and field in made:
            made[field] = value  # transformers' ModelOutput keeps its fields twice and sets both
        else:
            object.__setattr__(made, field, value)
    return made


def _with_items(node: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if not isinstance(node, MutableMapping):
        return values
    made = copy.copy(node)
    for key, value in values.items():
        made[key] = value
    return made


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Rows of several pieces of one structure, one after the other; tensors."""
    flats = [flatten(part) for part in parts]
    return flats[0].rebuild([torch.cat(leaves) for leaves in zip(*(f.leaves for f in flats), strict=True)])
