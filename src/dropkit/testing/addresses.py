"""Checks of masks that have an address: the same mask wherever, whenever and in whatever batch it is computed."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor

from dropkit.testing.registry import check
from dropkit.testing.subject import NotApplicable, Subject, expect


def rows_of(s: Subject) -> tuple[Tensor, int]:
    """A batch of 37 rows and its size, where each row has a mask of its own."""
    if s.context is None:
        raise NotApplicable("its masks have no address")
    if 0 in s.shared:
        raise NotApplicable("one mask serves all rows")
    return s.values((37, *s.shape[1:])), 37


def compositions(total: int) -> list[list[int]]:
    """Some ways to cut a batch: single rows, halves, uneven parts, empty ones."""
    return [[1] * total, [total // 2, total - total // 2], [5, 0, 1, 8, total - 14], [total - 1, 1]]


@check()
def split_changes_nothing(s: Subject) -> None:
    """A row has the same mask in any batch: parts of a batch, put together, are the batch."""
    x, total = rows_of(s)
    with s.address(seed=1, step=4):
        whole = s.build()(x)
    for sizes in compositions(total):
        parts, start = [], 0
        for size in sizes:
            with s.address(seed=1, step=4, row_offset=start):
                parts.append(s.build()(x[start : start + size]))
            start += size
        expect(torch.equal(torch.cat(parts), whole), f"rows changed in parts of {sizes[:5]}")


@check()
def shuffle_changes_nothing(s: Subject) -> None:
    """With row ids, a row keeps its mask in any order and any selection."""
    x, total = rows_of(s)
    with s.address(seed=1):
        whole = s.build()(x)
    order = torch.arange(total - 1, -1, -1) * 5 % total
    for chosen in (order, order[:3], order[:1]):
        with s.address(seed=1, samples=chosen):
            expect(
                torch.equal(s.build()(x[chosen]), whole[chosen]),
                f"rows changed when {len(chosen)} were chosen",
            )


@check()
def history_changes_nothing(s: Subject) -> None:
    """The mask of an address is the same whatever was drawn before: a resumed run meets the same masks."""
    x, _ = rows_of(s)
    layer = s.build()
    with s.address(seed=1, step=9):
        first = layer(x)
    for step in range(3):
        with s.address(seed=1, step=step):
            layer(x)
    s.build()(x)
    torch.manual_seed(0)
    with s.address(seed=1, step=9):
        expect(torch.equal(s.build()(x), first), "it is another one")


@check()
def address_leaves_the_generator_alone(s: Subject) -> None:
    """Under an address nothing is drawn from torch's generator."""
    x, _ = rows_of(s)
    before = torch.get_rng_state()
    with s.address(seed=1):
        s.build()(x)
    expect(torch.equal(before, torch.get_rng_state()), "it moved")


@check()
def every_field_of_the_address_matters(s: Subject) -> None:
    """Another seed, step, row or place in the pass has another mask."""
    x, shape = s.ones(s.wide()), s.wide()
    fields: list[dict[str, int]] = [{"seed": 1}, {"seed": 2}, {"seed": 1, "step": 1}]
    if 0 not in s.shared:
        fields.append({"seed": 1, "row_offset": shape[0]})
    masks = []
    for given in fields:
        with s.address(**given):
            masks.append(s.build()(x))
    with s.address(seed=1):
        first, second = s.build(), s.build()
        masks += [first(x), second(x), first(x)][1:]
    named = [*map(str, fields), "the second layer of a pass", "the second call of a pass"]
    for i, one in enumerate(masks):
        for j in range(i):
            expect(not torch.equal(one, masks[j]), f"{named[i]} and {named[j]} have one mask")


@check()
def threads_do_not_disturb_each_other(s: Subject) -> None:
    """Threads that work under addresses of their own get the masks they would get alone."""
    x, _ = rows_of(s)

    def run(step: int, both: Barrier) -> Tensor:
        with s.address(seed=1, step=step):
            both.wait(60)  # now both addresses are open
            y = s.build()(x)
            both.wait(60)  # and stay so until both have drawn
        return y

    alone = [run(step, Barrier(1)) for step in range(8)]
    with ThreadPoolExecutor(2) as pool:
        for step in range(0, 8, 2):
            together = pool.map(run, (step, step + 1), [Barrier(2)] * 2)
            expect(all(map(torch.equal, together, alone[step : step + 2])), "they do not")


@check()
def backward_needs_no_open_address(s: Subject) -> None:
    """The gradient uses the forward's mask when backward runs after, or inside another, address."""
    for elsewhere in (None, {"seed": 2, "step": 1}):
        x = s.ones(s.wide()).requires_grad_()
        with s.address(seed=1):
            y = s.build()(x)
        if elsewhere is None:
            y.sum().backward()
        else:
            with s.address(**elsewhere):
                y.sum().backward()
        assert x.grad is not None
        expect(
            torch.equal(x.grad != 0, s.law.keep_of_ones(y.detach(), s.p)), f"it does not, inside {elsewhere}"
        )


@check()
def member_is_one_function(s: Subject) -> None:
    """A committee member has one mask for all rows and any batch; another member has another."""
    if s.context is None:
        raise NotApplicable("its masks have no address")
    if "member" not in inspect.signature(s.context).parameters:
        raise NotApplicable("its addresses have no members")
    call, shape = s.build(), s.lattice(4, 4096)
    masks = []
    for member in (0, 1):
        with s.address(seed=1, member=member):
            masks.append(s.mask(call=call, shape=shape))
        with s.address(seed=1, member=member):
            one_row = s.mask(call=call, shape=s.lattice(1, 4096))
        if shape[0] > 1:
            expect(bool((masks[-1] == one_row).all()), f"rows of member {member} have masks of their own")
    expect(not torch.equal(*masks), "members 0 and 1 have one mask")
