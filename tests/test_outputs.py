"""Structures come back as they were, with something else in the places of their tensors."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree

from dropkit.committee.outputs import call_arguments, count_rows, flatten, moved, rows_first, take
from dropkit.committee.prediction import RegressionPrediction
from dropkit.errors import ShapeError

Pair = namedtuple("Pair", ["mean", "extra"])


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    energy: Any
    unit: str
    forces: Any = None


@dataclasses.dataclass
class Checked:
    values: Any

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError("only tensors here")


class Registered:
    def __init__(self, inside: list[Any], mark: str) -> None:
        self.inside, self.mark = inside, mark


_pytree.register_pytree_node(
    Registered, lambda r: (r.inside, r.mark), lambda values, mark: Registered(list(values), mark)
)

leaves = st.builds(lambda n: torch.full((3, n), float(n)), st.integers(1, 4))
constants = st.one_of(st.none(), st.integers(), st.text(max_size=3))
structures = st.recursive(
    st.one_of(leaves, constants),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Frozen, inner, st.just("eV"), inner),
        st.lists(inner, max_size=2).map(lambda v: Registered(v, "here")),
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Frozen):
        return all(same(getattr(a, f), getattr(b, f)) for f in ("energy", "unit", "forces"))
    if isinstance(a, Registered):
        return a.mark == b.mark and same(a.inside, b.inside)
    return bool(a == b)


@given(structures)
def test_a_structure_is_put_together_again(structure: Any) -> None:
    flat = flatten(structure)
    assert len(flat.leaves) == len(flat.names) == len(set(flat.names))
    assert same(flat.rebuild(flat.leaves), structure)
    doubled = flatten(flat.rebuild([2 * leaf for leaf in flat.leaves]))
    assert doubled.names == flat.names
    assert all(torch.equal(b, 2 * a) for a, b in zip(flat.leaves, doubled.leaves, strict=True))
    with pytest.raises(ShapeError, match="values were given"):
        flat.rebuild([*flat.leaves, 1])


def test_predictions_stand_where_tensors_stood() -> None:
    outputs = {"energy": torch.randn(5, 4), "unit": "eV", "parts": (torch.randn(5, 4, 3), None)}
    flat = flatten(outputs)
    answer = flat.rebuild([RegressionPrediction(leaf) for leaf in flat.leaves])
    assert answer["unit"] == "eV"
    assert answer["energy"].mean.shape == (4,)
    assert answer["parts"][0].mean.shape == (4, 3)
    assert answer["parts"][1] is None


def test_dataclasses_keep_what_they_are_without_running_their_checks() -> None:
    made = flatten(Checked(torch.zeros(2))).rebuild(["a prediction"])
    assert isinstance(made, Checked)
    assert made.values == "a prediction"
    frozen = flatten(Frozen(torch.zeros(2), "eV")).rebuild(["a prediction"])
    assert frozen == Frozen("a prediction", "eV")


def test_what_transformers_gives_is_kept() -> None:
    from transformers import BatchEncoding
    from transformers.modeling_outputs import SequenceClassifierOutput

    output = SequenceClassifierOutput(
        logits=torch.ones(2, 3), hidden_states=(torch.zeros(2, 4), torch.zeros(2, 4))
    )
    flat = flatten(output)
    assert flat.names == ["logits", "hidden_states.[0]", "hidden_states.[1]"]
    made = flat.rebuild(["L", "a", "b"])
    assert isinstance(made, SequenceClassifierOutput)
    assert (made.logits, made["logits"], made.hidden_states, made.loss) == ("L", "L", ("a", "b"), None)
    assert torch.equal(output.logits, torch.ones(2, 3))  # what came in is as it was
    batch = BatchEncoding(
        {"input_ids": torch.zeros(6, 5, dtype=torch.int64), "attention_mask": torch.ones(6, 5)}
    )
    assert count_rows(batch) == 6
    assert take(batch, slice(2)).input_ids.shape == (2, 5)
    assert call_arguments(batch)[1].keys() == {"input_ids", "attention_mask"}


def test_mappings_of_every_kind() -> None:
    ordered = flatten(OrderedDict(b=torch.zeros(1), a=torch.ones(1))).rebuild(["b", "a"])
    assert isinstance(ordered, OrderedDict)
    assert list(ordered.items()) == [("b", "b"), ("a", "a")]
    user = UserDict(x=torch.zeros(1))
    assert flatten(user).rebuild([1])["x"] == 1
    assert isinstance(user["x"], Tensor)
    assert flatten(MappingProxyType({"x": torch.zeros(1)})).rebuild([1]) == {"x": 1}


def test_torch_return_types_are_tuples() -> None:
    top = torch.randn(4, 5).max(dim=1)
    made = flatten(top).rebuild([top.values * 2, top.indices])
    assert type(made) is type(top)
    assert torch.equal(made.values, top.values * 2)


# --- inputs --------------------------------------------------------------------------------------------


def test_a_model_is_called_by_position_or_by_name() -> None:
    x, y = torch.zeros(3, 2), torch.ones(3)
    assert call_arguments(x) == ((x,), {})
    assert call_arguments((x, y)) == ((x, y), {})
    assert call_arguments({"input": x, "other": y}) == ((), {"input": x, "other": y})
    pair = Pair(x, y)
    assert call_arguments(pair) == ((pair,), {})
    with pytest.raises(ShapeError, match="names"):
        call_arguments({0: x})


def test_rows_are_counted_in_all_of_them() -> None:
    inputs = {"a": torch.zeros(4, 2), "b": (np.zeros((4,)), "word")}
    assert count_rows(inputs) == 4
    with pytest.raises(ShapeError, match=r"a \(4, 2\), b.\[0\] \(5,\)"):
        count_rows({"a": torch.zeros(4, 2), "b": (np.zeros((5,)),)})
    with pytest.raises(ShapeError, match=r"x \(\)"):
        count_rows(torch.tensor(1.0))
    with pytest.raises(ShapeError, match="without tensors"):
        count_rows({"a": "word"})


@given(st.lists(st.integers(0, 5), max_size=6))
def test_taken_rows_are_those_rows_in_every_leaf(index: list[int]) -> None:
    inputs = (torch.arange(12.0).reshape(6, 2), {"ids": np.arange(6), "flag": None})
    rows = torch.tensor(index, dtype=torch.int64)
    x, named = take(inputs, rows)
    assert torch.equal(x, inputs[0][rows])
    assert named["ids"].tolist() == index
    assert named["flag"] is None
    cut = take(inputs, slice(1, 3))
    assert cut[1]["ids"].tolist() == [1, 2]


def test_only_the_rows_that_are_asked_for_are_read_from_disk(tmp_path: Any) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12.0).reshape(6, 2))
    part = take(np.load(path, mmap_mode="r", allow_pickle=False), slice(2, 4))
    assert isinstance(part, np.memmap)
    assert moved(part, torch.device("cpu"), torch.float32).tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_numbers_go_to_the_weights_dtype_and_indices_stay() -> None:
    inputs = {
        "x": np.zeros((2, 3)),
        "half": torch.zeros(2, dtype=torch.float16),
        "ids": np.array([1, 2]),
        "mask": torch.tensor([True, False]),
        "wave": torch.zeros(2, dtype=torch.complex64),
        "name": "n",
    }
    there = moved(inputs, torch.device("cpu"), torch.float32)
    kinds = {key: value.dtype for key, value in there.items() if isinstance(value, Tensor)}
    assert kinds == {
        "x": torch.float32,
        "half": torch.float32,
        "ids": torch.int64,
        "mask": torch.bool,
        "wave": torch.complex64,
    }
    assert there["name"] == "n"
    with pytest.raises(ShapeError, match="x is an array of object"):
        moved(np.array(["a", None], dtype=object), torch.device("cpu"), torch.float32)


def test_outputs_without_rows_are_named() -> None:
    rows_first(flatten({"y": torch.zeros(4, 2)}), 4)
    with pytest.raises(ShapeError, match=r"loss \(\), z \(3,\) for 4 rows"):
        rows_first(flatten({"loss": torch.tensor(0.5), "y": torch.zeros(4, 2), "z": torch.zeros(3)}), 4)
    with pytest.raises(ShapeError, match="no tensor"):
        rows_first(flatten({"y": 3}), 4)
