"""The one table of layers: what each promises, from which all inherit their tests (`test_contract.py`).

A row says how a layer is made from a rate, what it takes, and along which dims its mask is constant. Layers that keep
shape and multiply by inverted Bernoulli noise (`kind`) are tried by the whole of `dropkit.testing.check_dropout`; all
others, and these too, by the laws of addresses: a row's noise depends on its id alone, a member is one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dropkit as dk


def normal(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs of one tensor of random numbers, the same each time, away from 0."""

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return (x + x.sign(),)

    return make


def seeded(kind: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A layer whose weights do not depend on the state of torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args, **options)


def words(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Word ids below 20, the same each time."""
    return lambda: (torch.randint(1, 20, shape, generator=torch.Generator().manual_seed(0)),)


def ring(nodes: int) -> tuple[Tensor, Tensor]:
    """Edges around a ring, both ways, and their weights."""
    here = torch.arange(nodes)
    there = (here + 1) % nodes
    edge_index = torch.stack((torch.cat((here, there)), torch.cat((there, here))))
    return edge_index, torch.linspace(1, 2, 2 * nodes)


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: of the layer, public in dropkit.nn.
        make: rate -> layer. Weights in it must not depend on torch's generator's state: seed inside.
        inputs: () -> what forward takes; where `by_row`, dim 0 of each tensor counts the rows.
        p: the rate of the tests.
        check: arguments of `check_dropout` (shape=, kind= or shared=, law=, skip=), or None where the layer does not
            multiply its input by a mask.
        by_row: whether a row's output depends on its own input and id alone, so that splitting a batch changes nothing.
        identity: whether it gives its input back in evaluation (a layer with weights does not).
        output: picks the tensor to compare from what forward returns.
        why: reason for skipped checks, said once.
    """

    name: str
    make: Callable[[float], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = field(default_factory=lambda: normal(12, 10))
    p: float = 0.3
    check: dict[str, Any] | None = field(default_factory=dict)
    by_row: bool = True
    identity: bool = True
    output: Callable[[Any], Tensor] = lambda result: result
    why: str = ""


ROWS: list[Row] = [
    # features
    Row("Dropout", dk.nn.Dropout),
    Row("AlphaDropout", dk.nn.AlphaDropout, check={"law": "alpha", "shape": (16, 24)}),
    Row("FeatureAlphaDropout", dk.nn.FeatureAlphaDropout, normal(8, 6, 4, 5), check=None),
    Row("GaussianDropout", dk.nn.GaussianDropout, check=None),
    Row("UniformDropout", dk.nn.UniformDropout, check=None),
    Row("ExactDropout", dk.nn.ExactDropout, check=None),
    Row(
        "ClassicDropout",
        dk.nn.ClassicDropout,
        identity=False,
        check={
            "law": "classic",
            "skip": (
                "evaluation_is_the_identity",
                "evaluation_passes_gradients_through",
                "training_switch_is_obeyed",
                "noise_can_be_had_in_evaluation_only_if_asked",
            ),
        },
        why="in evaluation it multiplies by 1 - p",
    ),
    Row(
        "MultiSampleDropout",
        lambda p: seeded(lambda: dk.nn.MultiSampleDropout(nn.Linear(5, 3), p, samples=3)),
        normal(12, 5),
        check=None,
        identity=False,
    ),
    Row(
        "TargetedDropout",
        lambda p: seeded(lambda: dk.nn.TargetedDropout(nn.Linear(5, 8), p, share=0.7)),
        normal(12, 5),
        check=None,
        identity=False,
    ),
    # images
    Row(
        "ChannelDropout",
        dk.nn.ChannelDropout,
        normal(8, 6, 4),
        check={"shape": (8, 6, 4), "kind": "channels"},
    ),
    Row(
        "ChannelDropout1d",
        dk.nn.ChannelDropout1d,
        normal(8, 6, 4),
        check={"shape": (8, 6, 5), "kind": "channels"},
    ),
    Row(
        "ChannelDropout2d",
        lambda p: dk.nn.ChannelDropout2d(p, channels_last=True),
        normal(8, 4, 5, 6),
        check={"shape": (8, 4, 5, 6), "shared": (1, 2)},
    ),
    Row(
        "ChannelDropout3d",
        dk.nn.ChannelDropout3d,
        normal(8, 6, 2, 3, 2),
        check={"shape": (6, 5, 3, 2, 4), "kind": "channels"},
    ),
    Row("DropBlock1d", lambda p: dk.nn.DropBlock1d(p, 3), normal(9, 4, 7), check=None),
    Row("DropBlock2d", lambda p: dk.nn.DropBlock2d(p, 3), normal(9, 3, 7, 6), check=None),
    Row(
        "DropBlock3d", lambda p: dk.nn.DropBlock3d(p, 2, scale="position"), normal(9, 2, 4, 3, 5), check=None
    ),
    Row("Cutout", lambda p: dk.nn.Cutout(3, p), normal(9, 2, 7, 6), p=1.0, check=None),
    Row("PatchDropout", dk.nn.PatchDropout, normal(9, 8, 3), check=None),
    # sequences
    Row("LockedDropout", dk.nn.LockedDropout, normal(12, 5, 6), check={"shape": (12, 5, 8), "shared": (1,)}),
    Row("TokenDropout", dk.nn.TokenDropout, normal(12, 9, 3), check={"shape": (12, 9, 4), "shared": (2,)}),
    Row("WordDropout", lambda p: dk.nn.WordDropout(0, p), words(12, 9), check=None),
    Row(
        "EmbeddingDropout",
        lambda p: seeded(dk.nn.EmbeddingDropout, 20, 4, p=p),
        words(12, 9),
        check=None,
        identity=False,
    ),
    Row(
        "Zoneout",
        dk.nn.Zoneout,
        lambda: normal(12, 10)() + tuple(-x for x in normal(12, 10)()),
        check=None,
        identity=False,
    ),
    Row(
        "LSTM",
        lambda p: seeded(
            dk.nn.LSTM,
            4,
            5,
            2,
            batch_first=True,
            bidirectional=True,
            dropout=p,
            input_dropout=p,
            recurrent_dropout=p,
            output_dropout=p,
        ),
        normal(9, 4, 4),
        check=None,
        identity=False,
        output=lambda result: result[0],
    ),
    Row(
        "LSTM, fresh masks and zoneout",
        lambda p: seeded(
            dk.nn.LSTM,
            4,
            5,
            batch_first=True,
            recurrent_dropout=p,
            tied=False,
            locked=False,
            zoneout=(p, 0.1),
            weight_dropout=p,
        ),
        normal(9, 4, 4),
        check=None,
        identity=False,
        output=lambda result: result[0],
    ),
    Row(
        "GRU",
        lambda p: seeded(dk.nn.GRU, 4, 5, batch_first=True, recurrent_dropout=p, input_dropout=p, zoneout=p),
        normal(9, 4, 4),
        check=None,
        identity=False,
        output=lambda result: result[0],
    ),
    # attention
    Row(
        "AttentionDropout",
        dk.nn.AttentionDropout,
        normal(6, 2, 3, 5),
        check={"shape": (6, 2, 3, 5), "skip": ("scalar_and_empty_inputs_work",)},
        why="four dims are its meaning",
    ),
    Row(
        "HeadDropout", dk.nn.HeadDropout, normal(6, 8, 2, 3), check={"shape": (12, 8, 2, 3), "shared": (2, 3)}
    ),
    Row(
        "DropKey",
        dk.nn.DropKey,
        normal(6, 2, 3, 5),
        check=None,
        identity=False,
        output=lambda result: result.softmax(dim=-1),
    ),
    Row(
        "MultiheadAttention",
        lambda p: seeded(dk.nn.MultiheadAttention, 8, 2, p, batch_first=True),
        lambda: normal(6, 4, 8)() * 3,
        check=None,
        identity=False,
        output=lambda result: result[0],
    ),
    Row(
        "TransformerEncoderLayer",
        lambda p: seeded(dk.nn.TransformerEncoderLayer, 8, 2, 12, p, batch_first=True),
        normal(6, 4, 8),
        check=None,
        identity=False,
    ),
    Row(
        "TransformerDecoderLayer",
        lambda p: seeded(dk.nn.TransformerDecoderLayer, 8, 2, 12, p, batch_first=True),
        lambda: normal(6, 4, 8)() + normal(6, 5, 8)(),
        check=None,
        identity=False,
    ),
    # graphs: a row is a graph, so that items of one graph are not rows
    Row(
        "DropEdge",
        lambda p: dk.nn.DropEdge(p, remove=False),
        lambda: ring(30),
        check=None,
        by_row=False,
        identity=False,
        output=lambda result: result[1],
    ),
    Row(
        "DropEdgePath",
        lambda p: dk.nn.DropEdgePath(p, remove=False),
        lambda: ring(30),
        check=None,
        by_row=False,
        identity=False,
        output=lambda result: result[1],
    ),
    Row("DropNode", dk.nn.DropNode, normal(24, 3), check=None, by_row=False),
    Row("DropMessage", dk.nn.DropMessage, check=None, by_row=False),
    Row("DropFeature", lambda p: dk.nn.DropFeature(p, columns=True), normal(4, 24), check=None, by_row=False),
    # weights
    Row(
        "DropConnect",
        lambda p: seeded(lambda: dk.nn.DropConnect(nn.Linear(10, 7), p)),
        check=None,
        identity=False,
    ),
    Row(
        "BatchwiseDropout",
        lambda p: seeded(
            lambda: dk.nn.BatchwiseDropout(nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 4)), p)
        ),
        check=None,
        identity=False,
    ),
    # paths
    Row("DropPath", dk.nn.DropPath, normal(12, 4, 3), p=0.5, check={"shape": (16, 6, 4), "kind": "rows"}),
    Row(
        "StochasticDepth",
        dk.nn.StochasticDepth,
        normal(12, 4, 3),
        p=0.5,
        check={"shape": (16, 6, 4), "kind": "rows"},
    ),
    Row(
        "LayerDrop",
        lambda p: seeded(lambda: dk.nn.LayerDrop([nn.Linear(5, 5) for _ in range(12)], p)),
        normal(12, 5),
        p=0.4,
        check=None,
        identity=False,
    ),
    Row(
        "ShakeDrop",
        lambda p: dk.nn.ShakeDrop(p, beta=None),
        normal(12, 5),
        p=0.5,
        check=None,
        identity=False,
        why="beta=None: a gradient of its own is no derivative, and cannot agree with differences",
    ),
    # learned
    Row(
        "ConcreteDropout",
        lambda p: seeded(lambda: dk.nn.ConcreteDropout(nn.Linear(10, 7), p)),
        check=None,
        identity=False,
    ),
    Row(
        "VariationalDropout",
        lambda p: seeded(lambda: dk.nn.VariationalDropout(nn.Linear(10, 7), p)),
        check=None,
        identity=False,
    ),
    Row("Masksembles", lambda p: dk.nn.Masksembles(10, masks=5, p=p), check=None),
]
