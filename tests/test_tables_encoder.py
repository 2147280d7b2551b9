"""Every row is encoded by itself, by numbers that survive JSON bit for bit; what is new is handled and counted."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dropkit.errors import ModelDirectoryError, OutputError, TableError
from dropkit.tables.cells import MOST
from dropkit.tables.columns import describe_columns
from dropkit.tables.encoder import Encoder
from dropkit.tables.reading import from_frame, open_table
from dropkit.tables.stream import encode_stream
from dropkit.tables.target import describe_target


def mixed(rows: int, seed: int = 0) -> pd.DataFrame:
    """A table with every kind of column, gaps in most, and a heavy tail."""
    rng = np.random.default_rng(seed)

    def gaps(values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(rows) < 0.1, None, values.astype(object))

    days = np.datetime64("2020-01-01T06") + rng.integers(0, 30_000, rows).astype("timedelta64[h]")
    return pd.DataFrame(
        {
            "width": rng.normal(size=rows),
            "income": gaps(np.exp(3 * rng.normal(size=rows))),
            "colour": gaps(rng.choice(["red", "green", "blue", "rare"], rows, p=[0.4, 0.3, 0.29, 0.01])),
            "smoker": gaps(rng.choice(["yes", "no"], rows)),
            "day": gaps(np.datetime_as_string(days)),
            "grade": gaps(rng.integers(0, 5, rows)),
        }
    )


TABLE = mixed(400)
ENCODER = Encoder.fit(TABLE, describe_columns(TABLE))


def in_pieces(frame: pd.DataFrame, cuts: list[int]) -> np.ndarray:
    edges = [0, *sorted(cuts), len(frame)]
    return np.concatenate([ENCODER.transform(frame.iloc[a:b]).matrix for a, b in pairwise(edges)])


@given(cuts=st.lists(st.integers(0, 400), max_size=6), seed=st.integers(0, 3))
@settings(max_examples=25)
def test_a_row_is_encoded_the_same_in_any_company(cuts, seed):
    frame = mixed(400, seed)
    whole = ENCODER.transform(frame).matrix
    assert np.array_equal(in_pieces(frame, cuts), whole)
    order = np.random.default_rng(seed).permutation(400)
    assert np.array_equal(ENCODER.transform(frame.iloc[order]).matrix, whole[order])


def test_single_rows_too():
    assert np.array_equal(
        in_pieces(TABLE.iloc[:60], list(range(60))), ENCODER.transform(TABLE.iloc[:60]).matrix
    )


@given(st.lists(st.one_of(st.none(), st.floats(-1e90, 1e90)), min_size=2, max_size=30))
def test_an_encoder_survives_json_bit_for_bit(cells):
    frame = pd.DataFrame({"a": pd.Series(cells, dtype=object), "b": list("xyz" * 10)[: len(cells)]})
    encoder = Encoder.fit(frame, describe_columns(frame, keep_all=True))
    text = json.dumps(encoder.to_json(), allow_nan=False)
    again = Encoder.from_json(json.loads(text))
    assert again == encoder
    matrix = encoder.transform(frame).matrix
    assert np.isfinite(matrix).all()
    assert np.array_equal(again.transform(frame).matrix, matrix)


def test_numbers_are_what_scikit_learn_makes_of_them():
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    frame = pd.DataFrame({"a": [1.0, np.nan, 3.0, 8.0], "b": [5.0, 4.0, 1.0, 1.0]})
    encoder = Encoder.fit(frame, describe_columns(frame))
    assert encoder.feature_names == ("a", "b", "a is missing")
    matrix = encoder.transform(frame).matrix
    # the scale is that of the known values: filled gaps would shrink it
    known = StandardScaler().fit(frame[["a"]].dropna().to_numpy())
    filled = make_pipeline(SimpleImputer(strategy="median")).fit_transform(frame[["a"]].to_numpy())
    np.testing.assert_array_equal(matrix[:, 0], known.transform(filled)[:, 0].astype(np.float32))
    np.testing.assert_array_equal(matrix[:, 2], [0, 1, 0, 0])


def test_features_are_named_and_scaled():
    names = ENCODER.feature_names
    matrix = ENCODER.transform(TABLE).matrix
    assert matrix.dtype == np.float32
    assert matrix.shape == (400, len(names)) == (400, ENCODER.features)
    assert {
        "width",
        "income",
        "day (weekday)",
        "smoker is missing",
        "colour = red",
        "colour is missing",
    } <= set(names)
    where = {name: matrix[:, i] for i, name in enumerate(names)}
    assert abs(where["width"].mean()) < 1e-6
    assert abs(where["width"].std() - 1) < 1e-5
    np.testing.assert_array_equal(where["colour = red"] == 1, (TABLE["colour"] == "red").to_numpy())
    np.testing.assert_array_equal(where["day is missing"] == 1, TABLE["day"].isna().to_numpy())
    one_hot = np.stack([where[name] for name in names if name.startswith("colour")])
    assert (one_hot.sum(axis=0) == 1).all()


@pytest.mark.parametrize("value", [0.1, 2.1078050584885536e17, -1e90])
def test_a_constant_column_that_is_kept_is_zero(value):
    frame = pd.DataFrame({"a": [value] * 7})
    encoder = Encoder.fit(frame, describe_columns(frame, keep_all=True))
    assert encoder.transform(frame).matrix.tolist() == [[0.0]] * 7


def test_the_parts_of_a_date_are_those_of_the_calendar():
    days = pd.Series(pd.date_range("1960-02-27 05:30", periods=5000, freq="37h"))
    frame = pd.DataFrame({"t": days})
    encoder = Encoder.fit(frame, describe_columns(frame))
    parts = {n.part: n for n in encoder.numbers}
    matrix = encoder.transform(frame).matrix.astype(np.float64)
    expected = {
        "month": days.dt.month,
        "day": days.dt.day,
        "weekday": days.dt.day_of_week,
        "hour": days.dt.hour + days.dt.minute / 60,
        "days": (days - pd.Timestamp("1970-01-01")) / pd.Timedelta("1D"),
    }
    assert set(parts) == set(expected)
    for i, n in enumerate(encoder.numbers):
        np.testing.assert_allclose(matrix[:, i] * n.scale + n.mean, expected[n.part], rtol=1e-5, atol=1e-2)


def test_a_heavy_tail_is_drawn_in_and_stays_in_order():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"light": rng.normal(size=2000), "heavy": np.exp(3 * rng.normal(size=2000))})
    encoder = Encoder.fit(frame, describe_columns(frame))
    assert [n.tail is not None for n in encoder.numbers] == [False, True]
    heavy = encoder.transform(frame).matrix[:, 1]
    assert np.abs(heavy).max() < 8
    order = np.argsort(frame["heavy"].to_numpy())
    assert (np.diff(heavy[order]) >= 0).all()


def test_columns_may_be_named_by_numbers_but_each_once():
    frame = pd.DataFrame({0: [1.0, 2.0, 4.0], 1: [3.0, 1.0, 1.0]})
    encoder = Encoder.fit(frame, describe_columns(frame))
    assert encoder.feature_names == ("0", "1")
    assert encoder.transform(frame).matrix.shape == (3, 2)
    with pytest.raises(TableError, match="more than one column called '0'"):
        encoder.transform(pd.DataFrame([[1, 2]], columns=[0, "0"]))


def test_labels_never_seen_are_handled_and_counted():
    frame = pd.DataFrame(
        {"c": ["a", "b"] * 20 + ["rare"], "d": ["u", "v"] * 20 + ["u"], "n": np.arange(41.0) ** 2}
    )
    encoder = Encoder.fit(frame, describe_columns(frame))
    new = pd.DataFrame(
        {"c": ["new", "rare", "a", None], "d": ["new", "u", "w", "v"], "n": [1.0, None, 2.0, 3.0]}
    )
    encoded = encoder.transform(new)
    assert encoded.unseen == {"c": 1, "d": 2}
    assert encoded.gaps == {"n": 1, "c": 1}
    where = dict(zip(encoder.feature_names, encoded.matrix.T, strict=True))
    assert where["c = (other)"].tolist() == [1, 1, 0, 0]
    assert (where["d = u"] + where["d = v"]).tolist() == [0, 1, 0, 1]
    assert encoder.transform(frame).unseen == {}


@given(st.lists(st.sampled_from("abcxyz"), min_size=1, max_size=20))
def test_the_count_of_unseen_labels_is_exact(labels):
    frame = pd.DataFrame({"c": ["a", "b", "c"] * 5})
    encoder = Encoder.fit(frame, describe_columns(frame))
    unseen = encoder.transform(pd.DataFrame({"c": labels})).unseen
    assert unseen.get("c", 0) == sum(label in "xyz" for label in labels)


def test_many_labels_are_pooled():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"c": [f"label {i}" for i in rng.geometric(0.02, 3000)]})
    (part,) = Encoder.fit(frame, describe_columns(frame)).categories
    assert part.width <= 64
    assert part.pool
    assert len(part.rare) == frame["c"].nunique() - len(part.labels)
    counts = frame["c"].value_counts()
    assert counts[list(part.labels)].min() >= counts[list(part.rare)].max()


def test_missing_and_changed_columns_are_named():
    with pytest.raises(TableError, match=r"lacks the columns 'width', 'day', which the model learned from\."):
        ENCODER.transform(TABLE.drop(columns=["width", "day"]))
    with pytest.raises(TableError, match=r"Did you mean 'Width'"):
        ENCODER.transform(TABLE.rename(columns={"width": "Width"}))
    wrong = TABLE.astype({"width": object})
    wrong.loc[17, "width"] = "broad"
    with pytest.raises(
        TableError, match=r"'width' is a number column, and row 18 holds 'broad', which is not a number"
    ):
        ENCODER.transform(wrong)
    assert ENCODER.check_columns([*TABLE.columns, "extra"]) == ("extra",)
    more = TABLE.assign(extra="ignored")[["extra", *reversed(TABLE.columns)]]
    assert np.array_equal(ENCODER.transform(more).matrix, ENCODER.transform(TABLE).matrix)
    same = pd.DataFrame({"a": [1.0, 1.0]})
    with pytest.raises(TableError, match=r"No column is left to learn from \('a': every row says 1\)"):
        Encoder.fit(same, describe_columns(same))


def test_text_and_typed_tables_are_encoded_alike(tmp_path):
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    TABLE.assign(income=TABLE["income"].astype(float), grade=TABLE["grade"].astype(float)).to_parquet(
        tmp_path / "t.parquet"
    )
    expected = ENCODER.transform(TABLE).matrix
    for name in ("t.csv", "t.parquet"):
        assert np.array_equal(encode_stream(open_table(tmp_path / name), ENCODER).x, expected)


@pytest.mark.parametrize("chunk", [37, 400, 1000])
def test_a_stream_is_the_table_in_any_chunks(tmp_path, chunk):
    frame = TABLE.assign(y=["a", "b", None, "b"] * 100)
    target = describe_target(frame["y"], missing="drop")
    path = tmp_path / "x.f32"
    table = encode_stream(from_frame(frame), ENCODER, target=target, path=path, chunk_rows=chunk)
    kept = frame["y"].notna().to_numpy()
    assert np.array_equal(table.x, ENCODER.transform(frame).matrix[kept])
    assert np.array_equal(table.rows, np.flatnonzero(kept))
    assert table.y is not None
    assert [target.classes[code] for code in table.y] == frame["y"][kept].tolist()
    assert path.stat().st_size == table.x.size * 4
    assert table.x.flags.writeable


def test_a_disk_that_is_full_is_an_error_and_leaves_no_file(tmp_path):
    path = tmp_path / "x.f32"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OutputError, match="could not be written"):
            encode_stream(from_frame(TABLE), ENCODER, path=path, chunk_rows=50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    path.touch()
    with pytest.raises(OutputError, match="File exists"):
        encode_stream(from_frame(TABLE), ENCODER, path=path)


DAMAGE = {
    "no columns": lambda d: d.pop("columns"),
    "a list for a record": lambda d: d["columns"].__setitem__(0, []),
    "an unknown kind": lambda d: d["columns"][0].__setitem__("kind", "colour"),
    "an extra field": lambda d: d["columns"][0].__setitem__("extra", 1),
    "text for a number": lambda d: d["numbers"][0].__setitem__("mean", "1"),
    "truth for a number": lambda d: d["numbers"][0].__setitem__("mean", True),
    "scale zero": lambda d: d["numbers"][0].__setitem__("scale", 0.0),
    "infinite": lambda d: d["numbers"][0].__setitem__("mean", float("inf")),
    "an unknown column": lambda d: d["numbers"][0].__setitem__("column", "nobody"),
    "a label twice": lambda d: d["categories"][0].__setitem__("labels", ["red", "red"]),
    "a column twice": lambda d: d["columns"].append(d["columns"][0]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_records_are_refused(case):
    data = copy.deepcopy(json.loads(json.dumps(ENCODER.to_json())))
    DAMAGE[case](data)
    with pytest.raises(
        ModelDirectoryError, match=r"encoder of the model is not valid .* Copy the model anew or fit again"
    ):
        Encoder.from_json(data)


@pytest.mark.parametrize(
    ("name", "target"),
    [("titanic.csv", "Survived"), ("horse-colic.csv", "column_24"), ("mice_boys.csv", "tv")],
)
def test_real_tables_are_encoded_whole_and_finite(shared_data, name, target):
    if shared_data is None:
        pytest.skip("the shared data are not here")
    source = open_table(shared_data / "tabular_missing" / name)
    frame = source.sample(2000)
    encoder = Encoder.fit(frame, describe_columns(frame, ignore=[target]))
    table = encode_stream(
        source, encoder, target=describe_target(frame[target], missing="drop"), chunk_rows=61
    )
    assert np.isfinite(table.x).all()
    assert np.array_equal(table.x, encoder.transform(frame).matrix[table.rows])
    assert len(set(encoder.feature_names)) == encoder.features


@given(st.floats(-1e300, 1e300))
def test_a_number_far_outside_counts_by_its_logarithm(value):
    """One mistyped cell in a new row: known as far out, and no further than a network can answer sensibly."""
    frame = pd.DataFrame({"x": np.random.default_rng(0).normal(size=200)})
    encoder = Encoder.fit(frame, describe_columns(frame))
    part = encoder.numbers[0]
    if abs(value) > MOST:
        return  # refused while reading
    z = float(encoder.transform(pd.DataFrame({"x": [value]})).matrix[0, 0])
    plain = (value - part.mean) / part.scale
    assert abs(z) <= 10 + math.log1p(1e30) + 1e-3
    assert (
        z == pytest.approx(plain, rel=1e-5, abs=1e-6)
        if abs(plain) <= 10
        else 10 <= abs(z) <= 1.001 * abs(plain)
    )
    assert z * plain >= 0
