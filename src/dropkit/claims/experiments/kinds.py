"""Kinds of dropout and what each promises: which mean it keeps, and how the sum of its outputs varies over masks.

    u = sum_i y_i,    E u = sum_i a_i,    Var u = p/q sum over masks of (sum of the a_i under the mask)^2

The variance of a sum tells at once how large the noise of an element is and which elements share a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dropkit.nn as dnn
from dropkit.functional import drop_block_gamma
from dropkit.masks import masks


@dataclass(frozen=True, slots=True)
class Draws:
    """What one kind of dropout gave.

    Attributes:
        sums: (N,) float64, u of each draw.
        mean: E u as predicted.
        unit: what u's mean is divided by to show it.
        variance: Var u as predicted.
        scale: what u's variance is divided by to show it; variance / scale is the kind's law in p.
        quiet: largest distance between what evaluation gives and the plain output (zoneout: the mean).
    """

    sums: Tensor
    mean: float
    unit: float
    variance: float
    scale: float
    quiet: float


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of dropout.

    Attributes:
        name: of the layer.
        shares: which elements fall together.
        draw: (rate, draws, seed) -> what was found.
    """

    name: str
    shares: str
    draw: Callable[[float, int, int], Draws]


def activations(*shape: int) -> Tensor:
    """Numbers from 0.5 to 2, in order: no two alike, so that no mask is mistaken for another."""
    return torch.linspace(0.5, 2.0, int(torch.Size(shape).numel()), dtype=torch.float64).view(shape)


def _found(y: Tensor, plain: Tensor, groups: Tensor, law: float, quiet: float) -> Draws:
    """Draws (N, *features), the plain output, the sums under each mask, and the variance of one mask's noise."""
    mean, scale = float(plain.sum()), float(groups.square().sum())
    return Draws(y.flatten(1).sum(dim=1), mean, mean, law * scale, scale, quiet)


def _masked(
    layer: Callable[[float], nn.Module], shape: tuple[int, ...], *shared: int
) -> Callable[..., Draws]:
    """A layer that multiplies (N, *shape) by noise of variance p/q, one value for the dims `shared` of a row."""

    def draw(rate: float, draws: int, seed: int) -> Draws:
        a, module = activations(*shape), layer(rate)
        x = a.expand(draws, *shape)
        with masks(seed=seed):
            y = module(x)
        quiet = float((module.eval()(x[:8]) - x[:8]).abs().max())
        groups = a.sum(dim=shared) if shared else a
        return _found(y, a, groups, rate / (1 - rate), quiet)

    return draw


def _exact(rate: float, draws: int, seed: int) -> Draws:
    """k of n fall, so that masks lean on each other: Var u = p/q n/(n-1) sum (a_i - mean a)^2, with p = k/n."""
    a, module = activations(16), dnn.ExactDropout(rate)
    x = a.expand(draws, 16)
    with masks(seed=seed):
        y = module(x)
    dropped = round(rate * 16) / 16
    quiet = float((module.eval()(x[:8]) - x[:8]).abs().max())
    return _found(y, a, (a - a.mean()) * (16 / 15) ** 0.5, dropped / (1 - dropped), quiet)


def _block(rate: float, draws: int, seed: int) -> Draws:
    """The middle of a 6 x 6 map, which 9 places of a 3 x 3 block cover: it stays with chance (1 - gamma)^9."""
    a, module = activations(1, 6, 6), dnn.DropBlock2d(rate, 3, scale="position")
    x = a.expand(draws, 1, 6, 6)
    with masks(seed=seed):
        y = module(x)
    stays = (1 - round(drop_block_gamma(rate, (6, 6), 3) * 2**16) / 2**16) ** 9
    quiet = float((module.eval()(x[:8]) - x[:8]).abs().max())
    return _found(y[:, 0, 2, 2, None], a[0, 2, 2], a[0, 2, 2], (1 - stays) / stays, quiet)


def _connect(rate: float, draws: int, seed: int) -> Draws:
    """Weights fall: Var u = p/q sum w^2 x^2."""
    plain = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(activations(3, 4))
        module, x = dnn.DropConnect(plain, rate), activations(4).expand(draws, 4)
        with masks(seed=seed):
            y = module(x)
        quiet = float((module.eval()(x[:8]) - plain(x[:8])).abs().max())
        return _found(y, plain(x[0]), plain.weight * x[0], rate / (1 - rate), quiet)


