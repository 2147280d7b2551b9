"""A committee on disk: every member comes back, bit for bit, and nothing that is read is trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import dropkit as dk
from dropkit.committee import Committee
from dropkit.committee.saving import RECIPE, WEIGHTS, load, read_committee, save
from dropkit.directory import COMMITTEE, read_directory, write_directory
from dropkit.errors import ModelDirectoryError, OptionError, OutputError


def build(seed: int = 0, p: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), dk.nn.Dropout(p), nn.Linear(8, 8), nn.Dropout(0.5),
        nn.Linear(8, 1),
    )  # fmt: skip


class Tied(nn.Module):
    """Two names for one weight, rates in a tensor, a rate that follows a schedule, and attention of torch."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.drop = dk.nn.Dropout(torch.linspace(0.1, 0.4, 4) + rate)
        self.grown = dk.nn.Dropout(dk.nn.schedules.linear(0.0, 0.5, 10))
        self.attend = nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grown(self.second(self.drop(torch.tanh(self.first(x)))))[:, None]
        return self.attend(h, h, h)[0][:, 0] + h[:, 0]


@pytest.mark.parametrize("likelihood", ["point", "categorical"])
def test_every_member_comes_back_bit_for_bit(tmp_path: Path, likelihood: Any) -> None:
    network = build() if likelihood == "point" else Tied()
    committee = Committee(
        network, members=5, seed=2**64 - 1, likelihood=likelihood, tile=7, per_row=likelihood == "point"
    )
    given = (Tied if likelihood == "categorical" else build)()
    with torch.no_grad():
        for weight in given.parameters():
            weight += 1
    before = {name: value.clone() for name, value in given.state_dict().items()}
    again = load(save(committee, tmp_path / "c"), given)
    x = torch.randn(20, 4 if likelihood == "categorical" else 3)
    assert torch.equal(again.samples(x), committee.samples(x))
    settings = ("members", "seed", "likelihood", "tile", "memory", "per_row", "allow")
    assert [getattr(again, name) for name in settings] == [getattr(committee, name) for name in settings]
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_rates_come_back_whatever_the_given_model_has(tmp_path: Path) -> None:
    committee = Committee(build(p=0.25), members=4)
    x = torch.randn(6, 3)
    assert torch.equal(
        load(save(committee, tmp_path / "a"), lambda: build(1, p=0.7)).samples(x), committee.samples(x)
    )
    tied = Committee(Tied(0.2), members=4, likelihood="categorical")
    again = load(save(tied, tmp_path / "b"), Tied)
    x = torch.randn(6, 4)
    assert torch.equal(again.samples(x), tied.samples(x))
    assert again.network.attend.dropout == 0.2  # type: ignore[union-attr]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    recipe, weights = read_committee(save(Committee(Tied(), members=2), tmp_path / "c"))
    stored = {tensor.name: tensor.same_as for tensor in recipe.tensors}
    assert stored["second.weight"] == "first.weight"
    assert "second.weight" not in weights
    assert set(stored.values()) == set(weights)


