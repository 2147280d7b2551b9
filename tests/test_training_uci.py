"""The benchmark runs, from files on disk to the table, whether or not the published sets are at hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def uci():
    spec = importlib.util.spec_from_file_location("uci_benchmark", ROOT / "benchmarks" / "uci.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_set(folder, rows=70, splits=3):
    """A set in the files of the published ones: x, then y, in a text table."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, 3)) * [1, 10, 0.1] + 5
    y = 3 * x[:, 0] + generator.standard_normal(rows)
    folder.mkdir(parents=True)
    np.savetxt(folder / "data.txt", np.c_[x, y])
    orders = np.stack([generator.permutation(rows) for _ in range(splits)])
    np.savez(
        folder / "splits.npz",
        train=orders[:, 10:], test=orders[:, :10], index_features=np.arange(3), index_target=np.array([3]),
    )  # fmt: skip
    header = "split,single_stochastic_pass_rmse,mc_rmse,test_ll,chosen_tau"
    lines = [f"{s},9,{1 + s / 10},{-1.5 - s / 10},1" for s in range(splits)]
    (folder / "published_per_split_100x.csv").write_text("\n".join([header, *lines]) + "\n")


def test_the_quick_benchmark_writes_its_table(uci, tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "uci_regression" / "boston")
    monkeypatch.setenv("DROPKIT_DATA", str(tmp_path))
    assert uci.main(["--quick", "boston", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "uci.json").read_text())
    (result,) = record["sets"]
    assert [s["split"] for s in result["splits"]] == [0, 1]
    assert [s["published_rmse"] for s in result["splits"]] == [1.0, 1.1]
    assert result["networks"] == 2 * (len(uci.RATES) * len(uci.WEIGHT_DECAYS) + 1)
    assert all(np.isfinite([s["rmse"], s["test_ll"]]).all() for s in result["splits"])
    table = (tmp_path / "out" / "uci.md").read_text()
    assert table in capsys.readouterr().out
    assert "1.0500 ± 0.0500" in table  # the published RMSE of two splits and its standard error


def test_test_rows_have_no_part_in_what_is_chosen_or_learned(uci, tmp_path):
    """Other targets on the test rows change the test results and nothing else."""
    write_set(tmp_path / "boston")
    data = uci.load_set(tmp_path, "boston")
    y = data.y.copy()
    y[data.test[0]] += 1000
    changed = uci.Benchmark(
        data.name, data.x, y, data.train, data.test, data.published_rmse, data.published_ll
    )  # fmt: skip
    options = {"rates": (0.0, 0.2), "weight_decays": (0.1,), "hidden": (8,), "max_epochs": 4, "members": 8}
    (one,), (two,) = (uci.run_set(d, [0], **options).splits for d in (data, changed))
    assert (one.rate, one.epochs, one.validation_ll) == (two.rate, two.epochs, two.validation_ll)
    assert two.rmse > one.rmse + 900


def test_the_log_likelihood_is_that_of_the_mixture_of_members(uci, tmp_path):
    """One member with N(mean, variance) for each row, against numpy, where no mask acts."""
    write_set(tmp_path / "boston")
    data = uci.load_set(tmp_path, "boston")
    result = uci.run_set(
        data, [1], rates=(0.0,), weight_decays=(0.1,), hidden=(8,), max_epochs=3, members=5
    ).splits[0]
    assert result.rate == 0
    floor = -0.5 * np.log(2 * np.pi * 1e-6)
    assert -20 < result.test_ll < floor
    noisy = uci.run_set(
        data, [1], rates=(0.3,), weight_decays=(0.1,), hidden=(8,), max_epochs=3, members=5
    ).splits[0]
    assert noisy.test_ll != result.test_ll


def test_a_missing_set_says_where_it_was_looked_for(uci, tmp_path):
    with pytest.raises(SystemExit, match="DROPKIT_DATA"):
        uci.load_set(tmp_path, "boston")


def test_the_published_boston_beats_the_linear_model_in_a_few_epochs(uci, shared_data, tmp_path):
    """Where the published set is absent, a set of its form stands in, with its own linear model as the bar."""
    folder = shared_data / "uci_regression" if shared_data is not None else tmp_path
    if shared_data is None:
        write_set(folder / "boston", rows=300)
    data = uci.load_set(folder, "boston")
    splits = [0, 1]
    ours = uci.run_set(data, splits, rates=(0.0, 0.05), weight_decays=(0.01,), max_epochs=40, members=32)
    linear = []
    for s in splits:
        design = np.c_[np.ones(len(data.x)), data.x]
        weights, *_ = np.linalg.lstsq(design[data.train[s]], data.y[data.train[s]], rcond=None)
        error = design @ weights - data.y
        variance = error[data.train[s]].var()
        linear.append(
            float(np.mean(-0.5 * (np.log(2 * np.pi * variance) + error[data.test[s]] ** 2 / variance)))
        )
    bar = np.mean(linear) if shared_data is not None else np.mean(linear) - 0.3
    assert np.mean([r.test_ll for r in ours.splits]) > bar
