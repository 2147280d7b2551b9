"""The rows of the table: what is timed against what, and which figure is to be reached."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dropkit import functional
from dropkit.bench import committees, fitting, gpu, graphs, models, recurrent, weights
from dropkit.bench.machine import compiler_missing
from dropkit.bench.rivals import Contest
from dropkit.bench.work import Function, Pair, against_multiply, attending, dropping
from dropkit.errors import OptionError

Measure = Literal["times faster", "of its time", "us more", "bytes kept"]
Shape = tuple[int, ...]
P = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        name: short, for the command line.
        work: what is done.
        peer: against what.
        measure: which figure is judged: "times faster" (peer / ours, at least the target), "of its time"
            (ours / peer, at most), "us more" (ours - peer in microseconds a call, at most), "bytes kept" (by ours
            for the backward pass, an element of the input, at most).
        target: the figure to reach.
        threads: torch's threads; one result for each number.
        shape: of the input.
        small: a shape on which the check takes no time.
        make: shape -> both sides, or ours and several peers, of which the fastest that is right is taken.
        missing: why it cannot run here; "" where it can.
        slow: left out unless asked for.
    """

    name: str
    work: str
    peer: str
    measure: Measure
    target: float
    threads: tuple[int, ...]
    shape: Shape
    small: Shape
    make: Callable[[Shape], Pair | Contest]
    missing: Callable[[], str] = str
    slow: bool = False


def ours(x: Tensor, shared: Sequence[int] = ()) -> Tensor:
    """dropkit at the rate of all rows."""
    return functional.dropout(x, P, shared=shared)


def torch_dropout(x: Tensor) -> Tensor:
    """torch, eager."""
    return F.dropout(x, P)


def torch_dropout2d(x: Tensor) -> Tensor:
    """torch's channel dropout."""
    return F.dropout2d(x, P)


def broadcast(x: Tensor, shared: Sequence[int]) -> Tensor:
    """What people write where torch has no layer: one small mask, multiplied."""
    mask = x.new_empty([1 if dim in shared else size for dim, size in enumerate(x.shape)])
    return x * mask.bernoulli_(1 - P).div_(1 - P)


@lru_cache(maxsize=1)
def compiled_dropout() -> Function:
    """torch's dropout as its compiler writes it."""
    return torch.compile(torch_dropout, fullgraph=True, dynamic=False)


def compiled(x: Tensor) -> Tensor:
    """torch's dropout, compiled when it is first called."""
    return compiled_dropout()(x)


def both_ways(peer: Function, dtype: torch.dtype = torch.float32) -> Callable[[Shape], Pair]:
    """Elementwise dropout, forward and backward."""
    return lambda shape: dropping(ours, peer, shape, P, dtype=dtype, backward=True)


def sharing(dims: Shape, peer: Function | None = None) -> Callable[[Shape], Pair]:
    """Dropout with a mask shared along dims, forward and backward."""
    left, right = partial(ours, shared=dims), peer or partial(broadcast, shared=dims)
    return lambda shape: dropping(left, right, shape, P, shared=dims, backward=True)


def one_call(shape: Shape) -> Pair:
    """Forward alone, of an input that requires gradients: what a call costs beside the elements."""
    return dropping(ours, torch_dropout, shape, P, backward=False)


