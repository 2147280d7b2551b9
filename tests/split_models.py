"""Models in float64 in which masks enter in every way, and one training step of them on any part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dropkit as dk

ROWS, SEED = 64, 20  # rows of the whole data set; seed of masks
STEPS, BATCH, RATE = (
    3,
    10,
    0.05,
)  # of a short training; a batch that two and three workers cannot share evenly


class Attention(nn.Module):
    """Self-attention as one writes it by hand, so that its mask can be seen; then a path that may be dropped."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention_dropout, self.path = dk.nn.AttentionDropout(0.3), dk.nn.DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attention_dropout((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return x + self.path(self.out((weights @ v).transpose(1, 2).flatten(2)))


class Transformer(nn.Module):
    """One block written by hand, one of the library's."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(3, 8)
        self.attention = Attention(8, 2)
        self.block = dk.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, activation="gelu", batch_first=True)
        self.output = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.block(self.attention(self.inputs(x))).mean(1))


class Recurrent(nn.Module):
    """Locked dropout, and an LSTM with masks on its inputs, between its layers and on its states."""

    def __init__(self) -> None:
        super().__init__()
        self.locked = dk.nn.LockedDropout(0.3)
        self.lstm = dk.nn.LSTM(
            3, 6, num_layers=2, batch_first=True, dropout=0.2, input_dropout=0.2, recurrent_dropout=0.2
        )
        self.output = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(self.locked(x))[0][:, -1])


class Graphs(nn.Module):
    """One round of messages on rings of nodes, a graph a row: edges, nodes and features may be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.edges, self.nodes, self.features = dk.nn.DropEdge(0.3), dk.nn.DropNode(0.2), dk.nn.Dropout(0.2)
        self.inputs, self.output = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        graphs, nodes = x.shape[:2]
        batch = torch.arange(graphs).repeat_interleave(nodes)
        here = torch.arange(graphs * nodes).reshape(graphs, nodes)
        edge_index = torch.stack((here.flatten(), here.roll(1, dims=1).flatten()))
        kept, _ = self.edges(edge_index, batch=batch)
        h = self.inputs(self.nodes(x.flatten(0, 1), batch=batch))
        h = torch.tanh(h.index_add(0, kept[1], h[kept[0]]))
        return self.output(self.features(h.unflatten(0, (graphs, nodes)).mean(1)))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), dk.nn.Dropout(0.1), nn.Linear(15, 16), nn.Tanh(), dk.nn.Dropout(0.5),
        nn.Linear(16, 16), nn.Tanh(), dk.nn.GaussianDropout(0.2), nn.Linear(16, 1),
    )  # fmt: skip


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), dk.nn.ChannelDropout2d(0.4),
        nn.Conv2d(6, 4, 3, padding=1), nn.Tanh(), dk.nn.DropBlock2d(0.2, 3), nn.Flatten(), nn.Linear(60, 1),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "transformer": Transformer,
    "recurrent": Recurrent,
    "graphs": Graphs,
}


def make_model(kind: str) -> nn.Module:
    """Fresh weights, the same every time, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(kind))
        model = MODELS[kind]().double()
    dk.nn.name_sites(model)
    return model.train()


def make_rows() -> tuple[Tensor, Tensor]:
    """The whole data set: x (N, 5, 3), sequences, images or rings of nodes, and y (N, 1)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 5, 3, generator=generator, dtype=torch.float64)
    return x, x.mean((1, 2)).sin()[:, None] + 1


def backward(model: nn.Module, ids: Tensor, step: int, batch: int) -> Tensor:
    """Add to the gradients what these rows of a batch give; their share of the batch's mean loss."""
    x, y = make_rows()
    with dk.masks(seed=SEED, step=step, samples=ids):
        loss = (model(x[ids]) - y[ids]).square().sum() / batch
        loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def batch_ids(step: int) -> Tensor:
    """Which rows a step learns from."""
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:BATCH]


def slice_of(ids: Tensor, rank: int, size: int) -> Tensor:
    """A worker's part of a batch."""
    return ids[rank * len(ids) // size : (rank + 1) * len(ids) // size]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a mask did to each row of its input.

    Attributes:
        site: its layer.
        ids: (B,) rows.
        kept: (B, ...) bool.
    """

    site: str
    ids: Tensor
    kept: Tensor


WATCHED = (
    dk.nn.Dropout, dk.nn.ChannelDropout2d, dk.nn.AttentionDropout, dk.nn.DropPath, dk.nn.LockedDropout,
)  # fmt: skip


def watch(model: nn.Module, ids: Callable[[], Tensor], seen: list[Seen]) -> None:
    """Have every layer whose mask can be read off its output tell what it kept."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if len(output) == len(ids()):
            assert bool((inputs[0] != 0).all())  # a zero would hide what the mask did
            seen.append(Seen(layer.site, ids(), (output != 0).detach()))

    for layer in model.modules():
        if isinstance(layer, WATCHED):
            layer.register_forward_hook(hook)


def keeps_by_row(seen: Sequence[Seen]) -> dict[tuple[str, int], Tensor]:
    """(site, row id) -> what was kept of that row."""
    return {(s.site, int(row)): kept for s in seen for row, kept in zip(s.ids, s.kept, strict=True)}
