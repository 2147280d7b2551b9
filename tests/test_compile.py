"""torch.compile, torch.export and activation checkpointing: the same masks, and the gradient that belongs to them."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropkit as dk
from dropkit.errors import AddressError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(8, 16), dk.nn.Dropout(0.5), nn.Linear(16, 16), dk.nn.Dropout(0.2), nn.Linear(16, 2)
    )
    dk.nn.name_sites(model)
    return model


def output_and_gradients(model, run, x, **fields):
    model.zero_grad()
    with dk.masks(**fields):
        y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request):
    torch._dynamo.reset()
    model = network()
    counter = torch._dynamo.testing.CompileCounterWithBackend(request.param)
    return model, torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter


@pytest.mark.timeout(600)
def test_a_compiled_model_has_the_eager_masks_and_compiles_once(compiled):
    model, run, counter = compiled
    x = torch.randn(6, 8)
    addresses = [{"step": s} for s in range(5)] + [
        {"row_offset": 9}, {"member": 3}, {"samples": torch.tensor([5, 3, 1, 0, 2, 4])}, {"seed": 2**64 - 1}
    ]  # fmt: skip
    frames = []
    for fields in addresses:
        eager, graph = (output_and_gradients(model, f, x, **fields) for f in (model, run))
        for ours, theirs in zip(eager, graph, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]  # neither step nor rows nor member compile anything anew
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(
        run(x), expected, rtol=1e-4, atol=1e-5
    )  # and outside a context torch's generator decides


def test_in_evaluation_the_layer_vanishes_from_an_exported_graph():
    program = torch.export.export(network().eval(), (torch.randn(4, 8),))
    assert not [node for node in program.graph.nodes if "dropkit" in str(node.target)]


@pytest.mark.parametrize("reentrant", [False, True])
class TestCheckpointing:
    def gradients(self, model, run, backward_inside=True, **fields):
        model.zero_grad()
        x = torch.linspace(-1, 1, 48).reshape(6, 8).requires_grad_()
        with dk.masks(seed=1, **fields):
            y = run(x).square().sum()
            if backward_inside:
                y.backward()
        if not backward_inside:
            y.backward()
        return [p.grad.clone() for p in model.parameters()]

    def test_the_masks_are_those_of_the_first_pass(self, reentrant):
        model = network()
        plain = self.gradients(model, model)
        again = self.gradients(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    def test_outside_a_context_torch_restores_its_generator(self, reentrant):
        model = network()
        results = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
            torch.manual_seed(5)
            model.zero_grad()
            run(torch.ones(6, 8, requires_grad=True)).square().sum().backward()
            results.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_a_backward_after_the_context_is_refused_not_wrong(self, reentrant):
        model = network()
        with pytest.raises(AddressError, match="Call backward\\(\\) inside the context"):
            self.gradients(
                model, lambda x: checkpoint(model, x, use_reentrant=reentrant), backward_inside=False
            )

    def test_a_call_of_the_function_after_the_context_is_refused_too(self, reentrant):
        linear = nn.Linear(8, 8)
        last = nn.Linear(8, 8)
        block = lambda x: last(dk.functional.dropout(linear(x), 0.5))  # noqa: E731
        with pytest.raises(AddressError, match="Call backward\\(\\) inside the context"):
            self.gradients(
                linear, lambda x: checkpoint(block, x, use_reentrant=reentrant), backward_inside=False
            )

    def test_a_layer_called_twice_is_refused_not_wrong(self, reentrant):
        layer, linear = dk.nn.Dropout(0.5), nn.Linear(8, 8)
        layer.site = "shared"
        twice = lambda x: layer(linear(layer(x)))  # noqa: E731
        with pytest.raises(AddressError, match="which of its calls"):
            self.gradients(linear, lambda x: checkpoint(twice, x, use_reentrant=reentrant))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layers", [1, 2])
def test_equal_draws_of_one_graph_stay_two(backend, layers):
    """One layer called twice, or two without a name: torch merges equal nodes where gradients are needed."""
    torch._dynamo.reset()
    first = dk.nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(8, 8), first, first if layers == 1 else dk.nn.Dropout(0.5))
    if layers == 1:
        dk.nn.name_sites(model)
    x = torch.randn(6, 8)
    run = torch.compile(model, fullgraph=True, backend=backend)
    eager, graph = (output_and_gradients(model, f, x, seed=1) for f in (model, run))
    for ours, theirs in zip(eager, graph, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.5, torch.full((16,), 0.5)], ids=["number", "tensor"])
def test_a_layer_that_is_the_whole_model_has_its_mask_in_a_graph_too(p):
    layer = dk.nn.Dropout(p)
    dk.nn.name_sites(layer)  # its name is ""
    x = torch.ones(4, 16)
    with dk.masks(seed=3):
        eager = layer(x)
    with dk.masks(seed=3):
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), eager)
