"""The networks that committees are timed on, in torch alone, so that every peer can read them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

BLOCKS = 8  # of the convolutional network, two for each of four widths


def perceptron(widths: Sequence[int], p: float, p_input: float = 0.0) -> nn.Module:
    """Linear maps and ReLU, a dropout behind each hidden layer, and one before the first if `p_input` is not 0.

    Args:
        widths: D_0 (input) ... D_n (output).
        p: chance to drop a hidden unit.
        p_input: chance to drop a value of the input.
    """
    layers: list[nn.Module] = [nn.Dropout(p_input)] if p_input else []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut: (B, C, H, W) -> (B, C', H / stride, W / stride).

    No ReLU writes into its input: a peer that keeps the values of convolutions would have them changed.

    Source: He et al. 2016, arXiv:1512.03385, fig. 5 left.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.relu = nn.ReLU()
        same = stride == 1 and before == after
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The branch and the shortcut, summed."""
        h = self.relu(self.first_norm(self.first(x)))
        return self.relu(self.second_norm(self.second(h)) + self.shortcut(x))


def resnet18(channels: int, width: int, *, p_head: float = 0.0, p_channel: float = 0.0) -> nn.Module:
    """The ResNet of 18 layers for small images (B, channels, H, W), ten classes, with dropout where it is asked for.

    Args:
        channels: of the images.
        width: channels of the first two blocks; doubled behind every second block.
        p_head: chance to drop a feature before the last linear map.
        p_channel: chance to drop a channel between one block and the next.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for block in range(BLOCKS):
        after = width << block // 2
        if block and p_channel:
            layers.append(nn.Dropout2d(p_channel))
        layers.append(BasicBlock(before, after, 2 if block and block % 2 == 0 else 1))
        before = after
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    head += [nn.Dropout(p_head)] if p_head else []
    network = nn.Sequential(*layers, *head, nn.Linear(before, 10))
    settle_norms(network)
    return network


def settle_norms(network: nn.Module) -> None:
    """Give the BatchNorms statistics and weights as after training: not 0 and 1, which leave them nothing to do."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    assert isinstance(tensor, Tensor)
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    assert isinstance(tensor, Tensor)
                    tensor.uniform_(-0.2, 0.2)
