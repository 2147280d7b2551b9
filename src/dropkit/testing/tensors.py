"""Checks of what comes in and goes out: dtype, device, layout, shape, and whose memory it is."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.testing.registry import check
from dropkit.testing.subject import MANY, NotApplicable, Subject, expect

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@check()
def dtype_is_kept(s: Subject) -> None:
    """float64, float32, float16 and bfloat16 come back as they went in, with values right to their rounding."""
    for dtype in FLOATS:
        y = s.build()(s.ones(s.wide(), dtype))
        expect(y.dtype == dtype, f"{dtype} became {y.dtype}")
        wanted = s.law.apply(s.ones(s.wide(), torch.float64), s.law.keep_of_ones(y, s.p), s.p)
        rounding = 4 * torch.finfo(dtype).eps
        expect(s.close(y.double(), wanted, rounding), f"values are wrong in {dtype}")


@check()
def complex_is_kept(s: Subject) -> None:
    """Complex numbers come back complex, dropped and scaled as a whole."""
    if s.law.name == "alpha":
        raise NotApplicable("alpha dropout is about real numbers")
    for dtype in (torch.complex64, torch.complex128):
        x = torch.complex(s.values(s.wide()), s.values(s.wide()) + 1).to(dtype)
        y = s.build()(x)
        expect(y.dtype == dtype, f"{dtype} became {y.dtype}")
        expect(s.close(y, s.law.apply(x, y != 0, s.p)), "real and imaginary parts have masks of their own")


@check(statistical=True)
def rate_holds_in_half_precision(s: Subject) -> None:
    """The share of dropped elements is p in float16 and bfloat16 too."""
    rates = s.rates(0.01)  # here numbers of 8 bits show: 0.01 becomes 3/256
    for dtype in (torch.float16, torch.bfloat16):
        for p in rates:
            keep = s.law.keep_of_ones(s.build(p)(s.ones(s.wide(MANY), dtype)), p)
            s.judge(int((~keep).sum()), keep.numel(), p, 2 * len(rates), f"dropped in {dtype} at p={p}")


@check()
def mask_is_the_same_in_every_dtype(s: Subject) -> None:
    """Under one seed every dtype gets the same mask."""
    with s.fixed():
        keep = s.wide_mask()
    for dtype in FLOATS:
        with s.fixed():
            other = s.law.keep_of_ones(s.build()(s.ones(s.wide(), dtype)), s.p)
        expect(torch.equal(keep, other), f"{dtype} has another one than float32")


@check()
def device_is_kept(s: Subject) -> None:
    """The output lies where the input lies; on the meta device shape and dtype alone come back."""
    expect(s.build()(s.ones()).device == s.ones().device, "it moved")
    y = s.build()(torch.empty(s.shape, device="meta"))
    expect(
        (y.device.type, tuple(y.shape)) == ("meta", s.shape), f"meta became {y.device.type} {tuple(y.shape)}"
    )


@check()
def shape_and_memory_format_are_kept(s: Subject) -> None:
    """The output has the input's shape and strides: transposed and channels_last inputs too."""
    for name, x in layouts(s):
        y = s.build()(x)
        expect(y.shape == x.shape, f"{name}: shape {tuple(x.shape)} became {tuple(y.shape)}")
        expect(y.stride() == x.stride(), f"{name}: strides {x.stride()} became {y.stride()}")


@check()
def mask_follows_logical_order(s: Subject) -> None:
    """Under one seed the mask does not depend on how the input lies in memory."""
    for name, x in layouts(s):
        with s.fixed():
            keep = s.law.keep_of_ones(s.build()(torch.ones_like(x).contiguous()), s.p)
        with s.fixed():
            y = s.build()(x)
        expect(s.close(y, s.law.apply(x, keep, s.p)), f"{name}: another mask than the contiguous input's")


