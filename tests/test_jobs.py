"""From a table to a model to predictions: what never changes, whatever else does."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import betabinom

from dropkit import jobs
from dropkit.errors import OptionError, OutputError, ProbabilityError, TableError
from dropkit.jobs import FitOptions, fit_table, predict_table
from dropkit.tables.model import TableModel
from dropkit.tables.reading import from_frame
from dropkit.training import divide_rows
from table_examples import QUICK, kinds, measurements


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with two tables and a model of each."""
    folder = tmp_path_factory.mktemp("jobs")
    measurements().to_csv(folder / "numbers.csv", index=False)
    kinds().to_csv(folder / "classes.csv", index=False)
    fit_table(folder / "numbers.csv", "y", folder / "numbers", QUICK)
    fit_table(folder / "classes.csv", "kind", folder / "classes", QUICK)
    return folder


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("table", "target"), [("numbers", "y"), ("classes", "kind")])
def test_equal_seeds_give_equal_directories_bit_for_bit(home, tmp_path, table, target):
    report = fit_table(home / f"{table}.csv", target, tmp_path / "again", QUICK)
    assert contents(tmp_path / "again") == contents(home / table)
    assert report.timing is not None  # the caller is told, the files are not
    fit_table(home / f"{table}.csv", target, tmp_path / "other", replace(QUICK, seed=1))
    other = contents(tmp_path / "other")
    assert other["weights.safetensors"] != contents(home / table)["weights.safetensors"]


@pytest.mark.parametrize("table", ["numbers", "classes"])
def test_the_size_of_chunks_changes_no_byte_of_the_predictions(home, tmp_path, table):
    long = pd.concat([pd.read_csv(home / f"{table}.csv", dtype=str, keep_default_na=False)] * 3)
    long.to_csv(tmp_path / "long.csv", index=False)
    written = []
    for rows in (1, 7, 256, 1000, 10**30):
        out = tmp_path / f"{rows}.csv"
        summary = predict_table(home / table, tmp_path / "long.csv", out, chunk_rows=rows)
        assert summary.rows == len(long)
        written.append(out.read_bytes())
    assert len(set(written)) == 1


@pytest.mark.parametrize("table", ["numbers", "classes"])
def test_csv_and_parquet_of_one_table_give_equal_predictions(home, tmp_path, table):
    frame = measurements() if table == "numbers" else kinds()
    frame.assign(day=pd.to_datetime(frame["day"]), fresh=frame["fresh"] == "yes").to_parquet(
        tmp_path / "t.parquet"
    )
    columns = predict_table(home / table, home / f"{table}.csv", tmp_path / "a.csv").columns
    predict_table(home / table, tmp_path / "t.parquet", tmp_path / "b.csv")
    a, b = (pd.read_csv(tmp_path / name, dtype=str)[list(columns)] for name in ("a.csv", "b.csv"))
    pd.testing.assert_frame_equal(a, b)


def test_the_order_of_the_rows_is_the_order_of_the_predictions_and_nothing_else(home):
    model = TableModel.read(home / "numbers")
    frame = pd.read_csv(home / "numbers.csv", dtype=str, keep_default_na=False)
    order = np.random.default_rng(0).permutation(len(frame))
    straight = model.answers(model.predict(frame)).iloc[order].to_numpy()
    shuffled = model.answers(model.predict(frame.iloc[order].reset_index(drop=True))).to_numpy()
    np.testing.assert_allclose(shuffled, straight, rtol=1e-5, atol=1e-6)


def test_a_spread_is_its_parts_and_an_interval_holds_its_mean(home, tmp_path):
    predict_table(home / "numbers", home / "numbers.csv", tmp_path / "p.csv")
    p = pd.read_csv(tmp_path / "p.csv")
    np.testing.assert_allclose(p.y_std**2, p.y_epistemic_std**2 + p.y_aleatoric_std**2, rtol=1e-5)
    assert (p.y_lower_90 < p.y_mean).all()
    assert (p.y_mean < p.y_upper_90).all()
    assert (p[["y_epistemic_std", "y_aleatoric_std"]] > 0).all(axis=None)


def test_probabilities_sum_to_one_and_the_class_is_the_likeliest(home, tmp_path):
    predict_table(home / "classes", home / "classes.csv", tmp_path / "p.csv")
    p = pd.read_csv(tmp_path / "p.csv")
    classes = ["high", "low", "middle"]
    chances = p[[f"kind_probability_{name}" for name in classes]].to_numpy()
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-6)
    assert list(p.kind_predicted) == [classes[i] for i in chances.argmax(axis=1)]
    entropy = -(chances * np.log(np.maximum(chances, 1e-30))).sum(axis=1)
    np.testing.assert_allclose(p.kind_entropy, entropy, atol=1e-4)
    assert (p.kind_mutual_information >= -1e-6).all()
    assert (p.kind_mutual_information <= p.kind_entropy + 1e-6).all()


