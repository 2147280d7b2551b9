"""Addresses: what a mask depends on, and nothing else."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dropkit as dk
from dropkit.errors import AddressError
from dropkit.masks import address


def drawn(width: int = 64, rows: int = 1, **fields) -> torch.Tensor:
    with dk.masks(**fields):
        return dk.functional.dropout(torch.ones(rows, width), 0.5, site="a")


BASE = {"seed": 5, "step": 6, "member": None, "row_offset": 7}


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"step": 5}, {"row_offset": 6}, {"member": 0}, {"seed": 5 + 2**32}]
)
def test_every_field_of_the_address_matters(change):
    assert torch.equal(drawn(**BASE), drawn(**BASE))
    assert not torch.equal(drawn(**BASE), drawn(**(BASE | change)))  # equal by chance: 2**-64


FIELDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "step": st.integers(0, 2**32 - 1),
        "row_offset": st.integers(0, 2**40 - 9),
    }
)


@given(fields=FIELDS, data=st.data())
def test_a_row_keeps_its_mask_in_any_batch(fields, data):
    ids = data.draw(st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=8, unique=True))
    order = data.draw(st.permutations(range(len(ids))))
    samples = torch.tensor(ids)
    del fields["row_offset"]
    together = drawn(rows=len(ids), samples=samples, **fields)
    assert torch.equal(drawn(rows=len(ids), samples=samples[list(order)], **fields), together[list(order)])
    assert torch.equal(drawn(rows=1, samples=samples[:1], **fields), together[:1])


@given(fields=FIELDS, cuts=st.lists(st.integers(0, 8), max_size=4))
def test_chunks_with_an_offset_are_the_whole(fields, cuts):
    whole = drawn(rows=8, **fields)
    edges = [0, *sorted(cuts), 8]
    start = fields.pop("row_offset")
    parts = [drawn(rows=b - a, row_offset=start + a, **fields) for a, b in itertools.pairwise(edges) if b > a]
    assert torch.equal(torch.cat(parts), whole)


def test_a_member_is_one_mask_for_all_rows_and_samples_give_each_row_its_own():
    member = drawn(rows=5, member=3)
    assert torch.equal(member, member[:1].expand_as(member))
    assert torch.equal(member[:2], drawn(rows=2, member=3))
    own = drawn(rows=5, member=3, samples=torch.arange(5))
    assert not torch.equal(own, own[:1].expand_as(own))


def test_a_site_is_its_name_and_its_call():
    x, layer, other = torch.ones(1, 64), dk.nn.Dropout(0.5), dk.nn.Dropout(0.5)
    with dk.masks(seed=0):
        first, again, third = layer(x), layer(x), other(x)
    assert not torch.equal(first, again)
    assert not torch.equal(first, third)
    model = torch.nn.Sequential(torch.nn.Identity(), layer, other)
    dk.nn.name_sites(model)
    with dk.masks(seed=0):
        alone = other(x)
    with dk.masks(seed=0):
        layer(x)
        assert torch.equal(other(x), alone)  # a named layer does not move when another is called before it


def test_the_same_site_twice_is_refused_by_name():
    x = torch.ones(1, 8)
    with dk.masks(seed=0):
        dk.functional.dropout(x, 0.5, site="a")
        with pytest.raises(AddressError, match="site 'a' was drawn twice"):
            dk.functional.dropout(x, 0.5, site="a")
    one, two = dk.nn.Dropout(0.5), dk.nn.Dropout(0.5)
    one.site = two.site = "drop"
    with dk.masks(seed=0):
        one(x)
        with pytest.raises(AddressError, match="'drop' belongs to two layers"):
            two(x)


def test_sites_whose_hashes_meet_are_refused(monkeypatch):
    monkeypatch.setattr(address, "site_hash", lambda name, call=0: 1)
    with dk.masks(seed=0):
        dk.functional.dropout(torch.ones(1, 8), site="a")
        with pytest.raises(AddressError, match="meet in one hash"):
            dk.functional.dropout(torch.ones(1, 8), site="b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 2**64}, r"2\*\*64 - 1"),
        ({"seed": -1}, "seed=-1"),
        ({"step": 2**32}, "step=4294967296"),
        ({"member": 2**24}, "member=16777216"),
        ({"row_offset": 2**40}, "row_offset"),
        ({"step": 1.0}, "whole number"),
        ({"samples": torch.tensor([-1])}, r"\[0, 2\*\*40\)"),
        ({"samples": torch.tensor([2**40])}, r"\[0, 2\*\*40\)"),
        ({"samples": torch.tensor([[1]])}, "one id for each row"),
        ({"samples": torch.tensor([1.0])}, "whole numbers"),
    ],
)
def test_a_field_past_its_range_is_an_error_never_a_wrap(fields, message):
    with pytest.raises(AddressError, match=message):
        dk.masks(**fields)


def test_rows_that_would_run_past_the_last_id_are_refused():
    with pytest.raises(AddressError, match=r"2\*\*40"):
        drawn(rows=2, row_offset=2**40 - 1)


def test_outside_a_context_torchs_generator_decides():
    x, layer = torch.ones(4, 50), dk.nn.Dropout(0.5)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        layer(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_inside_a_context_torchs_generator_is_not_touched():
    state = torch.get_rng_state()
    drawn()
    assert torch.equal(torch.get_rng_state(), state)


def test_contexts_nest_and_end():
    with dk.masks(seed=1):
        outer = drawn(seed=2)
        inside = dk.functional.dropout(torch.ones(1, 64), 0.5, site="a")
    assert torch.equal(outer, drawn(seed=2))
    assert torch.equal(inside, drawn(seed=1))
    assert address.current() is None


def test_a_context_belongs_to_its_thread():
    seen = []
    with dk.masks(seed=1):
        thread = threading.Thread(target=lambda: seen.append(address.current()))
        thread.start()
        thread.join()
    assert seen == [None]
