"""Dropout put where a model has none: where it lands, what it changes, what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import DropkitWarning, OptionError, ShapeError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


def layer() -> nn.Module:
    return dk.nn.Dropout(0.3)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).eval()


@pytest.mark.parametrize("after", [nn.ReLU, (nn.ReLU, nn.GELU), "[13]"])
def test_a_layer_follows_every_place_that_fits(after: Any) -> None:
    model = plain()
    conversion = dk.insert(model, after=after, layer=layer)
    assert [change.name for change in conversion.replaced] == ["1", "3"]
    assert list(conversion.model.state_dict()) == list(model.state_dict())
    assert "stay as they were" in conversion.notes[0]
    assert torch.equal(conversion.model(X), model(X))
    with dk.masks(seed=0, step=1) as context:
        found = conversion.model.train()(X)
    assert context.drawn == ("1.dropkit_dropout", "3.dropkit_dropout")
    h = X
    with dk.masks(seed=0, step=1):
        for name, module in model.named_children():
            h = module(h)
            if name in ("1", "3"):
                h = dk.functional.dropout(h, 0.3, site=f"{name}.dropkit_dropout")
    torch.testing.assert_close(found, h)


def test_a_committee_of_a_model_that_had_no_dropout() -> None:
    samples = dk.Committee(dk.insert(plain(), nn.ReLU, layer).model, members=8).samples(X)
    assert (samples.var(0) > 0).all()


def test_restore_takes_the_layers_out_again() -> None:
    model = plain()
    restored = dk.restore(dk.insert(model, nn.ReLU, layer))
    assert str(restored) == str(model)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert [vars(m).keys() for m in restored.modules()] == [vars(m).keys() for m in model.modules()]
    assert torch.equal(restored(X), model(X))


def test_inserting_and_converting_go_together_in_any_order() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1)).eval()
    one = dk.convert(dk.insert(model, nn.ReLU, layer).model).model
    other = dk.insert(dk.convert(model).model, nn.ReLU, layer).model
    with dk.masks(seed=0, member=1), torch.no_grad():
        expected = one(X)
    with dk.masks(seed=0, member=1), torch.no_grad():
        assert torch.equal(other(X), expected)
    for network in (one, other):
        assert str(dk.restore(network)) == str(model)


def test_a_sequential_is_followed_by_one_more_child() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)).eval()
    conversion = dk.insert(model, "0", layer)
    assert isinstance(conversion.model[0][2], dk.nn.Dropout)
    assert str(dk.restore(conversion)) == str(model)


def test_the_first_of_several_outputs_is_dropped() -> None:
    model = nn.LSTM(8, 4)
    followed = dk.insert(nn.Sequential(model, nn.Linear(4, 1)), nn.LSTM, layer).model[0]
    with dk.masks(seed=0, step=1):
        steps, states = followed(X)
    plain_steps, plain_states = model(X)
    assert (steps == 0).any()
    assert torch.equal(states[0], plain_states[0])
    assert torch.equal(steps[steps != 0] > 0, plain_steps[steps != 0] > 0)


def test_an_output_that_nothing_can_follow_is_an_error() -> None:
    class Says(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    with pytest.raises(ShapeError, match="Says gave a dict"):
        dk.insert(nn.Sequential(Says(), nn.Identity()), Says, layer).model(X)


def test_the_inference_path_of_transformers_does_not_skip_what_was_inserted() -> None:
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 1)
    ).eval()
    network = dk.insert(model, "0.linear1", layer).model
    x = X.unsqueeze(0)
    with torch.no_grad(), dk.masks(seed=0, member=1) as context:
        network(x)
    assert context.drawn == ("0.linear1.dropkit_dropout",)


def test_parameters_of_a_layer_add_keys_and_this_is_said() -> None:
    conversion = dk.insert(plain(), "1", lambda: nn.Linear(16, 16))
    assert "New keys of the state dict: 1.dropkit_dropout.weight, 1.dropkit_dropout.bias." in conversion.notes


def test_dropout_before_batch_norm_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    notes = dk.insert(model, "0", layer).notes
    assert any(
        "'0' stands right before the BatchNorm '1'" in note and "variance shift" in note for note in notes
    )
    assert not any("BatchNorm" in note for note in dk.insert(model, "2", layer).notes)


def test_dropout_after_the_last_layer_is_warned_of() -> None:
    with pytest.warns(DropkitWarning, match="'4' is the last layer of the model"):
        conversion = dk.insert(plain(), nn.Linear, layer)
    assert any("'4' is the last layer" in note for note in conversion.notes)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (nn.GELU, r"no module with GELU; its modules are 0, 1, 2, 3, 4"),
        ("blocks.*", r"no module with a name like 'blocks\.\*'"),
        (nn.functional.relu, r"after=<function relu"),
        (3, r"after=3 was given; a class of modules or a pattern"),
        ((), r"after=\(\) was given"),
    ],
)
def test_places_that_do_not_exist(after: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dk.insert(plain(), after, layer)


def test_what_is_no_layer_and_what_cannot_be_followed() -> None:
    with pytest.raises(OptionError, match=r"layer\(\) gave a float"):
        dk.insert(plain(), nn.ReLU, lambda: 0.5)
    with pytest.raises(OptionError, match=r"'0' is a torch\.nn\.ModuleList, after which nothing can be put"):
        dk.insert(nn.Sequential(nn.ModuleList([nn.ReLU()])), nn.ModuleList, layer)
    once = dk.insert(plain(), nn.ReLU, layer).model
    with pytest.raises(OptionError, match="'1' is followed by a layer already"):
        dk.insert(once, nn.ReLU, layer)