def test_the_columns_of_a_text_table_come_back_as_they_were_written(home, tmp_path):
    rows = [["id", "x", "z", "colour", "day", "fresh", "note, or so"]]
    rows += [
        ["007", "1e0", "NA", "red", "2020-01-05", "yes", 'a "b"'],
        ["0x1", "+1.50", "", "", "2020-02-01", "NO", "ü\nv"],
    ]
    rows += [["1e400", ".5", "-0", "mauve", "", "y", ""], ["-", "1", "2", "red", "2020-03-01", "n", "=1+1"]]
    with (tmp_path / "t.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    summary = predict_table(home / "numbers", tmp_path / "t.csv", tmp_path / "p.csv")
    assert [row[:7] for row in read(tmp_path / "p.csv")] == rows
    assert any(
        "'colour': cells with a category that the model has not seen" in note for note in summary.notes
    )


def test_the_numbers_of_a_parquet_table_come_back_to_the_last_digit(home, tmp_path):
    frame = measurements(20).assign(id=2**53 - np.arange(20), share=np.linspace(0, 1, 20) / 3)
    frame.to_parquet(tmp_path / "t.parquet")
    predict_table(home / "numbers", tmp_path / "t.parquet", tmp_path / "p.csv")
    p = pd.read_csv(tmp_path / "p.csv", dtype=str)
    assert list(map(int, p.id)) == list(frame.id)
    assert list(map(float, p.share)) == list(frame.share)


def test_predicting_looks_neither_at_the_target_nor_at_columns_it_did_not_learn_from(home, tmp_path):
    frame = measurements(30)
    for name, table in (
        ("plain", frame.drop(columns="y")),
        ("rubbish", frame.assign(y="rubbish", more=np.arange(30))),
        ("turned", frame[frame.columns[::-1]]),
    ):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        predict_table(home / "numbers", tmp_path / f"{name}.csv", tmp_path / f"{name}-p.csv")
    answers = [pd.read_csv(path, dtype=str).iloc[:, -6:] for path in sorted(tmp_path.glob("*-p.csv"))]
    assert len(answers) == 3
    pd.testing.assert_frame_equal(answers[0], answers[1])
    pd.testing.assert_frame_equal(answers[0], answers[2])


def test_nothing_of_the_held_out_rows_reaches_the_model(home, tmp_path):
    frame = measurements()
    test = divide_rows(frame["y"].to_numpy(), QUICK.test_share, likelihood="gaussian", seed=QUICK.seed)
    frame.loc[test, "y"] += 1000
    frame.loc[test, "x"] *= -3
    frame.loc[test, "colour"] = "red"
    fit_table(from_frame(frame), "y", tmp_path / "m", QUICK)
    before, after = (json.loads((m / "model.json").read_text()) for m in (home / "numbers", tmp_path / "m"))
    assert (
        contents(tmp_path / "m")["weights.safetensors"] == contents(home / "numbers")["weights.safetensors"]
    )
    assert after["calibration"] == before["calibration"]
    assert after["encoder"]["numbers"] == before["encoder"]["numbers"]
    assert after["encoder"]["categories"] == before["encoder"]["categories"]


def test_intervals_hold_nine_of_ten_new_rows(tmp_path):
    # Rows are exchangeable, so hits among n new rows are Beta-binomial given c calibration rows (Angelopoulos and
    # Bates 2021, arXiv:2107.07511, sec. 3.2). False alarm: 1e-6 each side; stopping by those rows shifts it little.
    rows, new = 1500, 3000
    frame = measurements(rows + new, seed=3).sample(
        frac=1, random_state=3, ignore_index=True
    )  # or days would tell
    report = fit_table(from_frame(frame[:rows]), "y", tmp_path / "m", QUICK)
    calibrated = report.data.validation_rows
    assert calibrated == 240
    model = TableModel.read(tmp_path / "m")
    answers = model.answers(model.predict(frame[rows:].reset_index(drop=True)))
    y = frame["y"][rows:].to_numpy()
    hits = int(((answers.y_lower_90 <= y) & (y <= answers.y_upper_90)).sum())
    rank = -(-9 * (calibrated + 1) // 10)
    law = betabinom(new, rank, calibrated + 1 - rank)
    assert law.ppf(1e-6) <= hits <= law.isf(1e-6)


def test_interrupted_training_keeps_the_best_model(tmp_path):
    said = []

    def press(event):
        signal.raise_signal(signal.SIGINT)

    report = fit_table(
        from_frame(measurements()),
        "y",
        tmp_path / "m",
        replace(QUICK, max_epochs=50),
        say=said.append,
        progress=press,
    )
    assert "The training was interrupted" in "".join(said)
    assert any("interrupted" in warning for warning in report.data.warnings)
    assert len(TableModel.read(tmp_path / "m").predict(measurements(5)).mean) == 5


@pytest.mark.parametrize("times", [1, 2])
def test_a_trained_network_is_given_up_only_when_asked_twice(tmp_path, monkeypatch, times):
    real, said = jobs.compare, []

    def pressed(*args, **options):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(jobs, "compare", pressed)
    before = signal.getsignal(signal.SIGINT)
    if times == 2:
        with pytest.raises(KeyboardInterrupt):
            fit_table(from_frame(measurements()), "y", tmp_path / "m", QUICK, say=said.append)
        assert list(tmp_path.iterdir()) == []
    else:
        try:
            fit_table(from_frame(measurements()), "y", tmp_path / "m", QUICK, say=said.append)
        except KeyboardInterrupt:
            pytest.fail("a single Ctrl-C gave the model up")
        assert (tmp_path / "m" / "report.html").is_file()
    assert "press Ctrl-C again" in said[-1]
    assert signal.getsignal(signal.SIGINT) is before


WRONG_OPTIONS = {
    "rate": ({"rate": float("nan")}, r"rate=nan was given"),
    "rate 1": ({"rate": 1.0}, r"rate=1 was given"),
    "effort": ({"effort": "lazy"}, r"effort='lazy' was given; it is one of quick"),
    "share": ({"test_share": float("nan")}, r"test_share=nan was given"),
    "share leaves none": ({"test_share": 0.95}, r"leaves 6 of 120 rows to learn from"),
    "members": ({"members": 3}, r"a committee has 4 to 4096"),
    "many members": ({"members": 10**9}, r"a committee has 4 to 4096"),
    "seed": ({"seed": 1 << 64}, r"a seed is a whole number of 64 bits"),
    "epochs": ({"max_epochs": 0}, r"max_epochs=0 was given"),
    "kind of the target": ({"kinds": {"y": "number"}}, r"a kind was given for the target 'y'"),
    "target ignored": ({"ignore": ("y",)}, r"both as the target and to be left out"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_an_option_out_of_range_is_refused_before_anything_is_said_or_written(tmp_path, name):
    options, message = WRONG_OPTIONS[name]
    said = []
    with pytest.raises((OptionError, ProbabilityError), match=message):
        fit_table(from_frame(measurements()), "y", tmp_path / "m", replace(QUICK, **options), say=said.append)
    assert said == []
    assert list(tmp_path.iterdir()) == []


WRONG_TABLES = {
    "no spread in float32": (lambda t: t.assign(y=t.y * 1e50), r"standard deviation of .*e\+50"),
    "tiny": (lambda t: t.assign(y=t.y * 1e-50), r"standard deviation of .*e-50"),
    "far from 0": (lambda t: t.assign(y=t.y + 1e9), r"Subtract 1000000000 from it first"),
    "named like an answer": (
        lambda t: t.assign(y_mean=t.x**2),
        r"has a column 'y_mean', the name of a column that pred",
    ),
    "19 rows": (lambda t: t[:19], r"has 19 rows with a target; at least 20"),
    "infinite": (lambda t: t.assign(x=t.x.where(t.index != 6, np.inf)), r"Column 'x', row 7, holds inf"),
    "nothing varies": (lambda t: t[["y"]].assign(a=1, b=np.nan), r"No column is left to learn from"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_table_that_cannot_be_learned_from_is_refused_in_one_sentence(tmp_path, name):
    change, message = WRONG_TABLES[name]
    said = []
    with pytest.raises(TableError, match=message):
        fit_table(from_frame(change(measurements())), "y", tmp_path / "m", QUICK, say=said.append)
    assert said == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [20, 25])
def test_the_smallest_tables_are_learned_from(tmp_path, rows):
    report = fit_table(from_frame(measurements(rows)), "y", tmp_path / "m", QUICK)
    data = report.data
    assert data.training_rows + data.validation_rows + data.test_rows == rows
    assert data.validation_rows >= 9  # a conformal 90 % interval needs as many


def test_columns_that_say_nothing_are_dropped_and_that_is_said(tmp_path):
    said = []
    fit_table(
        from_frame(measurements().assign(empty=np.nan, same=7, count=range(120))),
        "y",
        tmp_path / "m",
        QUICK,
        say=said.append,
    )
    for text in (
        "'empty' is left out: every cell is missing.",
        "'same' is left out: every row says 7.",
        "'count' is left out",
    ):
        assert any(text in sentence for sentence in said)


def test_predictions_never_replace_what_is_no_file(home, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        predict_table(home / "numbers", home / "numbers.csv", tmp_path / "folder", force=True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="is not a plain file"):
        predict_table(home / "numbers", home / "numbers.csv", pipe, force=True)
    assert pipe.is_fifo()
    with pytest.raises(OutputError, match="predictions are written as CSV"):
        predict_table(home / "numbers", home / "numbers.csv", tmp_path / "p.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_replaced_table_may_be_the_one_that_is_read(home, tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes((home / "numbers.csv").read_bytes())
    with pytest.raises(OutputError, match="exists"):
        predict_table(home / "numbers", table, table)
    predict_table(home / "numbers", table, table, force=True)
    assert [row[:6] for row in read(table)] == read(home / "numbers.csv")


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory) -> dict[str, tuple[object, str, FitOptions]]:
    """Tables as people have them; where the shared data are not there, tables of the same make."""
    folder = tmp_path_factory.mktemp("real")
    generator = np.random.default_rng(1)
    passengers = folder / "passengers.csv"
    n = 200
    pd.DataFrame(
        {
            "PassengerId": range(1, n + 1), "Survived": generator.integers(0, 2, n),
            "Pclass": generator.integers(1, 4, n),
            "Name": [f"Person, Mr. {i} \"x\"" for i in range(n)], "Sex": generator.choice(["male", "female"], n),
            "Age": np.where(generator.random(n) < 0.2, np.nan, generator.integers(1, 80, n)),
            "Cabin": np.where(generator.random(n) < 0.7, None, [f"C{i}" for i in range(n)]),
        }
    ).to_csv(passengers, index=False)  # fmt: skip
    horses = folder / "horses.csv"
    values = generator.integers(1, 5, size=(n, 24)).astype(str)
    values[generator.random((n, 24)) < 0.2] = "?"
    values[:, 22] = generator.integers(1, 4, n)
    horses.write_text("\n".join(map(",".join, values)) + "\n")
    cases = {
        "passengers": (passengers, "Survived", QUICK),
        "horses": (horses, "column_23", replace(QUICK, header=False)),
        "numbers": (from_frame(measurements(200).select_dtypes("number")), "y", QUICK),
    }
    if shared_data is not None:
        cases["titanic"] = (shared_data / "tabular_missing" / "titanic.csv", "Survived", QUICK)
        lines = (shared_data / "tabular_missing" / "horse-colic.csv").read_text().splitlines()
        known = [line for line in lines if line.split(",")[22] != "?"]
        assert len(known) == len(lines) - 1  # the fate of one horse is not known
        (folder / "colic.csv").write_text("\n".join(known) + "\n")
        cases["horse colic"] = (folder / "colic.csv", "column_23", QUICK)
        numbers = np.loadtxt(shared_data / "uci_regression" / "boston" / "data.txt")
        frame = pd.DataFrame(numbers, columns=[*(f"x{i}" for i in range(13)), "price"])
        frame.to_csv(folder / "boston.csv", index=False)
        cases["boston"] = (folder / "boston.csv", "price", QUICK)
    return cases


@pytest.mark.parametrize("name", ["passengers", "horses", "numbers", "titanic", "horse colic", "boston"])
def test_tables_as_people_have_them_go_the_whole_way(real, shared_data, tmp_path, name):
    if name not in real and shared_data is None:
        pytest.skip("the shared data are not on this machine; tables of the same make are tested")
    table, target, options = real[name]
    report = fit_table(table, target, tmp_path / "m", options)
    page = (tmp_path / "m" / "report.html").read_text(encoding="utf-8")
    assert target in page
    assert page.count("<svg") >= 4
    header = options.header if name == "horses" else "auto"
    summary = predict_table(tmp_path / "m", table, tmp_path / "p.csv", header=header)
    assert summary.rows == report.data.rows
    answers = pd.read_csv(tmp_path / "p.csv")[list(summary.columns)]
    numbers = answers.select_dtypes("number")
    assert np.isfinite(numbers.to_numpy()).all()
    assert len(answers) == report.data.rows
    if name == "titanic":
        assert report.data.task == "classification"
        assert summary.rows == 891
        right = (answers["Survived_predicted"] == pd.read_csv(table)["Survived"]).mean()
        assert right > 0.7  # naming the commoner class is right for 62 %


def test_a_target_with_a_gap_is_refused_with_the_row_named(tmp_path):
    frame = measurements()
    frame.loc[11, "y"] = np.nan
    with pytest.raises(TableError, match=r"Target 'y' has no value in 1 of 120 rows, first in row 12"):
        fit_table(from_frame(frame), "y", tmp_path / "m", QUICK)
