"""Checks under torch.func and the compilers: vmap, grad, jvp, torch.compile, torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropkit.testing.registry import check
from dropkit.testing.subject import Call, NotApplicable, Subject, expect


@check(statistical=True)
def vmap_different_draws_anew(s: Subject) -> None:
    """torch.func.vmap with randomness="different" gives each entry an independent mask, at rate p."""
    x = s.ones((64, *s.wide()))
    y = torch.func.vmap(s.build(), randomness="different")(x)
    expect(y.shape == x.shape, f"shape {tuple(x.shape)} became {tuple(y.shape)}")
    dropped = ~s.law.keep_of_ones(y, s.p)
    s.judge(int(dropped.sum()), dropped.numel(), s.p, 2, "dropped")
    both = dropped[0::2] & dropped[1::2]
    s.judge(int(both.sum()), both.numel(), s.p**2, 2, "neighbouring entries, both dropped")


@check()
def vmap_same_shares_one_mask(s: Subject) -> None:
    """torch.func.vmap with randomness="same" gives all entries one mask, which is not constant itself."""
    y = torch.func.vmap(s.build(), randomness="same")(s.ones((4, *s.wide())))
    keep = s.law.keep_of_ones(y, s.p)
    expect(bool((keep == keep[:1]).all()), "entries have masks of their own")
    expect(bool(keep.any()) and not bool(keep.all()), "the mask is constant")


@check()
def vmap_of_the_gradient_is_right(s: Subject) -> None:
    """Per-example gradients, vmap(grad(f)), use each example's own forward mask."""

    def loss(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        y = call(x)
        return y.sum(), y

    call, x = s.build(), s.ones((4, *s.wide()))
    gradient = torch.func.grad(lambda one: loss(one, call), has_aux=True)
    gradients, y = torch.func.vmap(gradient, randomness="different")(x)
    expect(s.close(gradients, s.law.keep_of_ones(y, s.p) * s.law.slope(s.p)), "they use another one")


@check()
def func_grad_is_right(s: Subject) -> None:
    """torch.func.grad, also of grad, uses the forward mask."""
    call, x = s.build(), s.ones(s.wide(), torch.float64)

    def loss(one: Tensor) -> tuple[Tensor, Tensor]:
        y = call(one)
        return (y**2).sum(), y

    gradient, y = torch.func.grad(loss, has_aux=True)(x)
    slope = s.law.keep_of_ones(y, s.p) * s.law.slope(s.p)
    expect(s.close(gradient, 2 * y * slope), "it uses another one")
    with s.fixed():
        y = call(x)
    slope = s.law.keep_of_ones(y, s.p) * s.law.slope(s.p)
    with s.fixed():
        second = torch.func.grad(lambda one: torch.func.grad(lambda h: loss(h)[0])(one).sum())(x)
    expect(s.close(second, 2 * slope**2), "grad of grad uses another one")


@check()
def func_jvp_is_right(s: Subject) -> None:
    """torch.func.jvp and vjp use the forward mask."""
    call, x, tangent = s.build(), s.ones(s.wide()), s.values(s.wide())
    pushed: Any = torch.func.jvp(call, (x,), (tangent,))
    y, forward = pushed
    expect(s.close(forward, tangent * s.law.keep_of_ones(y, s.p) * s.law.slope(s.p)), "jvp uses another one")
    pulled: Any = torch.func.vjp(call, x)
    y, pullback = pulled
    expect(
        s.close(pullback(tangent)[0], tangent * s.law.keep_of_ones(y, s.p) * s.law.slope(s.p)),
        "vjp uses another one",
    )


def compiled(call: Call, backend: str) -> Any:
    """The call compiled without graph breaks."""
    torch._dynamo.reset()
    return torch.compile(lambda x: call(x) * 1.0, fullgraph=True, backend=backend)


@check(slow=True)
def compiles_without_a_graph_break(s: Subject) -> None:
    """torch.compile(fullgraph=True) takes it, and the gradient uses the compiled forward's mask."""
    x = s.ones(s.wide()).requires_grad_()
    y = compiled(s.build(), "inductor")(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    keep = s.law.keep_of_ones(y.detach(), s.p)
    expect(not bool(keep.all()), "nothing was dropped")
    expect(s.close(gradient, keep * s.law.slope(s.p)), "the gradient is another mask's")


@check(slow=True)
def compiled_masks_are_the_eager_ones(s: Subject) -> None:
    """Under one seed, or one address, compiled code draws the masks of eager code."""
    call, shape = s.build(), s.wide()
    fast, masks = compiled(call, "inductor"), []
    for one in (call, fast):
        with s.fixed():
            masks.append(s.mask(call=one, shape=shape))
    expect(torch.equal(*masks), "it draws others")


@check(slow=True)
def compiled_calls_differ(s: Subject) -> None:
    """Compiled code draws a new mask in each call."""
    fast, shape = compiled(s.build(), "inductor"), s.wide()
    first = s.mask(call=fast, shape=shape)
    expect(not torch.equal(first, s.mask(call=fast, shape=shape)), "it draws the same one again")


@check(slow=True)
def export_of_evaluation_leaves_nothing(s: Subject) -> None:
    """torch.export in evaluation gives a graph in which it does nothing."""
    if s.law.name == "classic":
        raise NotApplicable("classic dropout scales in evaluation")
    model = torch.nn.Sequential(s.module()).eval()
    x = s.values()
    program = torch.export.export(model, (x,))
    expect(torch.equal(program.module()(x), x), "values changed")
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    left = [
        name for name in called if not any(word in name for word in ("dropout", "alias", "clone", "detach"))
    ]
    expect(not left, f"the graph calls {left}")
