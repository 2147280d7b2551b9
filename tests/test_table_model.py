"""A model that is read back is the model that was written, and nothing else is read as a model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from dropkit.directory import write_directory
from dropkit.errors import DropkitError, DropkitWarning, ModelDirectoryError, TableError
from dropkit.jobs import fit_table
from dropkit.tables.model import MOST_MEMBERS, Seen, TableModel
from dropkit.tables.reading import from_frame
from table_examples import QUICK, change_model, kinds, measurements, rewrite


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    fit_table(from_frame(measurements()), "y", folder / "numbers", QUICK)
    fit_table(from_frame(kinds()), "kind", folder / "classes", QUICK)
    return {name: folder / name for name in ("numbers", "classes")}


@pytest.fixture
def copy(models, tmp_path):
    """A copy of a model that a test may spoil."""

    def make(name: str = "numbers") -> Path:
        return Path(shutil.copytree(models[name], tmp_path / name))

    return make


def answers(model: TableModel) -> np.ndarray:
    return model.answers(model.predict(measurements(40, seed=5))).to_numpy()


@pytest.mark.parametrize("name", ["numbers", "classes"])
def test_a_model_read_back_answers_bit_for_bit_and_is_written_again_as_it_was(models, tmp_path, name):
    once = TableModel.read(models[name])
    write_directory(tmp_path / "again", once.to_files())
    again = TableModel.read(tmp_path / "again")
    assert again.encoder == once.encoder
    assert again.target == once.target
    assert again.spec == once.spec
    np.testing.assert_array_equal(answers(again), answers(once))
    for file in ("model.json", "weights.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (models[name] / file).read_bytes()


def test_a_stream_gives_every_row_once_in_order_and_counts_what_is_new(models):
    model, frame = TableModel.read(models["numbers"]), measurements(600, seed=2)
    frame.loc[:9, "colour"] = "mauve"
    frame.loc[20:24, "x"] = np.nan
    for rows in (1, 100, 256, 999):
        seen = Seen()
        pieces = list(model.stream(from_frame(frame), seen, rows))
        assert sum(map(len, pieces)) == seen.rows == 600
        np.testing.assert_array_equal(np.concatenate([p["x"] for p in pieces]), frame["x"])
        assert dict(seen.unseen) == {"colour": 10}
        assert dict(seen.gaps) == {"x": 5}
        assert len(seen.notes) == 2


def test_a_table_that_was_predicted_is_not_predicted_again(models):
    model = TableModel.read(models["classes"])
    frame = measurements(5).assign(kind_entropy=1.0)
    with pytest.raises(
        TableError, match="has a column 'kind_entropy', the name of a column that predicting adds"
    ):
        model.check_source(from_frame(frame))
    with pytest.raises(TableError, match="lacks the columns 'x', 'day'"):
        model.check_source(from_frame(frame.drop(columns=["x", "day", "kind_entropy"])))


def put(*path, value):
    """A change of model.json: one value, deep inside."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