def layouts(s: Subject) -> list[tuple[str, Tensor]]:
    """Inputs of one shape whose memory is dense but in other orders."""
    shape = tuple(max(size, 4) for size in s.wide())
    found = []
    if len(shape) >= 2:
        swapped = (*shape[:-2], shape[-1], shape[-2])
        found.append(("transposed", s.values(swapped).transpose(-1, -2)))
        back = (*shape[1:], shape[0])
        found.append(("rows last in memory", s.values(back).permute(len(shape) - 1, *range(len(shape) - 1))))
    if len(shape) == 4:
        found.append(("channels_last", s.values(shape).contiguous(memory_format=torch.channels_last)))
    if not s.shared and not any(name == "channels_last" for name, _ in found):
        four = s.values((4, 6, 5, 3)).contiguous(memory_format=torch.channels_last)
        found.append(("channels_last", four))
    if not found:
        raise NotApplicable("one dim has one layout")
    return found


@check()
def non_contiguous_input_is_right(s: Subject) -> None:
    """Slices, steps and expanded inputs give the values of their contiguous copies."""
    shape = tuple(max(size, 3) for size in s.wide())
    doubled = s.values(tuple(2 * size for size in shape))
    strided = doubled[tuple(slice(1, None, 2) for _ in shape)]
    inner = doubled[tuple(slice(1, size + 1) for size in shape)]
    expanded = s.values((1, *shape[1:])).expand(shape)
    for name, x in (("every second", strided), ("inner part", inner), ("expanded", expanded)):
        x = x.detach().requires_grad_()
        y = s.build()(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        keep = gradient != 0
        expect(
            s.close(y, s.law.apply(x.detach(), keep, s.p)), f"{name}: values are not those of forward's mask"
        )
        expect(not bool(keep.all()), f"{name}: nothing was dropped")


@check()
def scalar_and_empty_inputs_work(s: Subject) -> None:
    """A 0-d input gives 0-d output, an empty one empty output; both with gradients."""
    empty = tuple(0 if dim == 0 else size for dim, size in enumerate(s.shape))
    shapes = [empty] if s.shared else [(), (0,), empty, (3, 0, 2)]
    for shape in shapes:
        x = s.ones(shape).requires_grad_()
        y = s.build()(x)
        expect(tuple(y.shape) == shape, f"{shape} became {tuple(y.shape)}")
        y.sum().backward()
        expect(x.grad is not None and tuple(x.grad.shape) == shape, f"no gradient at shape {shape}")


@check()
def inplace_writes_into_its_input(s: Subject) -> None:
    """With inplace the very tensor that went in comes out, and its gradient is right."""
    call = s.build(inplace=True)
    x = s.ones(s.wide())
    y = call(x)
    expect(y.data_ptr() == x.data_ptr() and torch.equal(x, y), "the input was not written")
    keep = s.law.keep_of_ones(y, s.p)
    expect(not bool(keep.all()), "nothing was dropped")
    leaf = s.ones(s.wide()).requires_grad_()
    y = call(leaf * 1)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    wanted = s.law.keep_of_ones(y.detach(), s.p) * s.law.slope(s.p)
    expect(s.close(gradient, wanted), "the gradient is another mask's")


@check()
def inplace_on_a_part_leaves_the_rest(s: Subject) -> None:
    """With inplace on a non-contiguous view just the view is written."""
    call = s.build(inplace=True)
    shape = tuple(2 * max(size, 3) for size in s.wide())
    whole = s.values(shape)
    before, part = whole.clone(), tuple(slice(0, None, 2) for _ in shape)
    call(whole[part])
    outside = torch.ones(shape, dtype=torch.bool)
    outside[part] = False
    expect(torch.equal(whole[outside], before[outside]), "its neighbours changed")
    expect(not torch.equal(whole[part], before[part]), "the view was not written")


@check()
def input_is_left_alone(s: Subject) -> None:
    """Without inplace the input keeps its values and shares no memory with what training returns."""
    x = s.values(s.wide())
    before, version = x.clone(), x._version
    y = s.build()(x)
    expect(torch.equal(x, before) and x._version == version, "the input was written")
    expect(
        y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(),
        "the output lies in the input's memory",
    )
