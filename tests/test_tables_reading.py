"""A table is what its file says, however it is cut into chunks; whatever is no table is refused in one clear line."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropkit.errors import OptionError, TableError
from dropkit.tables.reading import TableSource, from_frame, open_table

CELLS = st.text(alphabet='ab1.,;"\n\t |é', max_size=6)


def whole(source: TableSource, rows: int = 1000) -> pd.DataFrame:
    return pd.concat(list(source.chunks(rows)))


def write(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(data=st.data(), rows=st.integers(1, 7), chunk=st.integers(1, 9))
def test_what_csv_writes_is_read_back_in_any_chunks(tmp_path_factory, data, rows, chunk):
    table = [[data.draw(CELLS), "x", data.draw(CELLS)] for _ in range(rows)]
    text = io.StringIO()
    csv.writer(text).writerows([["first", "second", "third"], *table])
    path = write(tmp_path_factory.mktemp("csv"), text.getvalue())
    read = whole(open_table(path), chunk)
    # an unquoted cell loses its leading blanks, as everywhere
    assert [[cell.strip() for cell in row] for row in read.to_numpy().tolist()] == [
        [cell.strip() for cell in row] for row in table
    ]
    assert read.index.tolist() == list(range(rows))


@pytest.mark.parametrize(
    ("content", "columns", "first"),
    [
        ("a,b\n1,x\n2,y\n", ("a", "b"), ["1", "x"]),
        ("\ufeffa,b\r\n1,x\r\n2,y\r\n", ("a", "b"), ["1", "x"]),  # byte order mark, Windows line ends
        ("a;b\n1,5;x\n2,5;y\n", ("a", "b"), ["1,5", "x"]),
        ("a\tb\n1\tx y\n2\tz\n", ("a", "b"), ["1", "x y"]),
        ("a|b\n1|x\n", ("a", "b"), ["1", "x"]),
        ("\n\na,b\n\n1,x\n   \n2,y\n\n", ("a", "b"), ["1", "x"]),  # blank lines are no rows
        ("a b c\n1 2 3\n4  5 6 \n", ("a", "b", "c"), ["1", "2", "3"]),
        (" 0.1  2.0\n 3.0  4.0\n", ("column_1", "column_2"), ["0.1", "2.0"]),
        ("1,?,3\n4,5,6\n", ("column_1", "column_2", "column_3"), ["1", "?", "3"]),
        ("0,1,2\n4,5,6\n", ("0", "1", "2"), ["4", "5", "6"]),  # a count is a header
        (",a\n0,x\n1,y\n", ("unnamed_1", "a"), ["0", "x"]),
        ('a\tb\n1\the said "so"\n2\t"half a quote\n', ("a", "b"), ["1", 'he said "so"']),
        ("only\nx\ny\n", ("only",), ["x"]),
        ('a,b\n"1\n2","x, ""y"""\n3,z\n', ("a", "b"), ["1\n2", 'x, "y"']),
        ("a,b\n1,2".encode("utf-16"), ("a", "b"), ["1", "2"]),
        ("a,b\ncaf\u00e9,2\n".encode("latin-1"), ("a", "b"), ["caf\u00e9", "2"]),
    ],
)
def test_how_a_text_table_is_written_is_found_out(tmp_path, content, columns, first):
    source = open_table(write(tmp_path, content))
    frame = whole(source)
    assert source.columns == columns
    assert frame.iloc[0].tolist() == first
    assert source.count() == len(frame)


def test_decisions_are_said(tmp_path):
    assert "without a header" in open_table(write(tmp_path, "1,2\n3,4\n")).notes[0]
    assert not open_table(write(tmp_path, "1,2\n3,4\n")).header
    assert open_table(write(tmp_path, "1,2\n3,4\n"), header=True).columns == ("1", "2")
    assert open_table(write(tmp_path, "a,b\n3,4\n"), header=False).count() == 2
    assert "Windows-1252" in open_table(write(tmp_path, "a,b\né,4\n".encode("latin-1"))).notes[0]
    assert "unnamed_1" in open_table(write(tmp_path, ",b\n3,4\n")).notes[0]
    assert open_table(write(tmp_path, "a,b\n3,4\n")).notes == ()


