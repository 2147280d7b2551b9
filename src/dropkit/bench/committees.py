"""What is timed of committees: mean and standard deviation over M members of each output, against Monte Carlo dropout
as it is had elsewhere.

Shapes begin with M, as everywhere: (M, B, ...).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropkit.bench.committee_models import perceptron, resnet18
from dropkit.bench.models import encoder
from dropkit.bench.peers import MOST_BYTES, PEERS, Peer, moments, widest
from dropkit.bench.rivals import Contest, Rival, describe, same_law, same_moments
from dropkit.bench.timing import Clock
from dropkit.bench.work import Pair, Work, require
from dropkit.committee import Committee

Build = Callable[[Sequence[int]], nn.Module]  # shape of the input (B, ...) -> network
HIDDEN, SMALL_HIDDEN, CLASSES = 2048, 32, 10


def wide_perceptron(p: float) -> Build:
    """784-2048-2048-10, or a small one for small inputs."""

    def build(shape: Sequence[int]) -> nn.Module:
        hidden = HIDDEN if shape[-1] >= 784 else SMALL_HIDDEN
        return perceptron((shape[-1], hidden, hidden, CLASSES), p)

    return build


def small_perceptron(p: float) -> Build:
    """D-50-1 with dropout on the input as well, the network of the published tables of UCI data sets.

    Source: Gal and Ghahramani 2016, arXiv:1506.02142, sec. 5.2; 10 000 passes for each test set.
    """
    return lambda shape: perceptron((shape[-1], 50, 1), p, p_input=p)


def convnet(p_head: float = 0.0, p_channel: float = 0.0) -> Build:
    """The ResNet of 18 layers, narrow for small images."""
    return lambda shape: resnet18(shape[1], 64 if shape[-1] >= 16 else 4, p_head=p_head, p_channel=p_channel)


def transformer(p: float) -> Build:
    """Four encoder layers as torch builds them."""
    return lambda shape: encoder(shape[-1], p)


def summary_of(found: Any) -> Tensor:
    """(2, B, *out), mean and standard deviation of what a committee says."""
    return torch.stack((found.mean, found.variance.sqrt()))


def sampling(
    build: Build, shape: Sequence[int], *, against: str = "", peers: Sequence[Peer] = PEERS
) -> Contest:
    """A committee asked by sampling, against peers that sample.

    The check: each peer's samples, seen where its network returns them, have the law of ours (`same_law`); what it
    and we hand out are the mean and standard deviation of these samples, to 1e-3 of the spread.

    Args:
        build: gives the network.
        shape: (M, B, ...).
        against: the peer to compare with; "" for the fastest.
        peers: all there may be.
    """
    members, x = shape[0], torch.randn(tuple(shape[1:]))
    network = build(x.shape).eval()
    committee = Committee(network, members=members)

    def ask() -> Tensor:
        return summary_of(committee.predict(x))

    @cache
    def samples() -> Tensor:
        return committee.samples(x)

    def check_ours() -> None:
        check_summary(ask(), samples(), "ours")

    def compare(seen: Tensor, name: str) -> None:
        same_law(samples(), seen, name)

    size = members * widest(network, x)
    rivals = tuple(rival_of(peer, network, x, members, size, compare) for peer in peers)
    return Contest(Work(ask), check_ours, rivals, members * x.numel(), against)


def rival_of(
    peer: Peer, network: nn.Module, x: Tensor, members: int, size: int, compare: Callable[[Tensor, str], None]
) -> Rival:
    """A peer around a copy of the network.

    Args:
        peer: which.
        network: in evaluation mode.
        x: (B, ...).
        members: M.
        size: bytes of the widest activation of all members at once.
        compare: is given the peer's samples (M, B, *out) and its name, and raises where they are wrong.
    """
    missing = peer.missing()
    if peer.at_once and size > MOST_BYTES:
        missing = f"one activation of all members at once takes {size / 2**30:.1f} GiB"
    if missing:
        return Rival(peer.name, None, missing=missing)
    own = copy.deepcopy(network)
    try:
        asked = peer.prepare(own, members)
    except Exception as error:  # whatever another package raises
        return Rival(peer.name, None, missing=describe(error))

    def check(clock: Clock) -> int:
        seen: list[Tensor] = []
        hook = own.register_forward_hook(lambda _, __, output: seen.append(output))
        begun = clock()
        try:
            summary = asked(x)
        finally:
            hook.remove()
        spent = clock() - begun
        samples = torch.cat(seen).unflatten(0, (members, len(x)))
        compare(samples, peer.name)
        seen_in_summary = samples if summary[0].numel() == samples[0].numel() else samples[:, :, 0]
        check_summary(summary, seen_in_summary, peer.name)
        return spent

    return Rival(peer.name, Work(lambda: asked(x)), check)


def check_summary(summary: Tensor, samples: Tensor, name: str) -> None:
    """Check that (2, B, *out) is mean and standard deviation of (M, B, *out), to 1e-3 of the largest spread."""
    wanted = moments(samples.double())
    off = (summary.double().reshape(wanted.shape) - wanted).abs().amax()
    require(
        bool(off <= 1e-3 * wanted[1].amax()),
        name,
        "mean and deviation are not those of the samples of its network",
    )


def floor(shape: Sequence[int], p: float) -> Pair:
    """A committee of the convolutional network with dropout in its head, against what nobody can spare: one pass of
    all before the dropout, and M times dropout and the last linear map, written by hand.

    The check: as for peers.
    """
    members, x = shape[0], torch.randn(tuple(shape[1:]))
    network = convnet(p_head=p)(x.shape).eval()
    assert isinstance(network, nn.Sequential)
    committee = Committee(network, members=members)
    features, last = network[:-2], network[-1]

    def ask() -> Tensor:
        return summary_of(committee.predict(x))

    def samples() -> Tensor:
        hidden = features(x)
        return torch.stack([last(F.dropout(hidden, p)) for _ in range(members)])

    @torch.no_grad()
    def by_hand() -> Tensor:
        return moments(samples())

    def check() -> None:
        ours = committee.samples(x)
        check_summary(ask(), ours, "ours")
        same_law(ours, samples(), "the floor")

    return Pair(Work(ask), Work(by_hand), check, members * x.numel())


def exact(shape: Sequence[int], p: float, *, peers: Sequence[Peer] = PEERS) -> Contest:
    """Mean and standard deviation of a last linear layer behind dropout, exact, against M samples of the best peer.

    mean = W h + b,    variance = p / (1 - p) (W * W) (h * h)

    The check: ours is this to 1e-4 of the spread; each peer's samples have these moments (`same_moments`).

    Args:
        shape: (M, B, D); the layer has as many outputs as members, 1 000, or 32 for a small one.
        p: chance to drop.
        peers: all there may be.
    """
    members, x = shape[0], torch.randn(tuple(shape[1:]))
    outputs = 1000 if shape[-1] >= HIDDEN else 32
    last = nn.Linear(shape[-1], outputs)
    network = nn.Sequential(nn.Dropout(p), last).eval()
    committee = Committee(network, members=2)

    def ask() -> Tensor:
        return summary_of(committee.moments(x))

    with torch.no_grad():
        weight, bias, h = last.weight.double(), last.bias.double(), x.double()
        mean, deviation = h @ weight.T + bias, (p / (1 - p) * h.square() @ weight.T.square()).sqrt()

    def check_ours() -> None:
        off = (ask().double() - torch.stack((mean, deviation))).abs().amax()
        require(bool(off <= 1e-4 * deviation.amax()), "ours", "the moments are not exact")

    def compare(seen: Tensor, name: str) -> None:
        same_moments(mean, deviation, seen, name)

    size = members * widest(network, x)
    rivals = tuple(rival_of(peer, network, x, members, size, compare) for peer in peers)
    return Contest(Work(ask), check_ours, rivals, members * x.numel())


def moments_missing() -> str:
    """Why there are no exact moments; "" where there are."""
    return "" if hasattr(Committee, "moments") else "Committee.moments is not there"