def attention_rows(form: Any) -> tuple[Row, ...]:
    """Attention with dropout, by `form`, which has the signature of torch's."""

    def mine(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return form(q, k, v, dropout_p=p)

    def theirs(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)

    rows = []
    for name, shape in (("512", (4, 8, 512, 64)), ("2048", (1, 8, 2048, 64))):
        work = f"attention, forward + backward, float32, {shape}"
        both, alone = (
            partial(lambda s, q: attending(mine, theirs, s, P, q), q=peer_p) for peer_p in (P, 0.0)
        )
        rows += [
            Row(f"attention-{name}", work, "torch SDPA with dropout_p",
                "times faster", 3, (2,), shape, (1, 2, 64, 16), both),
            Row(f"attention-{name}-plain", work, "torch SDPA without dropout",
                "of its time", 1.6, (2,), shape, (1, 2, 64, 16), alone),
        ]  # fmt: skip
    return tuple(rows)


MILLION, SMALL = (1024, 1024), (64, 64)
LARGE = (16384, 8192)  # what a GPU needs to be busy: 128 M elements
IMAGES, SMALL_IMAGES = (32, 64, 56, 56), (4, 8, 6, 6)
WORDS, SMALL_WORDS = (32, 128, 512), (4, 8, 16)
STEPS, SMALL_STEPS = (100, 32, 256), (6, 4, 8)  # time first

MASKS: tuple[Row, ...] = (
    Row("forward-float32", "elementwise, forward, float32, 1 M", "torch dropout",
        "times faster", 35, (1,), MILLION, SMALL,
        lambda shape: dropping(ours, torch_dropout, shape, P, backward=False, grad=False)),
    Row("train-float32", "elementwise, forward + backward, float32, 1 M", "torch dropout",
        "times faster", 25, (1, 2), MILLION, SMALL, both_ways(torch_dropout)),
    Row("train-bfloat16", "elementwise, forward + backward, bfloat16, 1 M", "torch dropout",
        "times faster", 15, (1, 2), MILLION, SMALL, both_ways(torch_dropout, torch.bfloat16)),
    Row("memory-bound", "elementwise, forward, float32, 16 M", "x * 2, out of place",
        "of its time", 1.5, (1, 2), (4096, 4096), SMALL, lambda shape: against_multiply(ours, shape, P)),
    *(Row(f"call-{n}", f"one call, forward with grad, float32, {n} element{'s' * (n > 1)}", "torch dropout",
          "us more", 10, (1,), (1, n), (1, n), one_call) for n in (1, 10, 100, 1000)),
    Row("compiled", "elementwise, forward + backward, float32, 1 M", "torch.compile of torch dropout",
        "times faster", 10, (1, 2), MILLION, SMALL, both_ways(compiled), compiler_missing, slow=True),
    Row("kept", "kept for backward, float32, 1 M", "torch dropout",
        "bytes kept", 0, (1,), MILLION, SMALL, both_ways(torch_dropout)),
    Row("channel", f"channel dropout, forward + backward, {IMAGES}", "torch dropout2d",
        "times faster", 3, (1, 2), IMAGES, SMALL_IMAGES, sharing((2, 3), torch_dropout2d)),
    Row("locked", f"locked dropout, forward + backward, {WORDS}", "a broadcast mask in torch",
        "times faster", 3, (1, 2), WORDS, SMALL_WORDS, sharing((1,))),
    Row("token", f"token dropout, forward + backward, {WORDS}", "a broadcast mask in torch",
        "times faster", 3, (1, 2), WORDS, SMALL_WORDS, sharing((2,))),
    Row("path", f"drop path, forward + backward, {IMAGES}", "the formula of timm's drop_path in torch",
        "times faster", 3, (1, 2), IMAGES, SMALL_IMAGES,
        sharing((1, 2, 3))),
    Row("gpu-copy", f"on a GPU: {gpu.CALLS} calls, forward, bfloat16, 128 M", "a copy",
        "of its time", 1 / 0.9, (1,), LARGE, SMALL, lambda shape: gpu.against_copy(ours, shape, P),
        gpu.kernels_missing),
    Row("gpu-bfloat16", f"on a GPU: {gpu.CALLS} calls, forward, bfloat16, 128 M", "torch dropout",
        "times faster", 1.2, (1,), LARGE, SMALL, lambda shape: gpu.against_torch(ours, torch_dropout, shape, P),
        gpu.kernels_missing),
    Row("tail", "bias + dropout + residual + LayerNorm, forward + backward, float32, (4096, 768)",
        "the same chain in torch, eager", "times faster", 5, (1, 2), (4096, 768), (16, 32),
        lambda shape: models.tail(shape, P)),
    Row("step-transformer", "training step, Transformer encoder of 4 layers, width 256, (16, 128, 256), converted",
        "the same as torch builds it", "times faster", 1, (1, 2), (16, 128, 256), (2, 4, 64),
        lambda shape: models.stepping(models.encoder, shape, P)),
    Row("step-cnn", "training step, small CNN with a dropout behind each activation, (32, 3, 32, 32), converted",
        "the same as torch builds it", "times faster", 1, (1, 2), (32, 3, 32, 32), (2, 3, 8, 8),
        lambda shape: models.stepping(models.convnet, shape, P)),
    Row("drop-connect", "DropConnect with a mask for each row, forward + backward, float32, (32, 1024) to 1024",
        "a masked copy of the weight for each row", "times faster", 5, (1, 2), (32, 1024), SMALL,
        lambda shape: weights.connecting(shape, P)),
    Row("drop-connect-kept", "kept for backward: DropConnect with a mask for each row, (32, 1024) to 1024",
        "a masked copy of the weight for each row", "bytes kept", 0, (1,), (32, 1024), SMALL,
        lambda shape: weights.connecting(shape, P)),
    Row("batchwise", "batchwise dropout at 0.5 of two hidden layers of 2048, forward + backward, float32, (256, 1024)",
        "the same network with torch dropout", "times faster", 2, (1, 2), (256, 1024), SMALL,
        lambda shape: weights.cutting(shape, 0.5)),
    Row("concrete", "Concrete dropout and a linear map, forward + backward, float32, (256, 1024) to 1024",
        "the linear map alone", "of its time", 1.3, (1, 2), (256, 1024), SMALL,
        lambda shape: weights.learning(shape, P)),
    *(Row(name, f"drop edge{kind}, 1 M edges", graphs.PEER, "times faster", 3, (1, 2), (1_000_000,), (2_000,),
          partial(lambda together, shape: graphs.dropping_edges(shape[0], P, together), together))
      for name, kind, together in (
          ("edge", "", False), ("edge-undirected", ", both directions together", True))),
    Row("lstm-locked", f"LSTM, one state mask for each row and all steps, forward + backward, {STEPS}",
        "torch LSTM without dropout", "of its time", 1.3, (1, 2), STEPS, SMALL_STEPS,
        lambda shape: recurrent.recurring("LSTM", shape, P)),
    Row("lstm-member", f"LSTM, one state mask for all rows and steps, forward + backward, {STEPS}",
        "torch LSTM without dropout", "of its time", 1.02, (1, 2), STEPS, SMALL_STEPS,
        lambda shape: recurrent.recurring("LSTM", shape, P, member=1)),
    Row("gru-locked", f"GRU, one state mask for each row and all steps, forward + backward, {STEPS}",
        "torch GRU without dropout", "of its time", 1.3, (1, 2), STEPS, SMALL_STEPS,
        lambda shape: recurrent.recurring("GRU", shape, P)),
    *(attention_rows(form) if (form := getattr(functional, "scaled_dot_product_attention", None)) else ()),
)  # fmt: skip


def fitting_rows() -> tuple[Row, ...]:
    """Training as `dropkit fit` does it, against the same networks in plain torch."""
    plain = "torch Dropout and fused AdamW"
    return (
        *(Row(f"fit-step-{width}", f"training step of dropkit fit, two hidden layers of {width}, 64 rows of 13 numbers",
              plain, "times faster", 1, (1, 2), (64, 13, width), (16, 3, 16), lambda shape: fitting.stepping(shape, P))
          for width in (32, 128, 512, 2048)),
        Row("fit-search", "rate search, 20 candidates on 5 folds of 500 rows, two hidden layers of 64, 8 epochs",
            f"one network after another, {plain}", "times faster", 5, (1, 2), (20, 5, 500, 13), (3, 2, 60, 3),
            fitting.searching, slow=True),
    )  # fmt: skip


def committee_rows() -> tuple[Row, ...]:
    """Mean and standard deviation over the members of a committee, against Monte Carlo dropout elsewhere."""
    sampling, threads, best = committees.sampling, (1, 2), "the best peer"
    perceptron, small = (
        "MLP 784-2048-2048-10, dropout {p} on hidden units, 1000 rows, 50 members",
        (32, 6, 12),
    )
    image = "ResNet-18 of width 64, 32 images of 16 x 16, dropout 0.5 in the head, 50 members"
    images, small_images = (50, 32, 3, 16, 16), (32, 3, 3, 8, 8)
    return (
        *(Row(f"committee-mlp-{p}", perceptron.format(p=p), best, "times faster", target, threads,
              (50, 1000, 784), small, partial(lambda rate, shape: sampling(committees.wide_perceptron(rate), shape), p),
              slow=True) for p, target in ((0.5, 5), (0.1, 1.3))),
        Row("committee-head", image, "a loop", "times faster", 25, threads, images, small_images,
            lambda shape: sampling(committees.convnet(p_head=0.5), shape, against="loop"), slow=True),
        Row("committee-head-floor", image, "one pass and 50 times the last layer, by hand",
            "of its time", 1.15, threads, images, small_images, lambda shape: committees.floor(shape, 0.5), slow=True),
        Row("committee-channel", "the same ResNet-18, channel dropout 0.3 between blocks, 16 members", best,
            "times faster", 2, threads, (16, *images[1:]), small_images,
            lambda shape: sampling(committees.convnet(p_channel=0.3), shape), slow=True),
        Row("committee-last-layer", "exact moments of a linear layer 2048-1000 behind dropout 0.5, 256 rows",
            "1000 samples of the best peer", "times faster", 100, threads, (1000, 256, 2048), (400, 3, 12),
            lambda shape: committees.exact(shape, 0.5), committees.moments_missing, slow=True),
        Row("committee-transformer", "Transformer encoder, 4 layers of 256, dropout 0.1, (8, 128, 256), 32 members",
            best, "times faster", 1.5, threads, (32, 8, 128, 256), (32, 2, 4, 128),
            lambda shape: sampling(committees.transformer(0.1), shape), slow=True),
        Row("committee-uci", "MLP 13-50-1, dropout 0.05 on input and hidden units, 51 rows, 10 000 members", best,
            "times faster", 20, threads, (10_000, 51, 13), (300, 5, 4),
            lambda shape: sampling(committees.small_perceptron(0.05), shape), slow=True),
    )  # fmt: skip


ROWS: tuple[Row, ...] = (*MASKS, *fitting_rows(), *committee_rows())


def choose(patterns: Sequence[str], rows: Sequence[Row] = ROWS) -> tuple[Row, ...]:
    """The rows whose names fit one of the patterns, such as call-*; all without a pattern.

    Raises:
        OptionError: a pattern that fits no row.
    """
    for pattern in patterns:
        if not fnmatch.filter([row.name for row in rows], pattern):
            raise OptionError(
                f"row {pattern!r} was given; the rows are {', '.join(row.name for row in rows)}. "
                "A pattern such as 'call-*' names several."
            )
    return tuple(
        row for row in rows if not patterns or any(fnmatch.fnmatchcase(row.name, p) for p in patterns)
    )