def test_gzip_is_found_by_its_first_bytes(tmp_path):
    path = write(tmp_path, gzip.compress(b"a,b\n1,2\n"), "misleading.csv")
    assert whole(open_table(path)).to_numpy().tolist() == [["1", "2"]]


def test_parquet_keeps_its_types_in_any_chunks(tmp_path):
    frame = pd.DataFrame(
        {
            "n": [1.5, np.nan, 3.0],
            "i": [1, 2, 3],
            "t": ["x", None, "z"],
            "b": [True, False, True],
            "d": pd.to_datetime(["2024-01-01", "2024-06-01", "2025-01-01"]),
        },
        index=[7, 8, 9],
    )
    frame.to_parquet(tmp_path / "t.parquet")
    source = open_table(tmp_path / "t.parquet")
    assert source.columns == ("n", "i", "t", "b", "d")
    assert "row labels" in source.notes[0]
    one, many = whole(source), whole(source, 1)
    assert one["b"].dtype == bool
    assert one["d"].dtype.kind == "M"
    assert one["i"].tolist() == [1, 2, 3]
    pd.testing.assert_frame_equal(one, many, check_dtype=False)


def test_an_array_is_a_table():
    source = from_frame(np.arange(6.0).reshape(3, 2))
    assert source.columns == ("x0", "x1")
    assert whole(source, 2).to_numpy().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert source.cells("x1").tolist() == [1, 3, 5]


@given(rows=st.integers(1, 60), n=st.integers(1, 70), seed=st.integers(0, 5))
def test_a_sample_is_distinct_rows_in_order_with_their_numbers(rows, n, seed):
    sample = from_frame(pd.DataFrame({"a": np.arange(rows) * 10})).sample(n, seed)
    assert len(sample) == min(n, rows)
    assert (sample["a"].to_numpy() == 10 * sample.index.to_numpy()).all()
    assert sample.index.is_monotonic_increasing
    assert sample.index.is_unique


def test_a_sample_does_not_depend_on_the_size_of_chunks(monkeypatch):
    source = from_frame(pd.DataFrame({"a": np.arange(5000)}))
    drawn = source.sample(100, 3).index.tolist()
    monkeypatch.setattr("dropkit.tables.source.CHUNK_ROWS", 37)
    assert source.sample(100, 3).index.tolist() == drawn
    assert source.sample(100, 4).index.tolist() != drawn
    assert source.count() == 5000


