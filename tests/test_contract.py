"""Every layer of the family keeps the contract: each row of `contract_table.py` through the same laws."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import dropkit as dk
from contract_table import ROWS, Row
from dropkit.testing import check_dropout

BY_NAME = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def run(row: Row, layer: torch.nn.Module, inputs: tuple[object, ...], **address: object) -> Tensor:
    with dk.masks(**address):
        return row.output(layer(*inputs))


def layer_of(row: Row, p: float | None = None) -> torch.nn.Module:
    layer = row.make(row.p if p is None else p)
    dk.nn.name_sites(layer)
    return layer


def rows_of(inputs: tuple[object, ...], index: slice | Tensor) -> tuple[object, ...]:
    return tuple(x[index] if isinstance(x, Tensor) else x for x in inputs)


def test_every_public_layer_has_a_row() -> None:
    layers = {
        name
        for name in dk.nn.__all__
        if isinstance(getattr(dk.nn, name), type) and issubclass(getattr(dk.nn, name), torch.nn.Module)
    }
    assert layers == {row.name for row in ROWS if hasattr(dk.nn, row.name)}


@pytest.mark.parametrize("row", [row for row in ROWS if row.check is not None], ids=lambda row: row.name)
def test_multiplying_layers_pass_check_dropout(row: Row) -> None:
    check_dropout(row.make(row.p), name=row.name, p=row.p, **row.check).raise_on_failure()


@BY_NAME
def test_same_address_gives_the_same_output_and_another_seed_step_or_member_another(row: Row) -> None:
    layer, inputs = layer_of(row).train(), row.inputs()
    first = run(row, layer, inputs, seed=3, step=5)
    torch.rand(7)  # what torch's generator did in between does not matter
    torch.testing.assert_close(run(row, layer, inputs, seed=3, step=5), first, rtol=0, atol=0)
    assert not torch.equal(run(row, layer, inputs, seed=4, step=5), first)
    assert not torch.equal(run(row, layer, inputs, seed=3, step=6), first)
    assert not torch.equal(run(row, layer, inputs, seed=3, step=5, member=1), first)


@BY_NAME
def test_rests_in_evaluation_and_acts_there_for_a_member(row: Row) -> None:
    layer, inputs = layer_of(row).eval(), row.inputs()
    state = torch.get_rng_state()
    plain = row.output(layer(*inputs))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(run(row, layer, inputs, seed=1), plain, rtol=0, atol=0)
    if row.identity:
        torch.testing.assert_close(plain, inputs[0], rtol=0, atol=0)
    one, other = (run(row, layer, inputs, seed=1, member=k) for k in (0, 1))
    assert not torch.equal(one, plain)
    assert not torch.equal(one, other)
    torch.testing.assert_close(run(row, layer, inputs, seed=1, member=0), one, rtol=0, atol=0)


@pytest.mark.parametrize("row", [row for row in ROWS if row.by_row], ids=lambda row: row.name)
def test_splitting_and_shuffling_a_batch_changes_nothing(row: Row) -> None:
    layer, inputs = layer_of(row).train(), row.inputs()
    n = len(inputs[0])
    whole = run(row, layer, inputs, seed=2)
    cut = n // 3
    parts = [
        run(row, layer, rows_of(inputs, slice(0, cut)), seed=2),
        run(row, layer, rows_of(inputs, slice(cut, n)), seed=2, row_offset=cut),
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    shuffled = run(row, layer, rows_of(inputs, order), seed=2, samples=order)
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row.by_row], ids=lambda row: row.name)
def test_a_member_is_one_function_of_a_row(row: Row) -> None:
    layer, inputs = layer_of(row).eval(), row.inputs()
    n = len(inputs[0])
    whole = run(row, layer, inputs, seed=2, member=4)
    alone = [run(row, layer, rows_of(inputs, slice(i, i + 1)), seed=2, member=4) for i in range(n)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-6)


@BY_NAME
def test_members_under_vmap_are_the_members_one_by_one(row: Row) -> None:
    layer, inputs = layer_of(row).eval(), row.inputs()
    together = torch.func.vmap(lambda k: run(row, layer, inputs, seed=2, member=k))(torch.arange(3))
    for k in range(3):
        torch.testing.assert_close(
            together[k], run(row, layer, inputs, seed=2, member=k), rtol=1e-4, atol=1e-5
        )


@BY_NAME
def test_gradients_are_those_of_finite_differences(row: Row) -> None:
    layer, inputs = layer_of(row).double().train(), row.inputs()
    floats = [
        i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()
    ]  # what is differentiated
    if not floats:
        floats = []
    arguments = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in copy.deepcopy(inputs)
    ]

    def f(*values: Tensor) -> Tensor:
        filled = list(arguments)
        for i, value in zip(floats, values, strict=True):
            filled[i] = value
        return run(row, layer, tuple(filled), seed=2)

    leaves = tuple(arguments[i].requires_grad_() for i in floats)
    assert not leaves or torch.autograd.gradcheck(f, leaves, fast_mode=True)


@BY_NAME
@pytest.mark.parametrize("p", [float("nan"), -0.1, 1.5, 30, True, "half"])
def test_a_rate_that_is_none_is_refused(row: Row, p: object) -> None:
    with pytest.raises(dk.DropkitError if hasattr(dk, "DropkitError") else ValueError):
        row.make(p)  # type: ignore[arg-type]


@BY_NAME
def test_no_state_is_added_and_copies_are_equal(row: Row) -> None:
    layer, inputs = layer_of(row).train(), row.inputs()
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(
        run(row, twin, inputs, seed=2), run(row, layer, inputs, seed=2), rtol=0, atol=0
    )
    twin.load_state_dict(layer.state_dict())
    if row.check is not None:
        assert not layer.state_dict()
