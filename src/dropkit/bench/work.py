"""What is timed: a forward pass, alone or with its backward pass; and the check that both sides do the same work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropkit.errors import BrokenContractError

Function = Callable[[Tensor], Tensor]
FALSE_ALARM = 1e-9  # of one check of a kept share
NOT_TIMED = ". Nothing was timed: a figure for other work would mislead."


@dataclass(frozen=True, slots=True)
class Work:
    """One side of a comparison.

    Attributes:
        forward: gives the result.
        inputs: differentiated in the backward pass; none: forward alone.
        gradient: that of the result, or None: forward alone.
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...] = ()
    gradient: Tensor | None = None

    def backward(self, result: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs, in new tensors."""
        return torch.autograd.grad(result, self.inputs, self.gradient)

    def run(self) -> tuple[Tensor, ...]:
        """The result, and the gradients where they are asked for."""
        result = self.forward()
        return (result, *self.backward(result)) if self.gradient is not None else (result,)

    @property
    def timed(self) -> Callable[[], object]:
        """What the clock sees."""
        return self.forward if self.gradient is None else self.run


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides, on the same input.

    Attributes:
        ours, peer: the work.
        check: raises BrokenContractError unless both did what they are timed for.
        elements: of the input, for figures by element.
    """

    ours: Work
    peer: Work
    check: Callable[[], None]
    elements: int


def positive(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """(*shape) in [0.5, 1.5): no element is 0, so that a 0 in the result was dropped."""
    return torch.empty(tuple(shape), dtype=torch.float32).uniform_(0.5, 1.5).to(dtype)


def require(holds: bool, side: str, what: str) -> None:
    """Refuse to time what is wrong.

    Raises:
        BrokenContractError: it does not hold.
    """
    if not holds:
        raise BrokenContractError(f"{side}: {what}{NOT_TIMED}")


def check_dropped(
    work: Work, x: Tensor, p: float, shared: Sequence[int], side: str, tolerance: float = 1e-4
) -> None:
    """Check that the work is dropout of x at rate p, forward and backward.

    y = x * keep / (1 - p),    gradient = g * keep / (1 - p),    |mean of keep - (1 - p)| <= sqrt(log(2 / a) / (2 n))

    with the chance of a false alarm a below 1e-9 for n mask elements (Hoeffding).

    Args:
        work: as timed.
        x: its input, positive.
        p: chance to drop.
        shared: dims along which one mask serves all.
        side: "ours" or the peer's name, for the error.
        tolerance: relative, of values; a rate rounded to 2**-16 moves the scale by less than 2e-5.
    """
    result, *gradients = work.run()
    tolerance = max(tolerance, 2 * torch.finfo(x.dtype).eps)
    keep = result != 0
    sizes = [1 if dim in shared else size for dim, size in enumerate(x.shape)]
    mask = keep.to(torch.float64)
    for dim in shared:
        mask = mask.mean(dim=dim, keepdim=True)
    allowed = math.sqrt(math.log(2 / FALSE_ALARM) / (2 * math.prod(sizes)))
    share = float(mask.mean())
    require(
        result.shape == x.shape and result.dtype == x.dtype, side, "another shape or dtype than the input"
    )
    require(
        bool(((mask == 0) | (mask == 1)).all()), side, f"the mask is not constant along dims {tuple(shared)}"
    )
    require(abs(share - (1 - p)) <= allowed, side, f"kept {share:.4f} of the input instead of {1 - p:.4f}")
    for name, value, source in (
        ("result", result, x),
        *(("gradient", g, work.gradient) for g in gradients),
    ):
        wanted = source.detach().double() * keep / (1 - p) if source is not None else value
        require(
            torch.allclose(value.detach().double(), wanted, rtol=tolerance, atol=0.0),
            side,
            f"the {name} is not its source / (1 - p) where kept and 0 where dropped",
        )


def dropping(
    ours: Function,
    peer: Function,
    shape: Sequence[int],
    p: float,
    *,
    dtype: torch.dtype = torch.float32,
    shared: Sequence[int] = (),
    backward: bool,
    grad: bool = True,
) -> Pair:
    """Two forms of dropout on one input.

    Args:
        ours, peer: x -> dropout of x at rate p.
        shape: of x.
        p: chance to drop.
        dtype: of x.
        shared: dims along which one mask serves all.
        backward: whether the backward pass is timed as well.
        grad: whether x requires gradients.
    """
    x = positive(shape, dtype).requires_grad_(grad)
    inputs, gradient = ((x,), positive(shape, dtype)) if backward else ((), None)
    left, right = (Work(lambda f=f: f(x), inputs, gradient) for f in (ours, peer))  # type: ignore[misc]

    def check() -> None:
        for side, work in (("ours", left), ("the peer", right)):
            check_dropped(work, x, p, shared, side)

    return Pair(left, right, check, x.numel())


def against_multiply(ours: Function, shape: Sequence[int], p: float) -> Pair:
    """Dropout against the pass over memory that nothing elementwise can beat: x * 2, out of place."""
    x = positive(shape)
    left, right = Work(lambda: ours(x)), Work(lambda: x * 2.0)

    def check() -> None:
        check_dropped(left, x, p, (), "ours")
        require(torch.equal(right.run()[0], x + x), "the peer", "x * 2 is not x + x")

    return Pair(left, right, check, x.numel())


Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attending(ours: Attention, peer: Attention, shape: Sequence[int], p: float, peer_p: float) -> Pair:
    """Attention with dropout, forward and backward, against torch's with or without dropout.

    The check: at p = 0 both agree to 1e-4, result and gradients; at p, the mean over all results lies where it did
    within ten standard errors, and the results are not those without dropout.

    Args:
        ours, peer: (q, k, v, p) -> attention.
        shape: (B, H, L, D) of q, k and v.
        p: chance to drop a weight.
        peer_p: the same of the peer.
    """
    q, k, v = (torch.randn(tuple(shape)).requires_grad_() for _ in range(3))
    gradient = torch.randn(tuple(shape))

    def work(attention: Attention, rate: float) -> Work:
        return Work(lambda: attention(q, k, v, rate), (q, k, v), gradient)

    def check() -> None:
        plain = work(peer, 0.0).run()
        for mine, theirs in zip(work(ours, 0.0).run(), plain, strict=True):
            require(
                torch.allclose(mine, theirs, atol=1e-4), "ours", "attention without dropout is not torch's"
            )
        for side, form, rate in (("ours", ours, p), ("the peer", peer, peer_p)):
            result = work(form, rate).run()[0]
            moved = (result - plain[0]).detach()
            error = float(moved.std()) / math.sqrt(moved.numel())
            require(result.shape == q.shape and result.dtype == q.dtype, side, "another shape or dtype")
            require((float(moved.abs().max()) > 0) == (rate > 0), side, f"p={rate} does not act")
            require(abs(float(moved.mean())) <= 10 * math.sqrt(shape[2]) * error, side, "the mean has moved")

    return Pair(work(ours, p), work(peer, peer_p), check, q.numel())
