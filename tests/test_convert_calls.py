"""Each call that a converted model makes is the dropkit function of its meaning, at the address of its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropkit as dk
from dropkit.conversion.serve import SERVERS
from dropkit.conversion.source import read_class

X = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(1))
Q, K, V = (torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
MASK = torch.rand(4, 4, generator=torch.Generator().manual_seed(9)) > 0.3
MASK[:, 0] = True

dropout, channels = dk.functional.dropout, dk.functional.channel_dropout
attention = dk.functional.scaled_dot_product_attention

# A call as somebody's forward makes it, and what it is: (call of torch, call of dropkit at a site).
CALLS: dict[str, tuple[Callable[[bool], Any], Callable[[str], Any]]] = {
    "dropout": (lambda on: F.dropout(X, 0.3, on), lambda site: dropout(X, 0.3, site=site)),
    "dropout, named": (
        lambda on: F.dropout(input=X, p=0.3, training=on),
        lambda site: dropout(X, 0.3, site=site),
    ),
    "torch.dropout": (lambda on: torch.dropout(X, 0.3, on), lambda site: dropout(X, 0.3, site=site)),
    "torch.dropout, named": (
        lambda on: torch.dropout(X, p=0.3, train=on),
        lambda site: dropout(X, 0.3, site=site),
    ),
    "torch.dropout_": (
        lambda on: torch.dropout_(X.clone(), 0.3, on),
        lambda site: dropout(X, 0.3, site=site),
    ),
    "in place": (
        lambda on: F.dropout(X.clone(), 0.3, on, True),
        lambda site: dropout(X.clone(), 0.3, site=site),
    ),
    "dropout1d": (
        lambda on: F.dropout1d(X[:, :, 0], 0.3, on),
        lambda site: channels(X[:, :, 0], 0.3, site=site),
    ),
    "dropout1d, alone": (
        lambda on: F.dropout1d(X[0, 0], 0.3, on),
        lambda site: channels(X[:1, 0], 0.3, site=site)[0],
    ),
    "dropout2d": (lambda on: F.dropout2d(X, 0.3, on), lambda site: channels(X, 0.3, site=site)),
    "dropout3d": (
        lambda on: F.dropout3d(X[:, None], 0.3, on),
        lambda site: channels(X[:, None], 0.3, site=site),
    ),
    "dropout3d, alone": (
        lambda on: F.dropout3d(X, 0.3, on),
        lambda site: channels(X[None], 0.3, site=site)[0],
    ),
    "feature_dropout": (
        lambda on: torch.feature_dropout(X, 0.3, on),
        lambda site: channels(X, 0.3, site=site),
    ),
    "alpha": (
        lambda on: F.alpha_dropout(X, 0.3, on),
        lambda site: dk.functional.alpha_dropout(X, 0.3, site=site),
    ),
    "feature_alpha": (
        lambda on: F.feature_alpha_dropout(X, 0.3, on),
        lambda site: dk.functional.feature_alpha_dropout(X, 0.3, site=site),
    ),
    "attention": (
        lambda on: F.scaled_dot_product_attention(Q, K, V, dropout_p=0.3 if on else 0.0),
        lambda site: attention(Q, K, V, dropout_p=0.3, site=site),
    ),
    "attention, masked": (
        lambda on: F.scaled_dot_product_attention(Q, K, V, MASK, 0.3 if on else 0.0, scale=0.5),
        lambda site: attention(Q, K, V, MASK, 0.3, scale=0.5, site=site),
    ),
    "attention, grouped": (
        lambda on: F.scaled_dot_product_attention(
            Q, K[:, :1], V[:, :1], dropout_p=0.3 if on else 0.0, is_causal=True, enable_gqa=True
        ),
        lambda site: attention(Q, K[:, :1], V[:, :1], None, 0.3, True, enable_gqa=True, site=site),
    ),
}


class Caller(nn.Module):
    """Somebody's module around one call."""

    def __init__(self, call: Callable[[bool], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self) -> Any:
        return self.call(self.training)


def converted(call: Callable[[bool], Any], rate_is_known: bool = False) -> nn.Module:
    class Model(Caller):
        def forward(self) -> Any:
            F.dropout(X, 0.0, self.training)  # by which the class is seen to call something
            return self.call(True if rate_is_known else self.training)

    return dk.convert(Model(call)).model


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_the_dropkit_function(name: str) -> None:
    call, ours = CALLS[name]
    site = ":attention" if name.startswith("attention") else ":dropout"
    network = converted(call)
    with dk.masks(seed=2, step=5):
        expected = ours(site)
    with dk.masks(seed=2, step=5) as context:
        assert torch.equal(network(), expected)
    assert context.drawn == (site,)


@pytest.mark.parametrize("name", CALLS)
def test_in_evaluation_a_call_acts_for_a_member_alone(name: str) -> None:
    call, ours = CALLS[name]
    site = ":attention" if name.startswith("attention") else ":dropout"
    network = converted(call).eval()
    assert torch.equal(network(), call(False))
    with dk.masks(seed=2):
        assert torch.equal(network(), call(False))
    if name.startswith("attention"):
        return  # the rate is hidden from the call in evaluation; the mode's gate is tested with models
    with dk.masks(seed=2, member=7):
        expected = ours(site)
    with dk.masks(seed=2, member=7):
        assert torch.equal(network(), expected)


def test_calls_in_one_forward_are_told_apart_by_their_order() -> None:
    network = converted(lambda on: (F.dropout(X, 0.5, on), F.dropout(X, 0.5, on)))
    with dk.masks(seed=2):
        first, second = network()
    assert not torch.equal(first, second)
    with dk.masks(seed=2):
        assert all(torch.equal(a, b) for a, b in zip((first, second), network(), strict=True))


def test_outside_of_masks_torchs_generator_decides() -> None:
    network = converted(lambda on: F.dropout(X, 0.5, on))
    torch.manual_seed(4)
    first = network()
    torch.manual_seed(4)
    assert torch.equal(network(), first)
    assert not torch.equal(network(), first)


def test_a_dropped_infinity_is_0() -> None:
    network = converted(lambda on: F.dropout(torch.full((64, 8), torch.inf), 0.5, on))
    with dk.masks(seed=2):
        assert not network().isnan().any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_dropped_infinity_is_0_between_recurrent_layers(packed: bool) -> None:
    layers = nn.RNN(2, 2, 2, dropout=1.0, nonlinearity="relu", batch_first=True)
    for weight in layers.parameters():
        nn.init.ones_(weight)
    x = torch.full((3, 4, 2), torch.inf)
    given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True) if packed else x
    steps, _ = dk.convert(layers).model(given)
    assert (steps.data if packed else steps).isfinite().all()