def _batchwise(rate: float, draws: int, seed: int) -> Draws:
    """Hidden units fall for a whole batch: a pass is one draw."""
    passes = max(draws // 100, 200)
    plain = nn.Sequential(
        nn.Linear(3, 8, dtype=torch.float64), nn.ReLU(), nn.Linear(8, 1, dtype=torch.float64)
    )
    with torch.no_grad():
        for weight in plain.parameters():
            weight.copy_(activations(*weight.shape))
        module, x = dnn.BatchwiseDropout(plain, rate), activations(1, 3)
        module.site = "batchwise"
        found = []
        for step in range(passes):
            with masks(seed=seed, step=step):
                found.append(module(x))
        quiet = float((module.eval()(x) - plain(x)).abs().max())
        return _found(torch.cat(found), plain(x), plain[2].weight * plain[:2](x), rate / (1 - rate), quiet)


def _edges(rate: float, draws: int, seed: int) -> Draws:
    """Edges of rings of 5 nodes, one graph a draw; what is left carries its weight divided by q."""
    a, module = activations(5), dnn.DropEdge(rate, rescale=True, remove=False)
    nodes = torch.arange(5 * draws)
    ring = torch.stack((nodes, nodes - nodes % 5 + (nodes + 1) % 5))
    weights = a.repeat(draws)
    with masks(seed=seed):
        _, y = module(ring, weights, batch=nodes // 5)
    quiet = float((module.eval()(ring, weights)[1] - weights).abs().max())
    return _found(y.view(draws, 5), a, a, rate / (1 - rate), quiet)


def _graph(layer: Callable[[float], nn.Module], *shared: int) -> Callable[..., Draws]:
    """Nodes or messages (4, 3) of a graph, one graph a draw."""

    def draw(rate: float, draws: int, seed: int) -> Draws:
        a, module = activations(4, 3), layer(rate)
        x, graphs = a.repeat(draws, 1), torch.arange(draws).repeat_interleave(4)
        with masks(seed=seed):
            y = module(x, batch=graphs)
        quiet = float((module.eval()(x, batch=graphs) - x).abs().max())
        return _found(y.view(draws, 4, 3), a, a.sum(dim=shared) if shared else a, rate / (1 - rate), quiet)

    return draw


def _words(rate: float, draws: int, seed: int) -> Draws:
    """Sequences 0 1 1 2 0 1: a word type that falls, falls at each of its places."""
    module = dnn.EmbeddingDropout(3, 2, p=rate, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(activations(3, 2))
        tokens = torch.tensor([0, 1, 1, 2, 0, 1]).expand(draws, 6)
        with masks(seed=seed):
            y = module(tokens)
        quiet = float((module.eval()(tokens[:8]) - module.weight[tokens[:8]]).abs().max())
        groups = module.weight.sum(dim=1) * torch.tensor([2.0, 3.0, 1.0])
        return _found(y, module.weight[tokens[0]], groups, rate / (1 - rate), quiet)


def _zoneout(rate: float, draws: int, seed: int) -> Draws:
    """Units keep their old value: nothing is scaled, evaluation is the mean q new + p old, Var = p q (new - old)^2."""
    new, old = activations(6), activations(6).flip(0).square()
    module = dnn.Zoneout(rate)
    with masks(seed=seed):
        y = module(new.expand(draws, 6), old.expand(draws, 6))
    mean = (1 - rate) * new + rate * old
    quiet = float((module.eval()(new[None], old[None]) - mean).abs().max())
    return _found(y, mean, new - old, rate * (1 - rate), quiet)


def _alpha(layer: Callable[[float], nn.Module], *shape: int) -> Callable[..., Draws]:
    """Outputs of SELU on normal numbers have mean 0 and variance 1 over rows, and keep both: one element a row."""

    def draw(rate: float, draws: int, seed: int) -> Draws:
        generator = torch.Generator().manual_seed(seed)
        x = torch.selu(torch.randn(draws, *shape, generator=generator, dtype=torch.float64))
        module = layer(rate)
        with masks(seed=seed):
            y = module(x)
        quiet = float((module.eval()(x) - x).abs().max())
        return Draws(y.flatten(1)[:, 0], 0.0, 1.0, 1.0, 1.0, quiet)

    return draw


KINDS: tuple[Kind, ...] = (
    Kind("Dropout", "elements", _masked(dnn.Dropout, (4, 3))),
    Kind("ExactDropout", "elements, a fixed number of them", _exact),
    Kind("GaussianDropout", "elements", _masked(dnn.GaussianDropout, (4, 3))),
    Kind("UniformDropout", "elements", _masked(dnn.UniformDropout, (4, 3))),
    Kind("ChannelDropout", "channels", _masked(dnn.ChannelDropout2d, (4, 3, 2), 1, 2)),
    Kind("DropBlock2d", "blocks, scale by position", _block),
    Kind("LockedDropout", "features, over time", _masked(dnn.LockedDropout, (5, 4), 0)),
    Kind("TokenDropout", "tokens", _masked(dnn.TokenDropout, (5, 4), 1)),
    Kind("EmbeddingDropout", "word types", _words),
    Kind("AttentionDropout", "attention weights", _masked(dnn.AttentionDropout, (2, 3, 3))),
    Kind("HeadDropout", "heads", _masked(dnn.HeadDropout, (4, 3, 2), 1, 2)),
    Kind("DropPath", "paths", _masked(dnn.DropPath, (4, 3), 0, 1)),
    Kind("StochasticDepth", "paths", _masked(dnn.StochasticDepth, (4, 3), 0, 1)),
    Kind("DropConnect", "weights", _connect),
    Kind("BatchwiseDropout", "units, over the batch", _batchwise),
    Kind("DropEdge", "edges", _edges),
    Kind("DropNode", "nodes", _graph(dnn.DropNode, 1)),
    Kind("DropMessage", "elements of messages", _graph(dnn.DropMessage)),
    Kind("DropFeature", "features of nodes", _graph(dnn.DropFeature)),
    Kind("Zoneout", "units keep their old value", _zoneout),
    Kind("AlphaDropout", "elements of SELU", _alpha(dnn.AlphaDropout, 1)),
    Kind("FeatureAlphaDropout", "channels of SELU", _alpha(dnn.FeatureAlphaDropout, 1, 1)),
)
