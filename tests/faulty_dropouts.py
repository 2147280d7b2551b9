"""Dropouts that are wrong in one way each, and one that is sound: what the public checks have to tell apart."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function


class Sound(nn.Module):
    """Dropout written plainly; it keeps its mask for backward, and is right otherwise."""

    def __init__(self, p: float = 0.3, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}")
        self.p, self.inplace = p, inplace

    def draw(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape, dtype=torch.float64, device=x.device)

    def keep(self, x: Tensor) -> Tensor:
        return self.draw(x) >= self.p

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        return (x * self.scale).masked_fill_(~keep, 0)  # in place: in the layout of x

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        y = self.apply_mask(x, self.keep(x))
        return x.copy_(y) if self.inplace else y

    def extra_repr(self) -> str:
        return f"p={self.p}"


# --- values --------------------------------------------------------------------------------------------


class ForgetsTheScale(Sound):
    scale = 1.0


class DropsWhatItShouldKeep(Sound):
    def keep(self, x):
        return self.draw(x) < self.p


class EightBitThreshold(Sound):
    def keep(self, x):
        return self.draw(x) * 256 >= math.ceil(self.p * 256)


class SixteenBitThreshold(Sound):
    def keep(self, x):
        return self.draw(x) * 65536 >= round(self.p * 65536)


class SparesTheLastColumn(Sound):
    def keep(self, x):
        keep = self.draw(x) >= self.p
        if keep.ndim:
            keep[..., -1] = True
        return keep


class SparesTheFirstRow(Sound):
    def keep(self, x):
        keep = self.draw(x) >= self.p
        keep[:1] = True
        return keep


class ScalesByTheKeptShare(Sound):
    def apply_mask(self, x, keep):
        return x * keep / keep.double().mean()


class DropsHalfAsOften(Sound):
    def keep(self, x):
        return self.draw(x) >= self.p / 2

    @property
    def scale(self):
        return 1 / (1 - self.p / 2)


class DropsWholeRows(Sound):
    def keep(self, x):
        return (self.draw(x[:, :1]) >= self.p).expand(x.shape)


class OneMaskForAllRows(Sound):
    def keep(self, x):
        return (self.draw(x[:1]) >= self.p).expand(x.shape)


class ScalesALittleAtZero(Sound):
    @property
    def scale(self):
        return 1 / (1 - self.p) + 1e-6


class DividesByZeroAtOne(Sound):
    def apply_mask(self, x, keep):
        return x * keep / torch.tensor(1 - self.p)


class TakesAnyRate(Sound):
    def __init__(self, p: float = 0.3, inplace: bool = False) -> None:
        super().__init__(min(max(p, 0.0), 1.0), inplace)


class MultipliesByZero(Sound):
    def apply_mask(self, x, keep):
        return x * (keep * self.scale).to(x.dtype)


class SparesTheNegative(Sound):
    def keep(self, x):
        return (self.draw(x) >= self.p) | (x < 0)


class DrawsAnewForEachRate(Sound):
    def keep(self, x):
        return (self.draw(x) + 5 * self.p) % 1 >= self.p


# --- modes ---------------------------------------------------------------------------------------------


class IgnoresEval(Sound):
    def forward(self, x):
        return self.apply_mask(x, self.keep(x))


class DetachesInEval(Sound):
    def forward(self, x):
        return super().forward(x) if self.training else x.detach().requires_grad_()


class DrawsInEval(Sound):
    def forward(self, x):
        keep = self.keep(x)
        return self.apply_mask(x, keep) if self.training else x


class RestsWithoutGradients(Sound):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else x


class DrawsTwiceForGradients(Sound):
    def keep(self, x):
        if x.requires_grad:
            self.draw(x)
        return super().keep(x)


class LowersUnderAutocast(Sound):
    def forward(self, x):
        return super().forward(x).bfloat16() if torch.is_autocast_enabled("cpu") else super().forward(x)


# --- gradients -----------------------------------------------------------------------------------------


class _OtherMaskBackward(Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return x * (torch.rand(x.shape) >= p) / (1 - p)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (torch.rand(gradient.shape) >= ctx.p) / (1 - ctx.p), None


class DrawsAnewInBackward(Sound):
    def forward(self, x):
        return _OtherMaskBackward.apply(x, self.p) if self.training else x


class _SeededFunction(Function):
    """Recomputes its mask from a seed; `scale_only`, `stash` plant faults."""

    @staticmethod
    def mask(seed, shape, p):
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p

    @staticmethod
    def forward(ctx, x, p, stash):
        ctx.p, ctx.seed, ctx.shape = p, int(torch.randint(2**40, ())), x.shape
        keep = _SeededFunction.mask(ctx.seed, x.shape, p)
        if stash == "saved":
            ctx.save_for_backward(keep)
        elif stash == "hidden":
            ctx.keep = keep
        return x * keep / (1 - p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * _SeededFunction.mask(ctx.seed, ctx.shape, ctx.p) / (1 - ctx.p), None, None


class KeepsNothing(Sound):
    """Sound for what is kept, alone: its backward can be taken once, and only in reverse mode."""

    stash = ""

    def forward(self, x):
        return _SeededFunction.apply(x, self.p, self.stash) if self.training else x


class SavesItsMask(KeepsNothing):
    stash = "saved"


class HidesItsMask(KeepsNothing):
    stash = "hidden"


class RemembersItsInput(KeepsNothing):
    def forward(self, x):
        self.last = [x * 1]
        return super().forward(x)


class DropsAFinishedNaN(Sound):
    def apply_mask(self, x, keep):
        return torch.where(keep, x * x / x * self.scale, torch.zeros((), dtype=x.dtype))


class OwnGenerator(Sound):
    generator = np.random.default_rng(1)

    def draw(self, x):
        return torch.from_numpy(np.asarray(self.generator.random(tuple(x.shape))))


# --- tensors -------------------------------------------------------------------------------------------


class ReturnsFloat32(Sound):
    def apply_mask(self, x, keep):
        return super().apply_mask(x.float(), keep)


class DropsRealAndImaginaryApart(Sound):
    def apply_mask(self, x, keep):
        if not x.is_complex():
            return super().apply_mask(x, keep)
        other = self.keep(x)
        return torch.complex(x.real * keep, x.imag * other) * self.scale


class DrawsInTheInputsPrecision(Sound):
    def draw(self, x):
        return torch.rand(x.shape, dtype=x.real.dtype, device=x.device)


class NeedsMemory(Sound):
    def draw(self, x):
        return torch.from_numpy(np.ones_like(x.detach().numpy(), dtype=np.float64)) * super().draw(x)


class ReturnsContiguous(Sound):
    def apply_mask(self, x, keep):
        return super().apply_mask(x, keep).contiguous()


class FollowsStrides(Sound):
    def draw(self, x):
        return torch.empty_like(x, dtype=torch.float64).uniform_()


class TakesMemoryForContiguous(Sound):
    def apply_mask(self, x, keep):
        return super().apply_mask(x.as_strided(x.shape, torch.empty(x.shape).stride()), keep)


class NeedsTwoDims(Sound):
    def keep(self, x):
        return super().keep(x.reshape(len(x), -1)).reshape(x.shape)


class IgnoresInplace(Sound):
    def forward(self, x):
        return self.apply_mask(x, self.keep(x)) if self.training else x


class WritesNeighbours(Sound):
    def forward(self, x):
        y = super().forward(x)
        if self.inplace:
            x.as_strided((x.numel(),), (1,)).mul_(0.5)
        return y


class WritesItsInput(Sound):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            with torch.no_grad():
                x.mul_(0.5)
        return y


# --- draws ---------------------------------------------------------------------------------------------


class SameMaskForEver(Sound):
    def draw(self, x):
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class KeepsLeftoverBits(Sound):
    """Draws two masks at once and hands out the second on the next call, whatever became of the generator."""

    def __init__(self, p: float = 0.3, inplace: bool = False) -> None:
        super().__init__(p, inplace)
        self.left: list[Tensor] = []

    def draw(self, x):
        if self.left and self.left[0].shape == x.shape:
            return self.left.pop()
        first, second = torch.rand((2, *x.shape), dtype=torch.float64)
        self.left = [second]
        return first


class GroupsOfFour(Sound):
    def draw(self, x):
        return super().draw(x[..., ::4]).repeat_interleave(4, dim=-1)[..., : x.shape[-1]]


class PairsOfRows(Sound):
    def draw(self, x):
        return super().draw(x[::2]).repeat_interleave(2, dim=0)[: len(x)]


class HalfOfTheLastMask(Sound):
    last = torch.empty(0)

    def draw(self, x):
        drawn = super().draw(x)
        if self.last.shape == drawn.shape:
            drawn[..., ::2] = self.last[..., ::2]
        self.last = drawn
        return drawn


class HalvesTheSeed(Sound):
    def draw(self, x):
        generator = torch.Generator().manual_seed(torch.initial_seed() // 2)
        return torch.rand(x.shape, generator=generator, dtype=torch.float64)


class FixedCountInEachRow(Sound):
    def draw(self, x):
        return super().draw(x).argsort(dim=-1).argsort(dim=-1).double() / x.shape[-1]


# --- modules -------------------------------------------------------------------------------------------


class HasABuffer(Sound):
    def __init__(self, p: float = 0.3, inplace: bool = False) -> None:
        super().__init__(p, inplace)
        self.register_buffer("factor", torch.ones(1))

    def apply_mask(self, x, keep):
        return super().apply_mask(x, keep) * self.factor


class CannotBeCopied(Sound):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


class HoldsALambda(Sound):
    def __init__(self, p: float = 0.3, inplace: bool = False) -> None:
        super().__init__(p, inplace)
        self.function = lambda x: x


class SaysNothing(Sound):
    def extra_repr(self):
        return ""


# --- masks with an address -----------------------------------------------------------------------------

_open: list[toy_address] = []
_numbers = itertools.count()


class toy_address(contextlib.AbstractContextManager):
    """An address made of Python's hash; slow, and right."""

    def __init__(self, seed=0, step=0, row_offset=0, samples=None) -> None:
        self.seed, self.step, self.row_offset, self.samples = seed, step, row_offset, samples
        self.calls = itertools.count()

    def __enter__(self):
        _open.append(self)
        return self

    def __exit__(self, *error):
        _open.pop()


