"""Nested plain data with tensors as bytes, and back: tensors as safetensors, the rest as JSON. Never pickle.

What `state_dict()` gives - of modules, optimizers, schedules, loaders - is such data: dicts, lists and tuples of
tensors, numbers and words. It comes back with its types, to the bit.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropkit.directory import strict_json
from dropkit.errors import CheckpointError

STATE, TENSORS = "state.json", "tensors.safetensors"
_DICTS = (dict, OrderedDict, defaultdict)


def to_files(state: Any) -> dict[str, bytes]:
    """The files of a state.

    Every container is tagged with its kind, since JSON knows neither tuples nor keys that are numbers; a tensor is
    named by its position.

    Args:
        state: dicts, lists, tuples, Counters, tensors, numpy arrays, numbers, strings, booleans, None.

    Returns:
        {file name: contents}.

    Raises:
        CheckpointError: something of another type; the message says where it stands.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    tree = _tagged(state, tensors, {}, "state")
    text = json.dumps(tree, allow_nan=False)
    return {STATE: text.encode(), TENSORS: save(tensors)}


def from_files(files: Mapping[str, bytes]) -> Any:
    """The state of `to_files`, on the CPU.

    Raises:
        ValueError: the files are not such a state.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        # A copy of each: what lies in the file's bytes is not aligned as torch aligns its memory, and on that the
        # last bit of a matrix product may depend.
        tensors = {name: tensor.clone() for name, tensor in load(files[TENSORS]).items()}
        return _untagged(strict_json(files[STATE]), tensors)
    except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _tagged(value: Any, tensors: dict[str, Tensor], known: dict[Any, tuple[str, Tensor]], where: str) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str, int):
        return value
    if isinstance(value, np.generic):  # numpy's numbers; most are no Python numbers
        return _tagged(value.item(), tensors, known, where)
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _stored(value, tensors, known, where)}
    if kind is np.ndarray:
        return {"array": _stored(_as_tensor(value, where), tensors, known, where)}
    if kind in (list, tuple, torch.Size):
        items = [_tagged(item, tensors, known, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind in _DICTS or kind is Counter:
        pairs = [
            [_tagged(key, tensors, known, f"a key of {where}"), _tagged(item, tensors, known, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]  # fmt: skip
        tagged: dict[str, Any] = {"counter" if kind is Counter else "dict": pairs}
        if hasattr(value, "_metadata"):  # the versions of layers, which torch reads where it loads
            tagged["metadata"] = _tagged(dict(value._metadata), tensors, known, f"{where}._metadata")
        return tagged
    raise CheckpointError(
        f"{where} is a {kind.__qualname__}; a checkpoint holds tensors, numbers, words, and lists, tuples and dicts "
        "of them. Leave it out, or save what it is made from."
    )


def _stored(
    tensor: Tensor, tensors: dict[str, Tensor], known: dict[Any, tuple[str, Tensor]], where: str
) -> str:
    """Put a tensor among the tensors once, however often it is met, and return its name."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        kind = type(tensor).__qualname__
        raise CheckpointError(
            f"{where} is a {kind} of layout {str(tensor.layout).removeprefix('torch.')}; a checkpoint holds plain "
            "dense tensors. Gather it into one first."
        )
    if tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
        what = "meta" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where} is a {what} tensor, which a checkpoint cannot hold. Save its real and imaginary parts, or "
            "what it is made from."
        )
    key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    if tensor.numel() and key in known:  # tied weights
        return known[key][0]
    name = str(len(tensors))
    # Contiguous and alone in its memory: safetensors refuses views of one another.
    tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    known[key] = name, tensor  # held, so that no other tensor gets its place in memory meanwhile
    return name


def _as_tensor(array: np.ndarray[Any, Any], where: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{where} is an array of {array.dtype}; a checkpoint holds arrays of numbers. Save numbers or words."
        ) from None


def _untagged(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_untagged(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    metadata = tree.pop("metadata", None)
    ((tag, content),) = tree.items()
    if tag == "float":
        return float(content)
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return tensors[content].numpy()
    if tag == "tuple":
        return tuple(_untagged(content, tensors))
    if tag not in ("dict", "counter"):
        raise ValueError(f"{tag!r:.40} is no kind of data")
    pairs = {_untagged(key, tensors): _untagged(item, tensors) for key, item in content}
    if tag == "counter":
        return Counter(pairs)
    if metadata is None:
        return pairs
    ordered = OrderedDict(pairs)
    ordered._metadata = OrderedDict(_untagged(metadata, tensors))  # type: ignore[attr-defined]
    return ordered
