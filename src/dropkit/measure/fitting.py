"""Training small copies the same way, with and without masks, for the instruments that compare them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dropkit.masks import masks
from dropkit.measure.losses import Loss
from dropkit.measure.subject import check_finite


def fresh(network: nn.Module, seed: int) -> nn.Module:
    """A copy with weights drawn anew, where its layers know how; the caller's generator is left as it was."""
    made = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return made


def fit(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    noisy: bool,
) -> nn.Module:
    """Train in place by Adam on all rows at once, with masks or without; the last half of the steps is averaged.

    Args:
        network: in evaluation mode, its sites named; BatchNorm keeps its statistics.
        x, y: rows and targets.
        loss: the mean loss.
        epochs: steps.
        learning_rate: of Adam.
        seed: of the masks; a step is a member, each row has its own mask.
        noisy: whether masks act.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    rows = torch.arange(len(x))
    mean = [torch.zeros_like(w) for w in weights]
    averaged = 0
    for step in range(epochs):
        optimizer.zero_grad()
        if noisy:
            with masks(seed=seed, member=step, samples=rows):
                value = loss(network(x.clone()), y)
        else:
            value = loss(network(x.clone()), y)
        check_finite(value.detach(), "the loss in training")
        value.backward()
        optimizer.step()
        if step >= epochs // 2:
            averaged += 1
            with torch.no_grad():
                for total, w in zip(mean, weights, strict=True):
                    total += (w - total) / averaged
    with torch.no_grad():
        for total, w in zip(mean, weights, strict=True):
            w.copy_(total)
    return network
