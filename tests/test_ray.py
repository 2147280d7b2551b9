"""Many workers write what one writes: the same files, byte for byte."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from torch import nn

import dropkit as dk
from dropkit.committee import Committee
from dropkit.committee.saving import save
from dropkit.engines.ray import PartWorker, answers, predict_dataset
from dropkit.engines.ray_parts import list_files, make_parts
from dropkit.errors import (
    EngineError,
    MissingPackageError,
    ModelDirectoryError,
    OptionError,
    OutputError,
    TableError,
)

ROWS = 5000


def builder() -> Callable[[], nn.Module]:
    """A function that travels by value, as workers do not have this module."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), dk.nn.Dropout(0.3), nn.Linear(16, 1))

    return build


build = builder()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three files of several row groups."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    rows = pa.table(
        {"a": rng.normal(size=ROWS), "b": rng.normal(size=ROWS), "name": np.arange(ROWS).astype(str)}
    )
    for k, (start, length) in enumerate(((0, 2600), (2600, 1), (2601, 2399))):
        pq.write_table(rows.slice(start, length), folder / f"{k}.parquet", row_group_size=700)
    return folder


@pytest.mark.filterwarnings("ignore")  # Ray's own, of the packages that it brings
def test_one_worker_and_two_write_the_same_files(table: Path, cluster: None, tmp_path: Path) -> None:
    committee = Committee(build(), members=4, seed=3, tile=64)
    saved = save(committee, tmp_path / "saved")
    asked = {"columns": ["a", "b"], "keep": ["name"], "rows": 1000}
    one = predict_dataset(committee, table, tmp_path / "one", workers=1, **asked)
    two = predict_dataset(saved, table, tmp_path / "two", workers=2, model=build, **asked)
    assert (one.digest, one.rows, one.parts) == (two.digest, ROWS, 5)
    names = [f"part-{k:06d}.parquet" for k in range(5)]
    assert sorted(file.name for file in one.path.iterdir()) == names
    assert all((one.path / name).read_bytes() == (two.path / name).read_bytes() for name in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "saved", "two"]

    whole, given = pq.read_table(two.path), pq.read_table(table)
    assert whole.column_names == list(two.columns) == ["row", "name", "mean", "std", "epistemic"]
    assert whole["row"].to_pylist() == list(range(ROWS))
    assert whole["name"].equals(given["name"])
    prediction = committee.predict(np.stack((given["a"], given["b"]), axis=1))
    for name in ("mean", "std", "epistemic"):
        np.testing.assert_allclose(whole[name], getattr(prediction, name)[:, 0], rtol=1e-4, atol=1e-6)

    with pytest.raises(OptionError, match=r"workers=3 .* the cluster has 2"):
        predict_dataset(committee, table, tmp_path / "three", workers=3, **asked)
    with pytest.raises(OutputError, match="exists"):
        predict_dataset(committee, table, tmp_path / "two", **asked)

    def broken(columns: dict[str, Any]) -> Any:
        raise ValueError("these rows are not mine")

    with pytest.raises(EngineError, match="these rows are not mine"):
        predict_dataset(committee, table, tmp_path / "four", workers=1, rows=ROWS, prepare=broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "saved", "two"]


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 700, 701, 5000])
def test_parts_are_whole_row_groups_and_cover_every_row_once(table: Path, rows: int) -> None:
    parts = make_parts(list_files(table), rows)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [part.row for part in parts] == [sum(p.rows for p in parts[:k]) for k in range(len(parts))]
    assert sum(part.rows for part in parts) == ROWS
    for part in parts:
        groups = pq.ParquetFile(part.file).metadata
        assert part.rows == sum(groups.row_group(g).num_rows for g in range(*part.groups))
        assert part.rows >= rows or part.groups[1] == groups.num_row_groups


