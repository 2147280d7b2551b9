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
    # images
    # sequences
    # attention
    # graphs
    # weights
    # paths
    # learned
]
