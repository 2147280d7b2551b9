"""Checks of derivatives: the mask of the forward pass is the mask of every derivative, and nothing is kept for it."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dropkit.testing.registry import check
from dropkit.testing.subject import Broken, Call, NotApplicable, Subject, expect


def slopes(s: Subject, keep: Tensor) -> Tensor:
    """The derivative of each output by its own input."""
    return keep * s.law.slope(s.p)


@check()
def backward_uses_the_mask_of_forward(s: Subject) -> None:
    """The gradient is the incoming one times mask and scale: the mask that was seen in the output."""
    x = s.ones(s.wide()).requires_grad_()
    y = s.build()(x)
    incoming = s.values(s.wide())
    (gradient,) = torch.autograd.grad(y, x, incoming)
    wanted = incoming * slopes(s, s.law.keep_of_ones(y.detach(), s.p))
    off = int(s.differing(gradient, wanted).sum())
    expect(off == 0, f"{off} of {x.numel()} gradients are another mask's")


@check()
def second_backward_uses_it_too(s: Subject) -> None:
    """A retained graph gives the same gradient again."""
    x = s.ones(s.wide()).requires_grad_()
    y = s.build()(x).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    expect(torch.equal(first, second), "it does not")


@check()
def dropped_nan_has_no_gradient(s: Subject) -> None:
    """Where a NaN or infinity was dropped the gradient is 0."""
    shape = s.wide()
    with s.fixed():
        keep = s.wide_mask()
    for value in (math.nan, math.inf):
        x = torch.full_like(s.ones(shape), value).requires_grad_()
        with s.fixed():
            y = s.build()(x)
        (gradient,) = torch.autograd.grad(y, x, s.ones(shape))
        expect(not bool(gradient[~keep].any()), f"a dropped {value} has gradient {gradient[~keep][0].item()}")


@check()
def dropped_element_stops_any_gradient(s: Subject) -> None:
    """An infinite or NaN gradient that comes in at a dropped element goes no further."""
    for value in (math.nan, math.inf):
        x = s.ones(s.wide()).requires_grad_()
        y = s.build()(x)
        (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, value))
        through = gradient[~s.law.keep_of_ones(y.detach(), s.p)]
        expect(not bool(through.any()), f"an incoming {value} went on as {through[0].item()}")


@check()
def double_backward_is_right(s: Subject) -> None:
    """The second derivative of a function behind it uses the same mask."""
    x = s.ones(s.wide(), torch.float64).requires_grad_()
    y = s.build()(x)
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    seen = y.detach()
    wanted = 6 * seen * slopes(s, s.law.keep_of_ones(seen, s.p)) ** 2
    expect(s.close(second, wanted), "it does not")


@check()
def gradcheck_passes(s: Subject) -> None:
    """torch's numerical test of first and second derivatives agrees, under a fixed seed."""
    sizes = tuple(min(size, 4) for size in s.shape)

    def call(x: Tensor) -> Tensor:
        with s.fixed():
            return s.build()(x)

    x = s.values(sizes, torch.float64).requires_grad_()
    with s.fixed():
        pass  # says early that nothing fixes the masks
    torch.autograd.gradcheck(call, (x,))
    torch.autograd.gradgradcheck(call, (x,))


@check()
def forward_mode_is_right(s: Subject) -> None:
    """Forward-mode derivatives use the mask of the values."""
    x, tangent = s.ones(s.wide()), s.values(s.wide())
    with forward_ad.dual_level():
        y, seen = forward_ad.unpack_dual(s.build()(forward_ad.make_dual(x, tangent)))
        expect(seen is not None, "no tangent came out")
        expect(s.close(seen, tangent * slopes(s, s.law.keep_of_ones(y, s.p))), "they use another one")


def tensor_storages() -> dict[int, int]:
    """Bytes of every tensor's storage that Python can reach, by address."""
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor or type(thing) is torch.nn.Parameter:
            try:
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            except (
                RuntimeError,
                NotImplementedError,
            ):  # fake, sparse and functorch's tensors have no storage
                continue
    return sizes