@pytest.mark.parametrize("per_row", [False, True])
def test_a_part_is_predicted_by_itself_and_by_its_rows(table: Path, tmp_path: Path, per_row: bool) -> None:
    committee = Committee(build(), members=4, tile=64, per_row=per_row)
    work = (committee, None, ["a", "b"], None, ("name",), torch.get_num_threads(), str(tmp_path))
    parts = make_parts(list_files(table), 1400)
    worker = PartWorker(*work)
    for part in reversed(parts):
        worker.predict(part)
    written = [(tmp_path / part.name).read_bytes() for part in parts]
    PartWorker(*work).predict(parts[1])
    assert (tmp_path / parts[1].name).read_bytes() == written[1]
    given = pq.read_table(table)
    ids = torch.arange(parts[1].row, parts[1].row + parts[1].rows)
    rows = np.stack((given["a"], given["b"]), axis=1)[ids]
    wanted = committee.predict(rows, **({"ids": ids} if per_row else {}))
    told = pq.read_table(tmp_path / parts[1].name)
    np.testing.assert_allclose(told["mean"], wanted.mean[:, 0], rtol=1e-4, atol=1e-6)


def test_prepare_makes_the_rows_and_text_needs_it(table: Path, tmp_path: Path) -> None:
    committee = Committee(build(), members=2)
    parts = make_parts(list_files(table), ROWS)
    threads = torch.get_num_threads()
    worker = PartWorker(
        committee,
        None,
        None,
        lambda c: np.stack((c["a"] * 0, c["b"] * 0), axis=1),
        (),
        threads,
        str(tmp_path),
    )
    worker.predict(parts[0])
    said = pq.read_table(tmp_path / parts[0].name)["mean"].to_numpy()
    assert (said == said[0]).all()
    with pytest.raises(TableError, match="'name' of object; numbers are needed"):
        PartWorker(committee, None, ["name"], None, (), threads, str(tmp_path)).predict(parts[0])
    assert not list(tmp_path.glob("part-000001*"))


def test_answers_are_named_by_their_output() -> None:
    x = torch.randn(3, 2)
    two = nn.Sequential(nn.Linear(2, 8), dk.nn.Dropout(0.5), nn.Linear(8, 4), nn.Unflatten(1, (2, 2)))
    assert list(answers(Committee(two, members=2, likelihood="gaussian").predict(x))) == [
        f"{name}_{k}" for name in ("mean", "std", "epistemic", "aleatoric") for k in range(2)
    ]
    classes = nn.Sequential(nn.Linear(2, 8), dk.nn.Dropout(0.5), nn.Linear(8, 3))
    said = answers(Committee(classes, members=2, likelihood="categorical").predict(x))
    assert list(said) == ["probability_0", "probability_1", "probability_2", "entropy", "mutual_information"]
    np.testing.assert_allclose(sum(said[f"probability_{k}"] for k in range(3)), np.ones(3), rtol=1e-6)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_mistakes_are_said_before_a_worker_starts(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(committee: Any = None, source: Any = table, **options: Any) -> None:
        predict_dataset(committee or Committee(build()), source, tmp_path / "out", **options)

    with pytest.raises(OptionError, match="workers=0"):
        ask(columns=["a"], workers=0)
    with pytest.raises(OptionError, match="say which columns"):
        ask()
    with pytest.raises(OptionError, match="a list of names"):
        ask(columns="ab")
    with pytest.raises(OptionError, match="together with model="):
        ask(str(tmp_path), columns=["a"])
    with pytest.raises(ModelDirectoryError, match=r"no manifest\.json"):
        ask(str(tmp_path), columns=["a"], model=build)
    with pytest.raises(TableError, match="holds no file"):
        list_files(tmp_path)
    with pytest.raises(TableError, match="is not a file"):
        list_files(tmp_path / "missing.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(TableError, match="cannot be read as Parquet"):
        make_parts([tmp_path / "bad.parquet"], 1)
    with pytest.raises(TableError, match="has no column 'c'"):
        make_parts(list_files(table), 1, ["a", "c"])
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else there(name))
    with pytest.raises(MissingPackageError, match=r"pip install 'dropkit\[ray\]'"):
        ask(columns=["a", "b"])
    assert not (tmp_path / "out").exists()
