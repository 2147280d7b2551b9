"""Layers of images, paths and features inside a compiled graph: one graph, no break, the same masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import dropkit as dk

MAPS, TOKENS = (4, 3, 8, 8), (4, 9, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "channels": (lambda: dk.nn.ChannelDropout2d(0.5), MAPS),
    "one row": (lambda: dk.nn.ChannelDropout1d(0.5, unbatched=True), (9, 6)),
    "blocks": (lambda: dk.nn.DropBlock2d(0.3, 3), MAPS),
    "blocks by position": (lambda: dk.nn.DropBlock2d(0.3, 3, scale="position"), MAPS),
    "cutout": (lambda: dk.nn.Cutout(3), MAPS),
    "patches": (lambda: dk.nn.PatchDropout(0.5), TOKENS),
    "path": (lambda: dk.nn.DropPath(0.5), TOKENS),
    "depth": (lambda: dk.nn.StochasticDepth(0.5, "batch"), TOKENS),
    "shake": (lambda: dk.nn.ShakeDrop(0.5), TOKENS),
    "layers": (lambda: dk.nn.LayerDrop([nn.Linear(6, 6) for _ in range(3)], [0.1, 0.5, 0.9]), TOKENS),
    "classic": (lambda: dk.nn.ClassicDropout(0.5), TOKENS),
    "samples": (lambda: dk.nn.MultiSampleDropout(nn.Linear(6, 2), samples=3), TOKENS),
    "targets": (lambda: dk.nn.TargetedDropout(nn.Linear(6, 2)), TOKENS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_has_the_masks_and_gradients_of_the_layer(name):
    make, shape = LAYERS[name]
    torch.compiler.reset()
    model = nn.Sequential(make())
    dk.nn.name_sites(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = []
    for step in (0, 1):
        found = []
        for module in (model, compiled):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
            with dk.masks(seed=0, step=step):
                y = module(x)
            found.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
        torch.testing.assert_close(*found)
        outputs.append(found[0][0])
    if (
        outputs[0].shape == outputs[1].shape and name != "depth"
    ):  # one decision a step, which may fall the same way
        assert not torch.equal(*outputs)
    model.eval()
    x = torch.randn(shape)
    torch.testing.assert_close(compiled(x), model(x))