def kept_bytes(s: Subject, elements: int) -> int:
    """What autograd or the layer holds between forward and backward beside input and output."""
    shape = s.wide(elements)
    x = s.ones(shape).requires_grad_()
    call = s.build()
    call(x)  # a first call may set up what stays for good
    before = tensor_storages()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)
    stashed = {at: size for at, size in tensor_storages().items() if at not in before}
    return sum({**stashed, **saved, y.untyped_storage().data_ptr(): 0}.values())


@check()
def nothing_is_kept_for_backward(s: Subject) -> None:
    """Between forward and backward no mask, copy or input is held: what is kept does not grow with the input."""
    gc.collect()
    small, large = kept_bytes(s, 1 << 14), kept_bytes(s, 1 << 17)
    per_element = (large - small) / ((1 << 17) - (1 << 14))
    expect(per_element < 0.01, f"{per_element:.3g} bytes are kept for each element of the mask")


def checkpointed_gradient(s: Subject, call: Call, reentrant: bool) -> str | None:
    """What is wrong with the gradient through a checkpointed dropout, if anything."""
    x = s.ones(s.wide()).requires_grad_()
    weight = s.ones(s.wide()).requires_grad_()
    y: Any = checkpoint(lambda h: call(h * weight) * 2, x, use_reentrant=reentrant)
    wanted = 2 * slopes(s, s.law.keep_of_ones(y.detach() / 2, s.p))
    torch.manual_seed(99)  # the generator moves on between forward and backward, as in training
    y.sum().backward()
    for name, gradient in (("input", x.grad), ("weight", weight.grad)):
        if gradient is None:
            return f"no gradient reached the {name}"
        if off := int(s.differing(gradient, wanted).sum()):
            return f"{off} of {x.numel()} gradients of the {name} are another mask's"
    return None


@check()
def checkpoint_gives_the_plain_gradient(s: Subject) -> None:
    """Activation checkpointing (use_reentrant=False) computes the same mask again."""
    wrong = checkpointed_gradient(s, s.build(), reentrant=False)
    expect(wrong is None, str(wrong))


@check()
def reentrant_checkpoint_gives_the_plain_gradient(s: Subject) -> None:
    """The older kind of activation checkpointing (use_reentrant=True) computes the same mask again."""
    wrong = checkpointed_gradient(s, s.build(), reentrant=True)
    expect(wrong is None, str(wrong))


@check()
def checkpoint_under_an_address_is_never_silently_wrong(s: Subject) -> str | None:
    """Under an address, checkpointing gives the plain gradient or refuses, whether or not the address is still open."""
    remarks = []
    for reentrant in (False, True):
        for still_open in (True, False):
            where = f"use_reentrant={reentrant}, address {'open' if still_open else 'closed'} in backward"
            try:
                wrong = checkpoint_under_address(s, reentrant, still_open)
            except NotApplicable:
                raise
            except Exception as error:  # a refusal of any kind
                remarks.append(f"{where}: refused ({type(error).__name__})")
                continue
            if wrong is not None:
                raise Broken(f"{where}: {wrong}")
    return "; ".join(remarks) or None


def checkpoint_under_address(s: Subject, reentrant: bool, still_open: bool) -> str | None:
    """What is wrong with a gradient that is computed inside or after the address of its forward pass."""
    x, call = s.ones(s.wide()).requires_grad_(), s.build()
    with s.address(seed=3, step=5):
        y: Any = checkpoint(call, x, use_reentrant=reentrant)
        keep = s.law.keep_of_ones(y.detach(), s.p)
        if still_open:
            y.sum().backward()
    if not still_open:
        y.sum().backward()
    assert x.grad is not None
    off = int(s.differing(x.grad, slopes(s, keep)).sum())
    return f"{off} of {x.numel()} gradients are another mask's" if off else None
