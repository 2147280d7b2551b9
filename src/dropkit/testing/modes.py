"""Checks of when a dropout acts: training, evaluation, and without gradients."""

from __future__ import annotations

import torch

from dropkit.testing.registry import check
from dropkit.testing.subject import NotApplicable, Subject, expect


@check()
def evaluation_is_the_identity(s: Subject) -> None:
    """In evaluation the values come back exactly as they were, the same on every call."""
    call, x = s.build(training=False), s.values()
    scale = 1 - s.p if s.law.name == "classic" else 1.0
    for _ in range(2):
        expect(torch.equal(call(x), x * scale), "values changed")


@check()
def evaluation_passes_gradients_through(s: Subject) -> None:
    """In evaluation the gradient is 1."""
    x = s.values().requires_grad_()
    (gradient,) = torch.autograd.grad(s.build(training=False)(x).sum(), x)
    scale = 1 - s.p if s.law.name == "classic" else 1.0
    expect(torch.equal(gradient, torch.full_like(x, scale)), "it is not")


@check()
def evaluation_leaves_the_generator_alone(s: Subject) -> None:
    """In evaluation nothing is drawn from torch's generator."""
    call, before = s.build(training=False), torch.get_rng_state()
    call(s.ones())
    expect(torch.equal(before, torch.get_rng_state()), "it moved")


@check()
def training_switch_is_obeyed(s: Subject) -> None:
    """train() drops, eval() does not, train() drops again, also from within a parent module."""
    layer = s.module()
    parent, x = torch.nn.Sequential(layer), s.ones(s.wide())
    acted = [not torch.equal(parent.train(mode)(x), x) for mode in (True, False, True)]
    expect(acted == [True, False, True], f"acted in train, eval, train: {acted}")


@check()
def drops_without_gradients_too(s: Subject) -> None:
    """Training mode drops under torch.no_grad and torch.inference_mode as elsewhere."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            keep = s.wide_mask()
        expect(not bool(keep.all()), f"nothing was dropped under {mode.__name__}")


@check()
def mask_is_the_same_with_and_without_gradients(s: Subject) -> None:
    """Under one seed the mask is the same whether or not gradients are recorded."""
    shape, masks = s.wide(), []
    for wanted in (False, True):
        with s.fixed():
            y = s.build()(s.ones(shape).requires_grad_(wanted))
        masks.append(s.law.keep_of_ones(y.detach(), s.p))
    expect(torch.equal(*masks), "it is not")


@check()
def autocast_keeps_the_dtype(s: Subject) -> None:
    """Under autocast the output has the input's dtype, and the masks act."""
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(s.device.type, dtype=torch.bfloat16):
            y = s.build()(s.ones(s.wide(), dtype))
        expect(y.dtype == dtype, f"{dtype} became {y.dtype}")
        expect(not bool(s.law.keep_of_ones(y, s.p).all()), "nothing was dropped")


@check()
def noise_can_be_had_in_evaluation_only_if_asked(s: Subject) -> None:
    """An open address alone does not switch evaluation to noise."""
    if s.context is None:
        raise NotApplicable("its masks have no address")
    x = s.values()
    with s.address(seed=0):
        expect(torch.equal(s.build(training=False)(x), x), "values changed")