class Addressed(Sound):
    """Each row of an address has bits of its own."""

    def rows(self, where: toy_address, x: Tensor) -> list[int]:
        ids = (
            where.samples if where.samples is not None else range(where.row_offset, where.row_offset + len(x))
        )
        return [int(i) for i in ids]

    def key(self, where: toy_address, call: int, row: int) -> tuple[int, ...]:
        return (where.seed, where.step, call, row)

    def draw(self, x):
        if not _open:
            return super().draw(x)
        where, call = _open[-1], next(_open[-1].calls)
        keys = [abs(hash(self.key(where, call, row))) % 2**62 for row in self.rows(where, x)]
        drawn = [
            torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            for k in keys
        ]
        return torch.stack(drawn) if drawn else torch.empty(x.shape, dtype=torch.float64)


class CountsFromTheBatch(Addressed):
    def rows(self, where, x):
        return list(range(len(x)))


class KnowsPositionsOnly(Addressed):
    def rows(self, where, x):
        return list(range(where.row_offset, where.row_offset + len(x)))


class RemembersHistory(Addressed):
    def key(self, where, call, row):
        return (*super().key(where, call, row), next(_numbers))


class DrawsBesideTheAddress(Addressed):
    def draw(self, x):
        torch.rand(())
        return super().draw(x)


class ForgetsTheStep(Addressed):
    def key(self, where, call, row):
        return (where.seed, call, row)


class ForgetsTheCall(Addressed):
    def key(self, where, call, row):
        return (where.seed, where.step, row)


class NoisyUnderAnyAddress(Addressed):
    def forward(self, x):
        return self.apply_mask(x, self.keep(x)) if self.training or _open else x


class _LateBackward(Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.apply_mask(x, layer.keep(x))

    @staticmethod
    def backward(ctx, gradient):
        return ctx.layer.apply_mask(gradient, ctx.layer.keep(gradient)), None


class LooksUpTheAddressInBackward(Addressed):
    def forward(self, x):
        return _LateBackward.apply(x, self) if self.training else x
