"""Layers whose weights or rates are the matter: DropConnect with a mask for each row, and a rate that is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dropkit import functional
from dropkit.bench.work import Pair, Work, positive, require
from dropkit.nn.batchwise import BatchwiseDropout
from dropkit.nn.concrete import ConcreteDropout


def masked_copies(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """DropConnect as it is written in torch: a masked copy of the weight for each row."""
    mask = torch.empty(len(x), *weight.shape).bernoulli_(1 - p).div_(1 - p)
    return (weight * mask @ x[..., None])[..., 0]


def connecting(shape: Sequence[int], p: float) -> Pair:
    """A linear map of (B, D) to as many features whose weights are dropped for each row, forward and backward.

    The check: without dropout it is the plain map. With it, the distances from that, divided by the standard deviation
    over masks, have mean 0 within 8 of their standard errors and mean square 1 within 0.3, more than 8 of theirs.
    """
    x, gradient = positive(shape).requires_grad_(), positive(shape)
    weight = torch.randn(shape[1], shape[1]).requires_grad_()

    def ours(rate: float) -> Work:
        return Work(lambda: functional.drop_connect(x, weight, None, rate), (x, weight), gradient)

    def peer(rate: float) -> Work:
        return Work(lambda: masked_copies(x, weight, rate), (x, weight), gradient)

    def check() -> None:
        mean, variance = (t.detach() for t in functional.drop_connect_moments(x, weight, None, p))
        for side, form in (("ours", ours), ("the peer", peer)):
            distance = ((form(p).run()[0].detach() - mean) / variance.sqrt()).double()
            count = distance.numel()
            require(abs(float(distance.mean())) < 8 / count**0.5, side, "the mean over masks has moved")
            require(abs(float(distance.square().mean()) - 1) < 0.3, side, "the noise has another variance")
        for mine, theirs in zip(ours(0.0).run(), peer(0.0).run(), strict=True):
            require(
                torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3),
                "ours",
                "without dropout it is another map",
            )

    return Pair(ours(p), peer(p), check, x.numel())


def cutting(shape: Sequence[int], p: float) -> Pair:
    """Batchwise dropout of the two hidden layers of a perceptron, of twice the input's width, against torch's dropout.

    Of 2 + 4 + 2 products 2 q + 4 q^2 + 2 q are left, with q = 1 - p. The check: at rest both are one network, result
    and gradients to 1e-4; in training dropout acts in both.
    """
    width = shape[1]
    x, gradient = torch.randn(tuple(shape)).requires_grad_(), torch.randn(tuple(shape))
    maps = nn.Linear(width, 2 * width), nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)
    layer = BatchwiseDropout(nn.Sequential(maps[0], nn.ReLU(), maps[1], nn.ReLU(), maps[2]), p)
    plain = nn.Sequential(maps[0], nn.ReLU(), nn.Dropout(p), maps[1], nn.ReLU(), nn.Dropout(p), maps[2])
    ours, peer = (Work(lambda f=f: f(x), (x, *layer.parameters()), gradient) for f in (layer, plain))  # type: ignore[misc]

    def check() -> None:
        layer.eval()
        plain.eval()
        resting = ours.run(), peer.run()
        layer.train()
        plain.train()
        for mine, theirs in zip(*resting, strict=True):
            require(
                torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4), "ours", "at rest it is another network"
            )
        for side, form in (("ours", ours), ("the peer", peer)):
            require(not torch.allclose(form.run()[0], resting[0][0], atol=1e-3), side, "dropout does not act")

    return Pair(ours, peer, check, x.numel())


def learning(shape: Sequence[int], p: float) -> Pair:
    """Concrete dropout before a linear map of (B, D) to as many features, against the map alone; forward and backward.

    The check: in evaluation it is the map alone; in training the mask acts, and the rate has a gradient.
    """
    x, gradient = torch.randn(tuple(shape)).requires_grad_(), torch.randn(tuple(shape))
    plain = nn.Linear(shape[1], shape[1])
    layer = ConcreteDropout(plain, p)
    ours = Work(lambda: layer(x), (x, *layer.parameters()), gradient)
    peer = Work(lambda: plain(x), (x, *plain.parameters()), gradient)

    def check() -> None:
        resting = layer.eval()(x)
        layer.train()
        require(torch.equal(resting, plain(x)), "ours", "at rest it is another map")
        result, *gradients = ours.run()
        require(not torch.allclose(result, resting, atol=1e-3), "ours", "the mask does not act")
        require(any(g.ndim == 0 and float(g) != 0 for g in gradients), "ours", "the rate has no gradient")

    return Pair(ours, peer, check, x.numel())