def test_a_fresh_process_has_the_same_members(tmp_path: Path) -> None:
    committee = Committee(build(), members=3, seed=5)
    save(committee, tmp_path / "c")
    x = torch.linspace(-1, 1, 30).reshape(10, 3)
    (tmp_path / "model.py").write_text(
        "from torch import nn\nimport dropkit as dk\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), dk.nn.Dropout(0.9), nn.Linear(8, 8),\n"
        "                         nn.Dropout(0.1), nn.Linear(8, 1))\n"
    )
    script = (
        "import json, sys, torch; sys.path.insert(0, sys.argv[1]); from model import build\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from dropkit.committee.saving import load\n"
        "c = load(sys.argv[1] + '/c', build); x = torch.linspace(-1, 1, 30).reshape(10, 3)\n"
        "print(json.dumps([[float(v) for v in m.flatten()] for m in c.samples(x)]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    told = torch.tensor(json.loads(ran.stdout), dtype=torch.float64).float()
    assert torch.equal(told, committee.samples(x).flatten(1))


# --- what is read is not trusted --------------------------------------------------------------------------------------


def altered(tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A directory with valid digests whose contents were changed."""
    whole = save(Committee(build(), members=2), tmp_path / "whole")
    files = read_directory(whole, COMMITTEE)
    recipe, (_, weights) = files.json(RECIPE), read_committee(whole)
    change(recipe, weights)
    contents = {RECIPE: recipe, WEIGHTS: to_bytes(weights)}
    return write_directory(tmp_path / "altered", contents, kind=COMMITTEE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, w: r.update(scheme=2), "scheme 2; this release draws scheme 1"),
        (lambda r, w: r.update(members=1), "members=1"),
        (lambda r, w: r.update(members=True), "members is True"),
        (lambda r, w: r.update(seed=-1), "seed=-1"),
        (lambda r, w: r.update(likelihood="poisson"), "likelihood is 'poisson'"),
        (lambda r, w: r.update(tile=0), "tile=0"),
        (lambda r, w: r.update(allow=["everything"]), "allow="),
        (lambda r, w: r.update(more=1), "parts of a Recipe"),
        (lambda r, w: r.pop("sites"), "parts of a Recipe"),
        (lambda r, w: r["sites"].pop(), "of its sites, '5'"),
        (lambda r, w: r["sites"][0].update(name="nine"), "of its sites"),
        (lambda r, w: r["sites"][0].update(layer="GaussianDropout"), "of its sites, '3'"),
        (lambda r, w: r["sites"][0]["rates"][0].update(values=[1.5]), "p=1.5"),
        (lambda r, w: r["sites"][0]["rates"][0].update(values=[None]), "p=nan"),
        (lambda r, w: r["sites"][0]["rates"][0].update(values=[]), "0 values of p"),
        (lambda r, w: r["sites"][0]["rates"][0].update(shape=[2]), "rates at '3'"),
        (lambda r, w: r["sites"][0]["rates"][0].update(name="__class__"), "rates at '3'"),
        (lambda r, w: r["tensors"].pop(), "of its weights"),
        (lambda r, w: r["tensors"][0].update(shape=[8, 4]), "of its weights, '0.weight'"),
        (lambda r, w: r["tensors"][0].update(same_as="0.bias"), "other tensors than"),
        (lambda r, w: w.pop("0.bias"), "other tensors than"),
        (lambda r, w: w.update({"0.bias": torch.zeros(9)}), "another shape or type"),
        (lambda r, w: w.update({"0.bias": torch.zeros(8, dtype=torch.float64)}), "another shape or type"),
    ],
)
def test_an_altered_committee_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = altered(tmp_path, change)
    with pytest.raises(ModelDirectoryError, match=message):
        load(path, build)


def test_without_a_change_the_directory_above_is_read(tmp_path: Path) -> None:
    assert load(altered(tmp_path, lambda r, w: None), build).members == 2


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = save(Committee(build(), members=2), tmp_path / "c")
    weights = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelDirectoryError, match="altered or damaged"):
        load(path, build)
    rubbish = write_directory(
        tmp_path / "r", {RECIPE: json.loads((path / RECIPE).read_text()), WEIGHTS: b"abc"}, kind=COMMITTEE
    )
    with pytest.raises(ModelDirectoryError, match="holds no tensors"):
        load(rubbish, build)
    model = write_directory(tmp_path / "m", {"model.json": {}})
    with pytest.raises(
        ModelDirectoryError, match=r"not the manifest of a dropkit committee.*Committee\.save wrote"
    ):
        load(model, build)


def test_a_model_of_another_structure_is_refused(tmp_path: Path) -> None:
    path = save(Committee(build(), members=2), tmp_path / "c")
    with pytest.raises(ModelDirectoryError, match=r"of its sites, '3'"):
        load(path, nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 1)))
    wide = nn.Sequential(*list(build().children())[:-1], nn.Linear(8, 2))
    with pytest.raises(ModelDirectoryError, match=r"of its weights, '6.weight'"):
        load(path, wide)
    with pytest.raises(OptionError, match="model gives a dict"):
        load(path, dict)  # type: ignore[arg-type]


def test_nothing_is_replaced_without_a_word(tmp_path: Path) -> None:
    path = save(Committee(build(), members=2), tmp_path / "c")
    with pytest.raises(OutputError, match="exists"):
        save(Committee(build(), members=3), path)
    assert load(path, build).members == 2
    save(Committee(build(), members=3), path, force=True)
    assert load(path, build).members == 3
    assert {file.name for file in path.iterdir()} == {RECIPE, WEIGHTS, "manifest.json"}