SPOILED = {
    "no part": lambda d: d.pop("committee"),
    "members": put("committee", "members", value=MOST_MEMBERS + 1),
    "members true": put("committee", "members", value=True),
    "seed": put("committee", "seed", value=1 << 64),
    "wide": put("network", "hidden", value=[10**9, 10**9]),
    "deep": put("network", "hidden", value=[64] * 5000),
    "negative width": put("network", "hidden", value=[-64, -64]),
    "rate null": put("network", "rate", value=None),
    "rate 1": put("network", "rate", value=1.0),
    "rate too long": put("network", "rate", value=10**400),
    "likelihood": put("network", "likelihood", value="categorical"),
    "inputs": put("network", "inputs", value=3),
    "task": put("target", "task", value="classification"),
    "classes": put("target", "classes", value=["a", "b"]),
    "target is a column": put("target", "column", "name", value="x"),
    "no encoder": put("encoder", value=[]),
    "no columns": put("encoder", "columns", value=[]),
    "scale 0": put("encoder", "numbers", 0, "scale", value=0),
    "kind": put("encoder", "columns", 0, "kind", value="secret"),
    "factor": put("calibration", "factors", value=[-1.0] * 6),
    "levels": put("calibration", "levels", value="0.9"),
    "rows": put("calibration", "rows", value=-1),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_model_that_was_tampered_with_is_refused_even_if_the_digests_fit(copy, name):
    model = copy()
    change_model(model, SPOILED[name])
    with pytest.raises(ModelDirectoryError) as caught:
        TableModel.read(model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_nothing_is_allocated_for_a_network_that_the_weights_do_not_fill(copy):
    model = copy()
    change_model(model, put("network", "hidden", value=[10**9, 10**9]))
    with pytest.raises(ModelDirectoryError, match="weights are there, and the network has 10000000"):
        TableModel.read(model)


def test_a_network_for_another_task_is_refused_even_if_its_weights_fit(copy):
    model = copy()
    change_model(model, put("network", "likelihood", value="categorical"))
    weights = load((model / "weights.safetensors").read_bytes())
    bare = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    rewrite(model, "weights.safetensors", save(bare))
    with pytest.raises(ModelDirectoryError, match="is not one for regression"):
        TableModel.read(model)


def test_classes_named_twice_are_refused(copy):
    model = copy("classes")
    change_model(model, put("target", "classes", value=["high", "high", "low"]))
    with pytest.raises(ModelDirectoryError, match="has not the classes"):
        TableModel.read(model)


WEIGHTS = {
    "not finite": lambda w: w["output.weight"].fill_(float("nan")),
    "infinite": lambda w: w["hidden1.bias"].fill_(float("inf")),
    "other shape": lambda w: w.update({"output.weight": torch.zeros(3, 64)}),
    "same size, other shape": lambda w: w.update({"hidden2.weight": torch.zeros(32, 128)}),
    "other type": lambda w: w.update({"hidden1.weight": w["hidden1.weight"].double()}),
    "whole numbers": lambda w: w.update({"hidden1.weight": w["hidden1.weight"].int()}),
    "one missing": lambda w: w.pop("hidden1.bias"),
    "one more": lambda w: w.update({"extra": torch.zeros(1)}),
    "head missing": lambda w: w.pop("head.scale"),
    "head negative": lambda w: w["head.scale"].fill_(-1.0),
    "head not finite": lambda w: w["head.location"].fill_(float("nan")),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_the_networks_are_refused(copy, name):
    model = copy()
    weights = load((model / "weights.safetensors").read_bytes())
    WEIGHTS[name](weights)
    rewrite(model, "weights.safetensors", save(weights))
    with pytest.raises(ModelDirectoryError, match="does not hold a model this release can use"):
        TableModel.read(model)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_weights_cut_short_are_refused_even_if_the_digests_fit(copy, length):
    model = copy()
    rewrite(model, "weights.safetensors", (model / "weights.safetensors").read_bytes()[:length])
    with pytest.raises(ModelDirectoryError):
        TableModel.read(model)


def leaves(value, path=()):
    """Paths of all values inside, of lists the first two."""
    yield path
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, item in inner:
        yield from leaves(item, (*path, key))


def test_whatever_stands_in_a_model_it_is_refused_or_answers_in_numbers(copy):
    frame, wrong = measurements(3, seed=1), (None, True, -1, 10**400, 1e-300, "", "x", [], {}, ["a", "a"])
    for name in ("numbers", "classes"):
        model = copy(name)
        sound = json.loads((model / "model.json").read_text())
        refused = 0
        for number, path in enumerate(leaves(sound)):
            if not path:
                continue
            spoiled = json.loads(json.dumps(sound))
            put(*path, value=wrong[number % len(wrong)])(spoiled)
            rewrite(model, "model.json", json.dumps(spoiled).encode())
            try:
                read = TableModel.read(model)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DropkitWarning)  # at rate 0 or 1e-300, members agree
                    values = read.answers(read.predict(frame)).select_dtypes("number")
                assert np.isfinite(values.to_numpy()).all(), path
            except DropkitError:
                refused += 1
        assert refused > 50
