"""What `scan` finds in a model, what it warns of, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropkit as dk
from dropkit.errors import OptionError

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))


class Calls(nn.Module):
    """Every way in which a forward may draw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.drop_rate = 0.25
        self.counted = 0

    def forward(self, x: Tensor) -> Tensor:
        self.counted += 1
        x = F.dropout(self.norm(x), self.drop_rate, self.training)
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
        x = F.alpha_dropout(x, 0.2)
        if self.training:
            x = x * torch.bernoulli(torch.full_like(x, 0.5))
        return x + 1


class By(nn.Module):
    """A forward that is one function."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], *children: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.children_ = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def traps(model: nn.Module, example: Any = None) -> dict[str, str]:
    return {finding.trap: finding.name for finding in dk.scan(model, example).warnings}


def test_calls_are_found_with_rate_and_modes_and_place() -> None:
    found = dk.scan(Calls(), X)
    assert found.ran
    rows = {(s.kind, s.what.rpartition(".")[2]): s for s in found.sites}
    dropout = rows["call", "dropout"]
    assert (dropout.rate, dropout.acts_in_train, dropout.acts_in_eval, dropout.acts_in_committee) == (
        0.25, True, False, False,
    )  # fmt: skip
    assert dropout.where.startswith("test_convert_scan.py:")
    attention = rows["call", "scaled_dot_product_attention"]
    assert (attention.rate, attention.acts_in_train, attention.acts_in_eval) == (0.1, True, True)
    alpha = rows["call", "alpha_dropout"]
    assert (alpha.rate, alpha.acts_in_train, alpha.acts_in_eval) == (0.2, False, False)
    bernoulli = rows["draw", "aten::bernoulli"]
    assert (bernoulli.rate, bernoulli.acts_in_train, bernoulli.acts_in_eval) == (None, True, False)
    assert len(found.sites) == 4


def test_nothing_is_changed_by_a_scan() -> None:
    class Plays(Calls):
        def forward(self, x: Tensor) -> Tensor:
            random.random()
            np.random.random()  # noqa: NPY002
            x.add_(1)
            return super().forward(x)

    model = Plays().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    example = X.clone()
    found = dk.scan(model, example)
    assert torch.equal(example, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert model.counted == 0
    assert model.training
    assert not model.norm.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {site.what for site in found.sites} >= {"Python's random", "Python's numpy.random"}


def test_layers_rates_and_modes_are_found_without_an_example() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Dropout(0.1).eval(),
            "b": dk.nn.Dropout(0.2),
            "c": nn.LSTM(4, 4, 2, dropout=0.3),
            "d": nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=False),
            "e": nn.RReLU(),
            "f": Calls(),
            "g": nn.LSTM(4, 4, 2),
        }
    )
    found = dk.scan(model)
    assert not found.ran
    rows = [(s.name, s.kind, s.rate, s.mode, s.acts_in_train, s.acts_in_committee) for s in found.sites]
    assert rows == [
        ("a", "module", 0.1, "eval", True, False),
        ("b", "module", 0.2, "train", True, True),
        ("c", "rate", 0.3, "train", True, False),
        ("d", "rate", 0.4, "train", True, False),
        ("e", "module", None, "train", True, False),
        ("f", "rate", 0.25, "train", None, False),
    ]
    assert "No example was run" in str(found)


def test_layers_of_other_packages_are_known_by_name_and_rate() -> None:
    class SwinDropPath(nn.Module):
        drop_prob = 0.3

        def forward(self, x: Tensor) -> Tensor:
            return x * x.new_empty(len(x), 1, 1).bernoulli_(0.7) / 0.7 if self.training else x

    model = nn.Sequential(SwinDropPath(), nn.Linear(8, 1))
    (site,) = dk.scan(model, X).sites
    assert (site.name, site.kind, site.rate, site.acts_in_train, site.acts_in_eval) == (
        "0",
        "module",
        0.3,
        True,
        False,
    )
    conversion = dk.convert(model)
    assert isinstance(conversion.model[0], dk.nn.DropPath)
    assert conversion.model[0].drop_prob == conversion.model[0].p == 0.3
    assert not conversion.left


def test_a_converted_model_acts_in_a_committee_at_every_site() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.LSTM(8, 8, 2, dropout=0.3)).eval()
    before, after = dk.scan(model, X), dk.scan(dk.convert(model).model, X)
    assert [site.name for site in after.sites] == [site.name for site in before.sites]
    assert not any(site.acts_in_committee for site in before.sites)
    assert all(
        site.acts_in_committee and site.acts_in_train and not site.acts_in_eval for site in after.sites
    )
    called = dk.scan(dk.convert(By(lambda m, x: F.dropout(x, 0.5, m.training) + 1)).model, X)
    assert [(s.what, s.acts_in_train, s.acts_in_eval, s.acts_in_committee) for s in called.sites] == [
        ("dropout, served by dropkit", True, False, True)
    ]


def test_the_same_line_in_a_loop_is_one_site() -> None:
    def loop(module: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.dropout(x, 0.5, module.training)
        return x + 1

    assert len(dk.scan(By(loop), X).sites) == 1


def test_examples_may_be_tuples_and_named() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, rate: float = 0.0) -> Tensor:
            return F.dropout(x, rate, self.training)

    assert not dk.scan(Two(), X).sites
    assert dk.scan(Two(), (X, 0.5)).sites[0].rate == 0.5
    assert dk.scan(Two(), {"x": X, "rate": 0.25}).sites[0].rate == 0.25


# --- silent failures --------------------------------------------------------------------------------------


def test_the_fast_path_is_named_where_torch_takes_it() -> None:
    assert traps(nn.TransformerEncoderLayer(8, 2, batch_first=True))["fast path"] == ""
    assert "fast path" in traps(nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True))
    for other in (
        nn.TransformerEncoderLayer(8, 2, batch_first=False),
        nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0),
        nn.TransformerEncoderLayer(9, 3, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, batch_first=True, activation=torch.tanh),
        dk.convert(nn.TransformerEncoderLayer(8, 2, batch_first=True)).model,
    ):
        assert "fast path" not in traps(other)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_dropout_of_a_single_recurrent_layer_is_named() -> None:
    assert traps(nn.Sequential(nn.GRU(8, 8, dropout=0.5)))["one layer"] == "0"
    (site,) = dk.scan(nn.GRU(8, 8, dropout=0.5), X).sites
    assert not site.acts_in_train
    assert "one layer" not in traps(nn.GRU(8, 8, 2, dropout=0.5))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), dk.nn.Dropout(0.5)], ids=["torch", "dropkit"])
@pytest.mark.parametrize("example", [None, X], ids=["without example", "run"])
def test_dropout_after_the_last_layer_is_named(layer: nn.Module, example: Tensor | None) -> None:
    assert traps(nn.Sequential(nn.Linear(8, 1), layer), example)["last layer"] == "1"
    assert "last layer" not in traps(nn.Sequential(nn.Linear(8, 1), layer, nn.Linear(1, 1)), example)


def test_a_call_after_the_last_layer_is_named_also_behind_a_view() -> None:
    assert traps(By(lambda m, x: F.dropout(x, 0.5, m.training).flatten(1)), X)["last layer"] == ""
    assert "last layer" not in traps(By(lambda m, x: F.dropout(x, 0.5, m.training) + 1), X)
    assert "last layer" in traps(By(lambda m, x: {"a": [F.dropout(x, 0.5, m.training)]}), X)


def test_batch_norm_is_named_where_train_would_move_it() -> None:
    assert traps(nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(5)))["batch norm"] == "1"
    assert "batch norm" not in traps(nn.Sequential(nn.BatchNorm1d(5)))
    assert "batch norm" not in traps(
        nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(5, track_running_stats=False))
    )


def test_dropout_that_is_always_on_is_named() -> None:
    assert traps(Calls(), X)["always on"] == ""
    assert "always on" in traps(By(lambda _, x: F.dropout(x, 0.5) + 1), X)
    assert "always on" not in traps(By(lambda m, x: F.dropout(x, 0.5, m.training) + 1), X)


def test_dropout_that_never_acts_is_named() -> None:
    assert traps(Calls(), X)["never on"] == ""
    model = By(lambda _, x: x + 1, nn.Dropout(0.5))
    assert traps(model, X)["not reached"] == "children_.0"
    assert "not reached" not in traps(By(lambda m, x: m.children_[0](x) + 1, nn.Dropout(0.5)), X)


def test_rates_that_switching_layers_does_not_reach_are_named() -> None:
    assert traps(nn.Sequential(nn.LSTM(8, 8, 2, dropout=0.5)))["hidden rate"] == "0"
    assert "hidden rate" in traps(Calls(), X)
    assert "hidden rate" not in traps(nn.Sequential(nn.Dropout(0.5)))
    assert "hidden rate" not in traps(dk.convert(nn.LSTM(8, 8, 2, dropout=0.5)).model)


# --- how it is said ---------------------------------------------------------------------------------------


def test_a_scan_prints_as_a_table() -> None:
    text = str(dk.scan(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)), X))
    head, row = text.splitlines()
    assert head.split() == ["site", "kind", "what", "rate", "mode", "train", "eval", "committee", "where"]
    assert row.split() == ["0", "module", "torch.nn.Dropout", "0.5", "train", "yes", "no", "no"]
    assert str(dk.scan(nn.Linear(8, 1), X)) == "No place was found where chance enters."


def test_an_example_that_does_not_fit_is_refused_in_the_models_words() -> None:
    model = nn.Sequential(nn.Linear(8, 1), nn.Dropout(0.1))
    with pytest.raises(OptionError, match=r"evaluation mode; it said: RuntimeError: mat1 and mat2 shapes"):
        dk.scan(model, torch.zeros(2, 3))
    with pytest.raises(OptionError, match=r"TypeError: .*unexpected keyword argument 'y'"):
        dk.scan(model, {"y": X})
    assert model[0].weight.grad is None


class TimeFirst(nn.Module):
    """A model that counts time along dimension 0, as many did before batch_first."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x.transpose(0, 1))
        return self.linear(F.dropout(x, 0.2, self.training))[-1]


def test_rows_that_are_not_dimension_0_are_named() -> None:
    findings = [finding for finding in dk.scan(TimeFirst(), X).warnings if finding.trap == "rows"]
    assert sorted(finding.name for finding in findings) == ["", "dropout"]
    assert "(5, 4, 8) for 4 rows" in findings[0].message
    assert "rows" not in traps(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)), X)
    assert "rows" not in traps(nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 1)), X)


@pytest.mark.parametrize("rows", [{"": 1}, None])
def test_rows_can_be_said(rows: dict[str, int] | None) -> None:
    model = TimeFirst().eval()
    network = dk.convert(model, rows=rows).model
    with dk.masks(seed=1, member=2):
        whole = network(X)
    with dk.masks(seed=1, member=2):
        swapped = network(X.flip(0)).flip(0)
    assert torch.allclose(whole, swapped, atol=1e-6) == (rows is not None)
    assert str(dk.restore(network)) == str(model)


def test_rows_of_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(OptionError, match="the model has no module 'encoder'"):
        dk.convert(TimeFirst(), rows={"encoder": 1})
    with pytest.raises(OptionError, match="a dimension is a whole number"):
        dk.convert(TimeFirst(), rows={"": -1})