@given(rows=st.integers(1, 300), n=st.integers(1, 40), seed=st.integers(0, 2**64))
def test_a_sample_is_the_rows_with_the_smallest_keys(rows, n, seed):
    keys = np.random.Generator(np.random.Philox(key=seed)).random(rows)
    expected = np.sort(np.argsort(keys)[:n])
    source = from_frame(pd.DataFrame({"a": np.arange(rows)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dropkit.tables.source.CHUNK_ROWS", 7)  # so that rows are thrown out on the way
        assert source.sample(n, seed).index.tolist() == expected.tolist()


REFUSED = {
    "folder": (None, r"is a folder without a file that ends in \.parquet\. A table is a CSV or TSV file"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "blanks": (b" \n \n", r"holds blanks only"),
    "header only": (b"a,b\n", r"has a header \(2 columns\) and no rows\. Give a table with rows"),
    "image": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, r"is a PNG image, not a table\. .* Export the data as CSV"),
    "workbook": (b"PK\x03\x04" + b"\0" * 50, r"is a ZIP archive \(an Excel workbook is one\)"),
    "binary": (b"abc\0\1\2" * 30, r"holds binary data"),
    "web page": (b"<!DOCTYPE html><html></html>", r"is a web page or XML"),
    "json": (b'[{"a": 1}]', r"looks like JSON"),
    "same names": (b"a,b,a,b\n1,2,3,4\n", r"more than one column called 'a', 'b'\. Give every column a name"),
    "broken gzip": (gzip.compress(b"a,b\n1,2\n" * 1000)[:-20], r"is a damaged gzip file"),
    "broken parquet": (b"PAR1" + b"x" * 100, r"is a damaged Parquet file"),
    "short row": (
        b"a,b,c\n1,2,3\n\n4,5\n",
        r"line 4, has 2 cells where the table has 3 columns .*commas.*Mend the line",
    ),
    "long row": (b"a,b\n1,2\n3,4,5\n", r"line 3, has 3 cells where the table has 2 columns"),
    "open quote": (b'a,b\n1,2\n"3,4\n5,6\n', r"row that starts on line 3 has a quote out of place"),
    "not text": (b"a,b\n\x81\x8d,2\n", r"is neither UTF-8 nor cp1252 text\. Save it as UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, case):
    content, message = REFUSED[case]
    path = tmp_path if content is None else write(tmp_path, content)
    with pytest.raises(TableError, match=message) as caught:
        whole(open_table(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_parquet_files_is_one_table_in_the_order_of_their_names(tmp_path):
    frame = pd.DataFrame({"n": range(9), "t": list("abcdefghi")})
    for name, start, end in (("b", 4, 9), ("a", 0, 4), ("c", 9, 9)):
        frame[start:end].to_parquet(tmp_path / f"{name}.parquet", index=False)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".a.parquet").write_bytes(b"half a copy")
    source = open_table(tmp_path)
    assert source.columns == ("n", "t")
    for rows in (1, 2, 3, 100):
        pd.testing.assert_frame_equal(pd.concat(source.chunks(rows)), frame, check_index_type=False)
    assert source.count() == 9
    assert source.sample(5, 3).index.tolist() == from_frame(frame).sample(5, 3).index.tolist()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"n": [1]}, r"b\.parquet lacks the column 't' of a\.parquet"),
        ({"n": [1], "t": ["x"], "u": [1]}, r"b\.parquet has a column 'u', which is not in a\.parquet"),
        ({"n": [1.5], "t": ["x"]}, r"b\.parquet holds double in the column 'n', beside int64 in a\.parquet"),
        ({"t": ["x"], "n": [1]}, r"b\.parquet has its columns in another order than a\.parquet"),
    ],
)
def test_files_of_a_folder_have_one_form(tmp_path, other, message):
    pd.DataFrame({"n": [1], "t": ["x"]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(other).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(TableError, match=message):
        open_table(tmp_path)


def test_other_mistakes_are_told(tmp_path):
    path = write(tmp_path, "height,Weight\n1,2\n")
    with pytest.raises(TableError, match=r"no\.csv does not exist\. Give the path"):
        open_table(tmp_path / "no.csv")
    with pytest.raises(
        TableError, match=r"'weight' is not in .*Did you mean 'Weight'\? Its columns are: height, Weight"
    ):
        open_table(path).column("weight")
    with pytest.raises(TableError, match=r"Did you mean 'column_2'"):
        open_table(write(tmp_path, "1,2\n3,4\n")).column("2")
    with pytest.raises(OptionError, match=r"rows=0 was given; a chunk has at least 1 row"):
        next(open_table(path).chunks(0))
    with pytest.raises(OptionError, match="n=0"):
        open_table(path).sample(0)
    with pytest.raises(OptionError, match="encoding='klingon'"):
        open_table(path, encoding="klingon")
    with pytest.raises(TableError, match="1 axes; a table has two"):
        from_frame(np.zeros(3))
    with pytest.raises(TableError, match="more than one column called 'a'"):
        from_frame(pd.DataFrame([[1, 2]], columns=["a", "a"]))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "header"),
    [
        ("tabular_missing/titanic.csv", 891, 12, True),
        ("tabular_missing/horse-colic.csv", 300, 28, False),
        ("tabular_missing/mice_boys.csv", 748, 9, True),
        ("uci_regression/boston/data.txt", 506, 14, False),
        ("uci_regression/concrete/data.txt", 1030, 9, False),
        ("uci_regression/kin8nm/data.txt.gz", 8192, 9, False),
        ("seq_design/avgfp.tsv.gz", 54024, 4, True),
    ],
)
def test_real_files_have_the_size_their_description_states(shared_data, name, rows, columns, header):
    if shared_data is None:
        pytest.skip("the shared data are not here")
    source = open_table(shared_data / name)
    assert (source.count(), len(source.columns), source.header) == (rows, columns, header)
