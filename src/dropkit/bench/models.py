"""Whole models: a training step with torch's dropouts against the same model converted, and the tail of a block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkit import conversion, functional
from dropkit.bench.work import Pair, Work, require


def encoder(width: int, p: float, layers: int = 4) -> nn.Module:
    """A Transformer encoder as torch builds it, dropout in all its places, on (B, L, width)."""
    layer = nn.TransformerEncoderLayer(width, max(width // 64, 1), 4 * width, p, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def convnet(channels: int, p: float) -> nn.Module:
    """A small network for images (B, channels, H, W) of ten classes, with a dropout behind each activation."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Dropout(p),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Dropout(p),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Dropout(p),
        nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Dropout(p), nn.Linear(128, 10),
    )  # fmt: skip


def stepping(build: Callable[[int, float], nn.Module], shape: Sequence[int], p: float) -> Pair:
    """Forward and backward of a model in training, for all its parameters: converted against as it was.

    The check: in evaluation both give one result and one gradient, to 1e-3; in training both differ from that.

    Args:
        build: (size of dim -1 of an embedding, or of dim 1 of an image; rate) -> model.
        shape: of the input.
        p: chance to drop.
    """
    x = torch.randn(tuple(shape))
    size = shape[1] if len(shape) == 4 else shape[-1]

    def work(model: nn.Module, gradient: Tensor) -> Work:
        return Work(lambda: model(x), tuple(model.parameters()), gradient)

    torch.manual_seed(0)
    plain = build(size, p).train()
    gradient = torch.randn_like(plain(x).detach())  # the first pass gives a lazy layer its weights
    converted = conversion.convert(copy.deepcopy(plain)).model.train()
    ours, peer = work(converted, gradient), work(plain, gradient)

    def check() -> None:
        converted.eval()
        plain.eval()
        resting = ours.run(), peer.run()
        converted.train()
        plain.train()
        for mine, theirs in zip(*resting, strict=True):
            require(
                torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3),
                "ours",
                "the converted model is another one",
            )
        for side, form in (("ours", ours), ("the peer", peer)):
            require(not torch.allclose(form.run()[0], resting[0][0], atol=1e-4), side, "dropout does not act")

    return Pair(ours, peer, check, x.numel())


def tail(shape: Sequence[int], p: float) -> Pair:
    """Bias, dropout, residual sum and LayerNorm, forward and backward: ours in one pass, torch's one after another.

    The check: without dropout both agree to 1e-4, in the result and in all five gradients.
    """
    rows, width = shape
    x, residual = (torch.randn(rows, width).requires_grad_() for _ in range(2))
    bias, weight, norm_bias = (torch.randn(width).requires_grad_() for _ in range(3))
    gradient = torch.randn(rows, width)
    inputs = (x, residual, bias, weight, norm_bias)

    def ours(rate: float) -> Work:
        return Work(
            lambda: functional.dropout_add_layer_norm(x, residual, weight, norm_bias, rate, bias=bias),
            inputs,
            gradient,
        )

    def chain(rate: float) -> Work:
        return Work(
            lambda: F.layer_norm(residual + F.dropout(x + bias, rate), (width,), weight, norm_bias),
            inputs,
            gradient,
        )

    def check() -> None:
        plain = chain(0.0).run()
        for mine, theirs in zip(ours(0.0).run(), plain, strict=True):
            require(
                torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3),
                "ours",
                "without dropout it is another sum",
            )
        for side, form in (("ours", ours(p)), ("the peer", chain(p))):
            require(not torch.allclose(form.run()[0], plain[0], atol=1e-3), side, "dropout does not act")

    return Pair(ours(p), chain(p), check, x.numel())
