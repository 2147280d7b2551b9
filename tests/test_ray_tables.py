"""A model of tables through Ray: the figures that one process writes, for any number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from typer.testing import CliRunner

from dropkit.cli import app
from dropkit.engines.ray_parts import list_files, make_parts
from dropkit.engines.ray_tables import TableWorker, predict_table
from dropkit.errors import OptionError, TableError
from dropkit.jobs import FitOptions, fit_table
from dropkit.jobs import predict_table as predict_here

ROWS = 900


def rows(n: int, seed: int, odd: bool = False) -> pa.Table:
    rng = np.random.default_rng(seed)
    a, kind = rng.normal(size=n), rng.choice(["lime", "oak"], size=n).astype(object)
    y = 3 + a + (kind == "oak") + 0.1 * rng.normal(size=n)
    if odd:
        kind[::7] = "elm"  # no tree that the model knows
        a[::11] = np.nan
    return pa.table({"a": a, "kind": pa.array(kind, pa.string()), "y": y})


@pytest.fixture(scope="module", params=["regression", "classification"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "model"
    frame = rows(200, 0).to_pandas()
    if request.param == "classification":
        frame["y"] = np.where(frame["y"] > 3, "high", "low")
    frame.to_csv(out.with_suffix(".csv"), index=False)
    fit_table(
        out.with_suffix(".csv"), "y", out, FitOptions(rate=0.2, members=4, max_epochs=2, effort="quick")
    )
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    whole = rows(ROWS, 1, odd=True)
    for k, (start, length) in enumerate(((0, 500), (500, 1), (501, 399))):
        pq.write_table(whole.slice(start, length), folder / f"{k}.parquet", row_group_size=150)
    return folder


class InThisProcess:
    """Ray's part of the work, done here: what travels and comes back is the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts = 0
        monkeypatch.setattr("dropkit.engines.ray_parts.start_ray", lambda: self)
        monkeypatch.setattr("dropkit.engines.ray_parts._run", self.run)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def run(self, ray, parts, kind, arguments, workers, cpus) -> tuple[str, ...]:
        worker, said = kind(*arguments), {}
        for part in reversed(parts):
            batch = {
                "number": part.number, "file": part.file, "first": part.groups[0], "last": part.groups[1],
                "row": part.row, "rows": part.rows,
            }  # fmt: skip
            done = worker({name: np.array([value], dtype=object) for name, value in batch.items()})
            said[int(done["number"][0])] = str(done["said"][0])
        self.parts = len(parts)
        return tuple(said[number] for number in sorted(said))


def test_parts_hold_the_figures_of_one_process(model, table, tmp_path, monkeypatch):
    here = InThisProcess(monkeypatch)
    done = predict_table(model, table, tmp_path / "out", rows=300, threads=torch.get_num_threads())
    assert here.parts == done.parts == 5  # 300, 200, 1, 300, 99: row groups stay whole, and files
    again = predict_table(model, table, tmp_path / "again", rows=300, threads=torch.get_num_threads())
    assert again.digest == done.digest

    found, given = pq.read_table(done.path).to_pandas(), pq.read_table(table).to_pandas()
    assert list(found.columns) == [*given.columns, *done.columns]
    pd.testing.assert_frame_equal(found[list(given.columns)], given)
    alone = predict_here(model, table, tmp_path / "alone.csv")
    wanted = pd.read_csv(tmp_path / "alone.csv", dtype=str, keep_default_na=False)
    assert done.columns == alone.columns
    for name in done.columns:
        mine = (
            found[name]
            if found[name].dtype == object or found[name].dtype == "str"
            else found[name].map("{:.7g}".format)
        )
        assert mine.astype(str).tolist() == wanted[name].tolist(), name
    assert (done.rows, done.notes) == (alone.rows, alone.notes) == (ROWS, done.notes)
    assert len(done.notes) == 2
    assert json.loads(done.to_json())["digest"] == done.digest


def test_a_part_is_written_whole_or_not_at_all(model, table, tmp_path, monkeypatch):
    worker = TableWorker(str(model), torch.get_num_threads(), str(tmp_path))
    part = make_parts(list_files(table), 500)[0]
    worker.predict(part)
    assert [file.name for file in tmp_path.iterdir()] == [part.name]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    (tmp_path / part.name).unlink()
    with pytest.raises(OSError, match="No space"):
        worker.predict(part)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_said_before_a_worker_starts(model, table, tmp_path):
    with pytest.raises(OptionError, match="workers=0"):
        predict_table(model, table, tmp_path / "out", workers=0)
    pq.write_table(pa.table({"b": [1.0]}), tmp_path / "other.parquet")
    with pytest.raises(TableError, match="'a'"):
        predict_table(model, tmp_path / "other.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "without a table"),
        (["t", "--force"], "--force was given with --engine ray"),
        (["t", "--out", "p.csv"], "writes a folder of Parquet files"),
    ],
)
def test_the_command_says_what_an_engine_cannot_do(arguments, said):
    run = CliRunner().invoke(app, ["predict", "model", *arguments, "--engine", "ray"])
    assert run.exit_code == 2
    assert said in run.stderr


def test_the_command_tells_what_was_written(model, table, tmp_path, monkeypatch):
    InThisProcess(monkeypatch)
    asked = ["predict", str(model), str(table), "--engine", "ray", "--out"]
    run = CliRunner().invoke(app, [*asked, str(tmp_path / "p")])
    assert run.exit_code == 0, run.stderr
    assert f"{ROWS} rows predicted into {tmp_path / 'p'}: y_" in run.stdout
    assert "a category that the model has not seen" in run.stderr
    run = CliRunner().invoke(app, [*asked, str(tmp_path / "q"), "--json"])
    assert json.loads(run.stdout)["rows"] == ROWS