def test_under_another_function_mode_attention_is_still_served() -> None:
    network = dk.convert(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)).model.eval()
    x = X[..., 0].repeat(1, 1, 2)[..., :8]
    with torch.no_grad(), dk.masks(seed=2, member=1):
        expected = network(x, x, x)[0]
    with torch.no_grad(), torch.device("cpu"), dk.masks(seed=2, member=1):
        assert torch.equal(network(x, x, x)[0], expected)


def test_checkpointing_makes_the_same_masks_again() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.linear(x), 0.5, self.training).square()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, again: bool) -> Tensor:
            if again:
                return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
            return self.block(x)

    network = dk.convert(Model()).model
    gradients = []
    for again in (False, True):
        network.zero_grad()
        with dk.masks(seed=2, step=1):
            network(X, again).sum().backward()
        gradients.append(network.block.linear.weight.grad)
    assert torch.equal(*gradients)


# torch's own list leaves out the functions that write in place; one of them is among the calls above.
LISTED = sorted((f for f in SERVERS if not f.__name__.endswith("_")), key=lambda f: f.__name__)


@pytest.mark.parametrize("function", LISTED, ids=lambda f: f.__name__)
def test_the_calls_served_are_functions_that_torch_hands_to_modes(function: Any) -> None:
    """A function that torch renamed would never be met, and its dropout would be torch's."""
    assert function in torch.overrides.get_testing_overrides()


# --- what is read in the code -----------------------------------------------------------------------------


def drops(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p, training)


def shakes(x: Tensor, training: bool) -> Tensor:
    return x * torch.rand_like(x) if training else x


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return drops(x, 0.1, self.training)


class ByMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return shakes(x, training=self.training)


class OwnChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        torch.nn.init.normal_(torch.empty(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x)


class Gated(nn.Module):
    def forward(this, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.0 if not this.training else 0.1)


class GatedByIf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 1 and self.training:
            x = F.dropout(x, 0.1)
        return x


class IfWithMore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = F.dropout(x, 0.1)
            self.count(x)
        return x

    def count(self, x: Tensor) -> None: ...


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1 if self.training else 0.0)
        return x if self.training else x.softmax(-1)


@pytest.mark.parametrize(
    ("cls", "answered", "draws", "gated", "by_mode"),
    [
        (Plain, (), 0, False, False),
        (ByFunction, ("dropout",), 0, False, False),
        (ByMethod, (), 1, False, False),
        (OwnChild, (), 0, False, False),
        (Gated, ("scaled_dot_product_attention",), 0, True, True),
        (GatedByIf, ("dropout",), 0, True, True),
        (IfWithMore, ("dropout",), 0, False, False),
        (Decides, ("dropout",), 0, True, False),
    ],
)
def test_a_class_is_read(
    cls: type[nn.Module], answered: tuple[str, ...], draws: int, gated: bool, by_mode: bool
) -> None:
    reading = read_class(cls)
    assert reading.answered == answered
    assert len(reading.draws) == draws
    assert (reading.gated, reading.gated_by_mode) == (gated, by_mode)
    assert reading.readable
