"""A converted model is the model it was, with masks that have addresses; and it can be had back."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropkit as dk
from dropkit.conversion import frames
from dropkit.errors import NoMaskError, OptionError
from dropkit.nn.layer import StochasticLayer


class Last(nn.Module):
    """A sequence model's last step, so that rows come first in the answer."""

    def __init__(self, body: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.body = body
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x if self.batch_first else x.transpose(0, 1))
        y = y[0] if isinstance(y, tuple) else y
        return y[:, -1] if self.batch_first else y[-1]


class Functional(nn.Module):
    """Dropout by calls: the rate on every path that code takes to hand it on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(5)
        self.rate = 0.4

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norm(self.first(x)), self.rate, training=self.training)
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=self.rate if self.training else 0.0)
        if self.training and self.rate > 0:
            h = F.dropout(h, p=0.2)
        return h.mean(1)


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first)
    return Last(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), batch_first)


def decoder() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x)[:, 0]

    return Decoder()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 3)),
    "channels": lambda: nn.Sequential(nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(40, 3)),
    "images": lambda: nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(40, 3)
    ),
    "volumes": lambda: nn.Sequential(
        nn.Unflatten(1, (5, 1, 1)), nn.Dropout3d(0.3), nn.Flatten(), nn.Linear(40, 3)
    ),
    "alpha": lambda: nn.Sequential(nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.2), nn.Linear(8, 3)),
    "lstm": lambda: Last(nn.LSTM(8, 6, 3, dropout=0.4, batch_first=True, bidirectional=True), True),
    "gru": lambda: Last(nn.GRU(8, 6, 2, dropout=0.4, bias=False), False),
    "rnn": lambda: Last(nn.RNN(8, 6, 2, dropout=0.4, nonlinearity="relu"), False),
    "encoder": lambda: encoder(True),
    "encoder, time first": lambda: encoder(False),
    "decoder": decoder,
    "functional": Functional,
}
HIDDEN = ("lstm", "gru", "rnn", "functional")  # where switching dropout layers to train() finds nothing


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    network = MODELS[request.param]().eval()
    for module in network.modules():
        if isinstance(module, nn.RNNBase):  # as they start, little of the first layer reaches the output
            for weight in module.parameters():
                nn.init.uniform_(weight, -1, 1)
    return network


X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(2))


def as_member(network: nn.Module, x: Tensor, member: int = 1) -> Tensor:
    with torch.no_grad(), dk.masks(seed=3, member=member):
        return network(x)


def test_in_evaluation_nothing_changes(model: nn.Module) -> None:
    converted = dk.convert(model).model
    with torch.no_grad():
        # The transformers' inference path rounds otherwise, and is not taken.
        torch.testing.assert_close(converted(X), model(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(converted(X), model(X), rtol=0, atol=0)


def test_weights_modes_and_keys_are_kept_and_the_model_is_left_alone(model: nn.Module) -> None:
    before = [type(module) for module in model.modules()]
    next(model.children()).train()
    converted = dk.convert(model).model
    assert [type(module) for module in model.modules()] == before
    assert list(converted.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value)
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    assert not {id(p) for p in converted.parameters()} & {id(p) for p in model.parameters()}
    for mine, theirs in zip(converted.modules(), model.modules(), strict=True):
        assert isinstance(mine, (type(theirs), StochasticLayer))


def test_restore_gives_the_model_back(model: nn.Module) -> None:
    converted = dk.convert(model).model
    restored = dk.restore(converted)
    assert str(restored) == str(model)
    for mine, theirs in zip(restored.modules(), model.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert vars(mine).keys() == vars(theirs).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
    restored.train()
    model.train()
    torch.manual_seed(0)
    theirs = model(X)
    torch.manual_seed(0)
    assert torch.equal(restored(X), theirs)  # the same stream of random numbers is read


def test_a_member_is_one_function_whatever_the_batch(model: nn.Module) -> None:
    network = dk.convert(model).model
    whole = as_member(network, X)
    for rows in ([0], [4, 2], [5, 0, 3, 1]):
        torch.testing.assert_close(as_member(network, X[rows]), whole[rows], rtol=1e-4, atol=1e-5)
    assert torch.equal(as_member(network, X), whole)
    assert not torch.allclose(as_member(network, X, 2), whole, atol=1e-4)


def test_training_noise_does_not_depend_on_how_a_batch_is_split(model: nn.Module) -> None:
    network = dk.convert(model).model.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    with dk.masks(seed=3, step=7):
        whole = network(X)
    with dk.masks(seed=3, step=7, row_offset=2):
        torch.testing.assert_close(network(X[2:]), whole[2:], rtol=1e-4, atol=1e-5)
    with dk.masks(seed=3, step=8):
        assert not torch.allclose(network(X), whole, atol=1e-4)


def test_a_committee_has_spread_and_its_members_are_those_of_masks(model: nn.Module) -> None:
    committee = dk.Committee(dk.convert(model).model, members=6, seed=3, tile=4)
    samples = committee.samples(X)
    assert (samples.var(0) > 0).any(1).all()
    torch.testing.assert_close(samples[1], as_member(dk.convert(model).model, X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples[2], committee.member(2)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_usual_recipe_has_no_spread_where_a_committee_has(name: str) -> None:
    network = MODELS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
    with torch.no_grad():
        assert torch.equal(network(X), network(X))


def test_the_inference_path_of_transformers_skips_dropout_but_for_a_converted_model() -> None:
    network = encoder(True).eval()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with torch.no_grad():
        assert torch.equal(network(X), network(X))
    network = dk.convert(encoder(True).eval()).model
    assert not torch.allclose(as_member(network, X, 1), as_member(network, X, 2), atol=1e-3)


def test_gradients_reach_every_weight_through_a_member(model: nn.Module) -> None:
    network = dk.convert(model).model
    with dk.masks(seed=3, member=1):
        network(X).square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_the_modules_inside_stay_in_evaluation_for_a_member() -> None:
    network = dk.convert(Functional().eval()).model
    seen: list[bool] = []
    network.norm.register_forward_hook(lambda module, _i, _o: seen.append(module.training))
    before = network.norm.running_mean.clone()
    as_member(network, X)
    assert seen == [False]
    assert torch.equal(network.norm.running_mean, before)
    assert not network.training


def test_the_mode_is_shown_as_training_only_to_the_code_of_the_module_itself() -> None:
    mode_of = operator.attrgetter("training")  # written so, it is not read as a decision of the code

    class Inner(nn.Module):
        def forward(self, x: Tensor, outer: nn.Module) -> Tensor:
            seen.append((mode_of(self), mode_of(outer)))
            return F.dropout(x, 0.1 if self.training else 0.0)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, p=0.1 if self.training else 0.0)
            return self.inner(x, self)

    seen: list[tuple[bool, bool]] = []
    network = dk.convert(Outer().eval()).model
    as_member(network, X)
    assert seen == [(True, False)]
    network(X)
    assert seen[1:] == [(False, False)]


def test_a_mode_that_decides_other_things_too_is_left_alone_and_said() -> None:
    class Auxiliary(nn.Module):
        def forward(self, x: Tensor) -> Any:
            x = F.dropout(x, p=0.5 if self.training else 0.0)
            return (x, x) if self.training else x

    conversion = dk.convert(Auxiliary().eval())
    assert isinstance(as_member(conversion.model, X), Tensor)
    assert "silent for a member" in conversion.left[0].why


def test_random_numbers_of_other_kinds_are_left_and_said() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.blurred(x) if self.training else x

        def blurred(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    conversion = dk.convert(nn.Sequential(Noisy(), nn.Dropout(0.1), nn.Linear(8, 1)))
    assert [(left.name, left.what.split()[0]) for left in conversion.left] == [("0", "torch.randn_like")]
    assert "torch.randn_like" in str(conversion)


# --- along which dimension rows are counted --------------------------------------------------------------


@pytest.mark.parametrize("context", [{"member": 4}, {"step": 5}], ids=["member", "step"])
@pytest.mark.parametrize("kind", ["encoder", "lstm"])
def test_time_first_and_batch_first_are_the_same_model(kind: str, context: dict[str, int]) -> None:
    def build(batch_first: bool) -> nn.Module:
        torch.manual_seed(5)
        if kind == "lstm":
            return Last(nn.LSTM(8, 6, 2, dropout=0.5, batch_first=batch_first), batch_first)
        return encoder(batch_first)

    answers = []
    for batch_first in (True, False):
        network = dk.convert(build(batch_first)).model.train("step" in context)
        with torch.no_grad(), dk.masks(seed=1, **context):
            answers.append(network(X))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_sequence_alone_is_row_0(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first)
    network = dk.convert(layer).model
    alone = X[0]
    together = alone.unsqueeze(0 if batch_first else 1)
    with dk.masks(seed=1, step=2):
        expected = network(together).squeeze(0 if batch_first else 1)
    with dk.masks(seed=1, step=2):
        torch.testing.assert_close(network(alone), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), member=st.sampled_from([None, 3]))
def test_a_packed_sequence_has_the_masks_of_the_padded_one(lengths: list[int], member: int | None) -> None:
    torch.manual_seed(0)
    network = dk.convert(nn.LSTM(8, 4, 3, dropout=0.5, batch_first=True)).model
    x = X[: len(lengths)]
    packed = nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    with dk.masks(seed=1, step=2, member=member):
        padded, _ = network(x)
    with dk.masks(seed=1, step=2, member=member):
        steps, (hidden, _) = network(packed)
    unpacked, _ = nn.utils.rnn.pad_packed_sequence(steps, batch_first=True)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(unpacked[row, :length], padded[row, :length], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden[-1, row], padded[row, length - 1], rtol=1e-4, atol=1e-5)


def test_states_of_all_layers_and_directions_come_back_in_their_places() -> None:
    # A rate that rounds to 0 drops nothing, yet takes the way through the layers one by one.
    for build in (nn.LSTM, nn.GRU, nn.RNN):
        torch.manual_seed(0)
        network = build(8, 6, 3, dropout=1e-12, bidirectional=True)
        converted = dk.convert(network).model
        start = torch.randn(6, 5, 6)
        hidden = (start, torch.randn(6, 5, 6)) if build is nn.LSTM else start
        torch.testing.assert_close(converted(X, hidden), network(X, hidden), rtol=1e-5, atol=1e-6)


def test_attention_has_the_same_masks_with_and_without_its_weights() -> None:
    network = dk.convert(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)).model.eval()
    answers = []
    for need_weights in (True, False):
        with torch.no_grad(), dk.masks(seed=1, member=2):
            answers.append(network(X, X, X, need_weights=need_weights)[0])
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[0], network(X, X, X)[0], atol=1e-3)


@pytest.mark.parametrize(("layer", "alone"), [(nn.Dropout1d, (4, 9)), (nn.Dropout3d, (4, 2, 3, 2))])
def test_one_image_without_its_batch_is_row_0(layer: type[nn.Module], alone: tuple[int, ...]) -> None:
    network = dk.convert(layer(0.5)).model
    with dk.masks(seed=1, step=2):
        expected = network(torch.ones(1, *alone))[0]
    with dk.masks(seed=1, step=2):
        assert torch.equal(network(torch.ones(alone)), expected)
    assert {float(value) for value in expected.flatten(1).std(1)} == {0.0}  # whole maps


# --- structure --------------------------------------------------------------------------------------------


def test_a_module_in_two_places_stays_one_module() -> None:
    tied = nn.Dropout(0.5)
    converted = dk.convert(nn.Sequential(tied, nn.Linear(8, 8), tied, nn.Linear(8, 1))).model
    assert converted[0] is converted[2]
    assert isinstance(converted[0], dk.nn.Dropout)
    restored = dk.restore(converted)
    assert restored[0] is restored[2]
    assert type(restored[0]) is nn.Dropout


def test_hooks_stay_with_their_places() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Dropout(0.5), nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True))
    model[0].register_forward_hook(lambda module, _i, _o: calls.append(type(module).__module__))
    model[0].register_forward_pre_hook(lambda module, _i: calls.append("before"))
    converted = dk.convert(model).model
    converted[0](X)
    assert calls == ["before", "dropkit.nn.features"]
    dk.restore(converted)[0](X)
    assert calls[2:] == ["before", "torch.nn.modules.dropout"]


def test_restore_takes_the_weights_and_modes_of_now() -> None:
    converted = dk.convert(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()).model
    with torch.no_grad():
        converted[0].weight.fill_(2.0)
    restored = dk.restore(converted.eval())
    assert (restored[0].weight == 2.0).all()
    assert not restored[1].training
    with torch.no_grad():
        restored[0].weight.fill_(3.0)
    assert (converted[0].weight == 2.0).all()


def test_a_model_that_is_a_dropout_layer() -> None:
    conversion = dk.convert(nn.Dropout(0.5).eval())
    assert isinstance(conversion.model, dk.nn.Dropout)
    assert not torch.equal(as_member(conversion.model, X), X)
    assert type(dk.restore(conversion).train()) is nn.Dropout


def test_converting_twice_changes_nothing_more() -> None:
    once = dk.convert(encoder(True))
    with pytest.raises(NoMaskError):
        dk.convert(nn.Linear(2, 2))
    network = nn.Sequential(once.model, nn.Dropout(0.1), nn.Linear(8, 1)).eval()
    twice = dk.convert(network)
    assert [change.name for change in twice.replaced] == ["1"]
    assert [type(m).__name__ for m in twice.model[0].modules()] == [
        type(m).__name__ for m in once.model.modules()
    ]
    # Sites have the names of the larger model, so two converted parts do not meet.
    pair = nn.Sequential(once.model, nn.Unflatten(1, (1, 8)), copy.deepcopy(once.model)).eval()
    dk.nn.name_sites(pair)
    with dk.masks(seed=0, member=1) as context, torch.no_grad():
        pair(X)
    assert len([name for name in context.drawn if name.startswith("2.")]) == 8


def test_layers_of_dropkit_are_left_as_they_are() -> None:
    model = nn.Sequential(dk.nn.LockedDropout(0.1), dk.nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True))
    conversion = dk.convert(model)
    assert [type(m) for m in conversion.model.modules()] == [type(m) for m in model.modules()]
    assert not conversion.replaced
    assert conversion.notes == ("The model's dropout is dropkit's already.",)


def test_a_rate_that_other_code_reads_stays_readable() -> None:
    converted = dk.convert(nn.Sequential(nn.Dropout(0.25))).model
    assert converted[0].p == 0.25


def test_a_copy_and_functional_call_draw_like_the_model(model: nn.Module) -> None:
    network = dk.convert(model).model
    expected = as_member(network, X)
    assert torch.equal(as_member(copy.deepcopy(network), X), expected)
    weights = dict(network.named_parameters()) | dict(network.named_buffers())
    with torch.no_grad(), dk.masks(seed=3, member=1):
        torch.testing.assert_close(torch.func.functional_call(network, weights, (X,)), expected)


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind_when_a_forward_stops(stop: type[BaseException]) -> None:
    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            F.dropout(x, 0.5, self.training)
            raise stop

    network = dk.convert(Stops()).model
    with pytest.raises(stop):
        network(X)
    assert frames.current() is None
    torch.manual_seed(0)
    plain = F.dropout(X, 0.5)
    torch.manual_seed(0)
    assert torch.equal(nn.Dropout(0.5)(X), plain)


def test_only_the_converted_model_is_served() -> None:
    class Calls(nn.Module):
        def __init__(self, other: list[nn.Module]) -> None:
            super().__init__()
            self.other = other

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    plain = Calls([]).eval()
    network = dk.convert(plain).model
    with dk.masks(seed=3, member=1):
        assert torch.equal(plain(X), X)
        assert not torch.equal(network(X), X)


def test_threads_ask_for_members_of_their_own(model: nn.Module) -> None:
    network = dk.convert(model).model
    expected = [as_member(network, X, k) for k in range(4)]
    found: dict[int, bool] = {}

    def ask(member: int) -> None:
        # Another thread may sum with another number of threads, so in another order; another mask moves much more.
        again = [as_member(network, X, member) for _ in range(5)]
        found[member] = all(torch.allclose(y, expected[member], rtol=1e-5, atol=1e-6) for y in again)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_a_modules_list_of_hidden_layers_is_served_as_well() -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = (nn.Dropout(0.5),)

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](F.dropout(x, 0.1, self.training))

    network = dk.convert(Hides().eval()).model
    network.hidden[0].eval()
    with dk.masks(seed=3, member=1) as context:
        network(X)
    assert context.drawn == (":dropout",)
    assert context._calls == {":dropout": 2}


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [dk.convert, dk.restore, dk.scan])
def test_what_is_no_module_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(OptionError, match=r"a dict was given; a torch\.nn\.Module is needed"):
        call({"weight": 1})


def test_a_model_in_which_nothing_draws_is_refused() -> None:
    with pytest.raises(NoMaskError, match=r"nothing draws a mask.*dropkit\.insert"):
        dk.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))


def test_what_was_not_converted_cannot_be_restored() -> None:
    with pytest.raises(OptionError, match="nothing to restore"):
        dk.restore(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)))


def test_a_model_that_cannot_be_copied_is_refused_in_its_own_words() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    model.weight = torch.ones(2, requires_grad=True) * 2  # not a leaf: torch refuses to copy it
    with pytest.raises(OptionError, match="cannot be copied: Only Tensors created explicitly"):
        dk.convert(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_scripted_modules_are_left_and_said() -> None:
    scripted = torch.jit.trace(nn.Dropout(0.5).eval(), X)
    conversion = dk.convert(nn.Sequential(scripted, nn.Dropout(0.1)))
    assert [left.name for left in conversion.left] == ["0"]
    assert "outside of Python" in conversion.left[0].why
