"""The command line: one clear line for a mistake, and nothing left behind; plain text in a pipe; Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dropkit import cli, jobs
from dropkit.report import FitReport
from table_examples import change_model, kinds, measurements

FAST = ["--effort", "quick", "--rate", "0.2", "--max-epochs", "3", "--members", "8"]


@dataclass(frozen=True)
class Ran:
    """What a command left: exit status, its words, and new names in its folder."""

    status: int
    out: str
    err: str
    left: set[str]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def dropkit(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder, with an empty folder for temporary files."""
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def run(*words: object) -> Ran:
        before = names(work)
        monkeypatch.setattr(sys, "argv", ["dropkit", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        # torch makes a cache folder of its own when its optimisers are first loaded
        assert not [name for name in names(scratch) if not name.startswith("torchinductor_")]
        return Ran(ended.value.code or 0, out, err, names(work) - before)

    return run


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    measurements().to_csv(folder / "t.csv", index=False)
    kinds().to_csv(folder / "k.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def model(tables) -> Path:
    options = jobs.FitOptions(rate=0.2, members=8, max_epochs=3, effort="quick")
    jobs.fit_table(tables / "t.csv", "y", tables / "model", options)
    return tables / "model"


def refused(ran: Ran, *parts: str) -> None:
    """One line on standard error, status 2, nothing else."""
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith("dropkit: ")
    assert (ran.status, ran.out, ran.left) == (2, "", set())
    for part in parts:
        assert part in ran.err


def text(*lines: str) -> bytes:
    return "\n".join((*lines, "")).encode()


FILES = {
    "empty": (b"", "is empty (0 bytes)"),
    "blank": (b"\n\n \n", "holds blanks only"),
    "header alone": (b"x,y\n", "no rows"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is a PNG image, not a table"),
    "workbook": (b"PK\x03\x04" + bytes(99), "ZIP archive (an Excel workbook is one)"),
    "noise": (np.random.default_rng(0).bytes(5000), "binary data"),
    "json": (b'[{"x": 1, "y": 2}]', "looks like JSON"),
    "cut parquet": (b"PAR1" + bytes(50), "is a damaged Parquet file"),
    "ragged": (text("x,y", "1,2", "3,4,5"), "line 3, has 3 cells where the table has 2"),
    "names twice": (
        text("x,x,y", *(f"{i % 7},{i},{i * i % 11}" for i in range(40))),
        "more than one column called 'x'",
    ),
    "one row": (text("x,y", "1,2.5"), "one row"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_table_is_refused(dropkit, tmp_path, name):
    content, said = FILES[name]
    (tmp_path / "t.csv").write_bytes(content)
    refused(
        dropkit("fit", tmp_path / "t.csv", "--target", "y", *FAST), said, "t.csv" if name != "one row" else ""
    )


CHANGES = {
    "target absent": (lambda t: t.drop(columns="y"), "Column 'y' is not in"),
    "target constant": (lambda t: t.assign(y=1.5), "is 1.5 in every one of 120 rows"),
    "target with gaps": (
        lambda t: t.assign(y=t.y.where(t.index > 3)),
        "no value in 4 of 120 rows, first in row 1",
    ),
    "target infinite": (lambda t: t.assign(y=t.y.where(t.index > 3, np.inf)), "Column 'y', row 1, holds inf"),
    "target of dates": (lambda t: t.assign(y=t.day), "holds dates"),
    "target of names": (lambda t: t.assign(y=[f"n{i}" for i in t.index]), "120 different values in 120 rows"),
    "class seen once": (
        lambda t: t.assign(y=["a", *["b", "c"] * 59, "b"]),
        "Class a of target 'y' is seen once",
    ),
    "cell infinite": (
        lambda t: t.assign(x=t.x.where(t.index != 5, -np.inf)),
        "Column 'x', row 6, holds -inf",
    ),
    "19 rows": (lambda t: t[:19], "has 19 rows with a target; at least 20"),
    "no column left": (lambda t: t[["y"]].assign(a="b"), "No column is left to learn from"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_table_that_cannot_be_learned_from_is_refused(dropkit, tmp_path, name):
    change, said = CHANGES[name]
    change(measurements()).to_csv(tmp_path / "t.csv", index=False)
    refused(dropkit("fit", tmp_path / "t.csv", "--target", "y", *FAST), said)


WORDS = {
    "no such file": (["fit", "nowhere.csv", "--target", "y"], "nowhere.csv does not exist"),
    "a folder": (["fit", "{}", "--target", "y"], "is a folder"),
    "a name of two lines": (["fit", "no\nwhere.csv", "--target", "y"], "no where.csv does not exist"),
    "no target": (["fit", "{}/t.csv"], "was given without a target"),
    "target alone": (["fit", "--target", "y"], "was given without a table"),
    "regression of words": (
        ["fit", "{}/k.csv", "--target", "kind", "--task", "regression"],
        "regression needs numbers",
    ),
    "rate nan": (["fit", "{}/t.csv", "--target", "y", "--rate", "nan"], "rate=nan was given"),
    "rate percent": (["fit", "{}/t.csv", "--target", "y", "--rate", "20"], "write 0.2"),
    "rate word": (
        ["fit", "{}/t.csv", "--target", "y", "--rate", "big"],
        "--rate big was given; it is auto or a number",
    ),
    "share 0": (["fit", "{}/t.csv", "--target", "y", "--test-share", "0"], "strictly between 0 and 1"),
    "share word": (
        ["fit", "{}/t.csv", "--target", "y", "--test-share", "half"],
        "Invalid value for '--test-share'",
    ),
    "seed": (["fit", "{}/t.csv", "--target", "y", "--seed", str(1 << 64)], "64 bits"),
    "seed -1": (["fit", "{}/t.csv", "--target", "y", "--seed", "-1"], "Invalid value for '--seed'"),
    "members": (["fit", "{}/t.csv", "--target", "y", "--members", "1000000000"], "has 4 to 4096"),
    "task": (["fit", "{}/t.csv", "--target", "y", "--task", "guess"], "Invalid value for '--task'"),
    "kind": (["fit", "{}/t.csv", "--target", "y", "--kind", "x=colour"], "kind 'colour' was given"),
    "kind of none": (
        ["fit", "{}/t.csv", "--target", "y", "--kind", "w=number"],
        "Column 'w' was named in the options",
    ),
    "kind alone": (["fit", "{}/t.csv", "--target", "y", "--kind", "x"], "write COLUMN=number"),
    "ignored target": (["fit", "{}/t.csv", "--target", "y", "--ignore", "y"], "both as the target"),
    "out nowhere": (["fit", "{}/t.csv", "--target", "y", "--out", "a/b"], "is not a folder that exists"),
    "out a table": (
        ["fit", "{}/t.csv", "--target", "y", "--out", "{}/t.csv"],
        "exists. Give another path, or --force",
    ),
    "force a table": (
        ["fit", "{}/t.csv", "--target", "y", "--out", "{}/t.csv", "--force"],
        "not a model directory",
    ),
    "force a folder": (
        ["fit", "{}/t.csv", "--target", "y", "--out", "{}", "--force"],
        "not even --force replaces it",
    ),
    "ray for one": (["fit", "{}/t.csv", "--target", "y", "--engine", "ray"], "--workers 2 or more"),
    "predictions over their table": (
        ["predict", "{}/model", "{}/t.csv", "--out", "{}/t.csv", "--force"],
        "t.csv",
    ),
    "out too long": (["fit", "{}/t.csv", "--target", "y", "--out", "m" * 300], "File name too long"),
    "no such option": (["fit", "{}/t.csv", "--epochs", "3"], "No such option: --epochs"),
    "no such command": (["train"], "No such command 'train'"),
    "predict nothing": (["predict"], "Missing argument"),
    "no model": (["predict", "nowhere", "{}/t.csv"], "nowhere does not exist"),
    "model is a file": (["predict", "{}/t.csv", "{}/t.csv"], "is not a directory"),
    "model is a folder": (["predict", "{}", "{}/t.csv"], "no manifest.json, so it is not a dropkit model"),
    "chunk": (["predict", "{}/model", "{}/t.csv", "--chunk-rows", "0"], "Invalid value for '--chunk-rows'"),
    "predictions exist": (["predict", "{}/model", "{}/t.csv", "--out", "{}/t.csv"], "t.csv exists"),
    "predictions too long": (["predict", "{}/model", "{}/t.csv", "--out", "p" * 300], "File name too long"),
    "predictions as parquet": (
        ["predict", "{}/model", "{}/t.csv", "--out", "p.parquet"],
        "are written as CSV",
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_command_that_cannot_be_meant_is_refused(dropkit, tables, model, name):
    words, said = WORDS[name]
    before = {path: path.read_bytes() for path in tables.rglob("*") if path.is_file()}
    refused(dropkit(*(word.replace("{}", str(tables)) for word in words)), said)
    assert {path: path.read_bytes() for path in tables.rglob("*") if path.is_file()} == before


NEW_ROWS = {
    "column absent": (lambda t: t.drop(columns="z"), "lacks the column 'z'"),
    "another case": (lambda t: t.rename(columns={"z": "Z"}), "Did you mean 'Z'?"),
    "words": (lambda t: t.assign(z=t.colour), "row 1 holds"),
    "one word late": (
        lambda t: t.assign(x=t.x.astype(str).where(t.index != 99, "n/k")),
        "row 100 holds 'n/k'",
    ),
    "no date": (lambda t: t.assign(day="soon"), "not a date"),
    "infinite": (lambda t: t.assign(x=np.inf), "Column 'x', row 1, holds inf"),
    "no rows": (lambda t: t[:0], "no rows"),
    "predicted before": (lambda t: t.assign(y_mean=0), "has a column 'y_mean'"),
}


@pytest.mark.parametrize("name", NEW_ROWS)
def test_rows_that_cannot_be_predicted_are_refused(dropkit, model, tmp_path, name):
    change, said = NEW_ROWS[name]
    change(measurements()).to_csv(tmp_path / "new.csv", index=False)
    refused(dropkit("predict", model, tmp_path / "new.csv", "--chunk-rows", "10"), said)


DAMAGE = {
    "newer": (lambda m: edit_manifest(m, "schema", 99), "schema 99; this release reads"),
    "cut": (lambda m: (m / "weights.safetensors").write_bytes(b"abc"), "truncated"),
    "edited": (
        lambda m: (m / "model.json").write_text((m / "model.json").read_text().replace("x", "w")),
        "altered",
    ),
    "a file gone": (lambda m: (m / "model.json").unlink(), "is missing"),
    "a path outside": (lambda m: edit_manifest(m, "files", {"../t.csv": {}}), "no plain file name"),
    "digests mended": (
        lambda m: change_model(m, lambda d: d["network"].update(hidden=[10**9])),
        "does not hold a model",
    ),
}


def edit_manifest(model: Path, key: str, value: object) -> None:
    data = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(data | {key: value}))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_model_that_is_not_sound_is_refused(dropkit, tables, model, tmp_path, name):
    damage, said = DAMAGE[name]
    damage(Path(shutil.copytree(model, tmp_path / "model")))
    refused(dropkit("predict", tmp_path / "model", tables / "t.csv"), said)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_full_disk_is_one_line_and_leaves_nothing(dropkit, tables, model, monkeypatch, command):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = (
        ["fit", tables / "t.csv", "--target", "y", *FAST]
        if command == "fit"
        else ["predict", model, tables / "t.csv"]
    )
    ran = dropkit(*words)
    assert (ran.status, ran.out, ran.left) == (2, "", set())
    assert ran.err.splitlines()[-1].startswith("dropkit: ")
    assert "the disk is full. Nothing was left there." in ran.err


def test_results_go_to_standard_output_and_sentences_to_standard_error(dropkit, tables, tmp_path):
    ran = dropkit("fit", tables / "t.csv", "--target", "y", "--out", "m", *FAST)
    assert (ran.status, ran.left) == (0, {"m"})
    assert ran.err == "Regression: 'y' holds numbers with fractions (120 different).\n"
    assert "24 held out" in " ".join(ran.out.split())
    assert "Model in m, report in m/report.html" in ran.out
    assert "\x1b" not in ran.out + ran.err
    frame = measurements(10).assign(colour="mauve")
    frame.to_csv(tmp_path / "new.csv", index=False)
    ran = dropkit("predict", "m", tmp_path / "new.csv")
    assert (ran.status, ran.left) == (0, {"predictions.csv"})
    assert ran.out.startswith("10 rows predicted into predictions.csv: y_mean, y_std, ")
    assert (
        "'colour': cells with a category that the model has not seen, which counts as none it knows: 10."
        in ran.err
    )


def test_json_is_all_that_is_on_standard_output(dropkit, tables):
    ran = dropkit("fit", tables / "k.csv", "--target", "kind", "--out", "m", "--json", *FAST)
    assert FitReport.from_json(ran.out).data.task == "classification"
    ran = dropkit("predict", "m", tables / "k.csv", "--json")
    assert json.loads(ran.out)["rows"] == 120
    assert json.loads(ran.out)["columns"][0] == "kind_predicted"


def test_force_replaces_a_model_and_predictions(dropkit, tables, model):
    shutil.copytree(model, "m")
    before = Path("m/weights.safetensors").read_bytes()
    words = ["fit", tables / "t.csv", "--target", "y", "--out", "m", "--seed", "7", *FAST]
    refused(dropkit(*words), "m exists")
    assert Path("m/weights.safetensors").read_bytes() == before
    assert dropkit(*words, "--force").status == 0
    assert Path("m/weights.safetensors").read_bytes() != before
    Path("m/notes.txt").write_text("mine")
    refused(dropkit(*words, "--force"), "holds files that dropkit did not write (notes.txt)")
    Path("p.csv").write_text("mine")
    refused(dropkit("predict", model, tables / "t.csv", "--out", "p.csv"), "p.csv exists")
    assert Path("p.csv").read_text() == "mine"
    assert dropkit("predict", model, tables / "t.csv", "--out", "p.csv", "--force").status == 0
    assert len(pd.read_csv("p.csv")) == 120


def test_names_that_are_hard_to_write_go_the_whole_way(dropkit, tmp_path):
    frame = measurements()
    hard = {
        "x": "ü 日本",
        "z": 'a "b", c',
        "colour": "two\nlines",
        "day": "<script>alert(1)</script>",
        "fresh": "n" * 2000,
    }
    frame = frame.rename(columns=hard | {"y": "<b>&'\n,"})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert dropkit("fit", tmp_path / "t.csv", "--target", "<b>&'\n,", "--out", "m", *FAST).status == 0
    assert "<script>alert(1)" not in Path("m/report.html").read_text(encoding="utf-8")
    assert dropkit("predict", "m", tmp_path / "t.csv").status == 0
    assert list(pd.read_csv("predictions.csv").columns[:6]) == list(frame.columns)


@pytest.mark.parametrize("when", ["reading", "training"])
def test_ctrl_c_leaves_nothing_before_there_is_a_network_and_the_best_one_after(
    dropkit, tables, monkeypatch, when
):
    if when == "reading":
        monkeypatch.setattr(jobs, "describe_target", lambda *a, **b: signal.raise_signal(signal.SIGINT))
    else:

        @contextmanager
        def pressed():
            yield (
                lambda sentence: sys.stderr.write(sentence + "\n"),
                lambda event: signal.raise_signal(signal.SIGINT),
            )

        monkeypatch.setattr(sys.modules["dropkit.cli.fit"], "progress_line", pressed)
    ran = dropkit("fit", tables / "t.csv", "--target", "y", "--out", "m", *FAST)
    if when == "reading":
        assert (ran.status, ran.out, ran.left) == (130, "", set())
        assert ran.err == "dropkit: interrupted; nothing was written.\n"
    else:
        assert (ran.status, ran.left) == (0, {"m", "m.partial"})
        assert "m.partial: the same command with --resume goes on." in ran.err
        assert "The training was interrupted; the model is the best there was until then." in ran.err
        assert dropkit("predict", "m", tables / "t.csv").status == 0


def test_a_reader_who_has_seen_enough_is_no_error_of_ours(tables, tmp_path):
    words = [
        sys.executable,
        "-m",
        "dropkit.cli",
        "fit",
        str(tables / "t.csv"),
        "--target",
        "y",
        "--out",
        "m",
        *FAST,
    ]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # nobody reads
    err = process.stderr.read()
    process.wait()
    process.stderr.close()
    assert "Traceback" not in err
    assert "Exception" not in err
    assert (tmp_path / "m" / "report.html").is_file()  # the work was done when the words went nowhere


def test_help_is_what_one_gets_who_says_nothing(dropkit):
    ran = dropkit()
    assert ran.status == 0
    assert "predict" in ran.out


def test_a_model_of_another_table_needs_a_table(dropkit, tables):
    assert dropkit("fit", tables / "t.csv", "--target", "y", "--out", "m", *FAST).status == 0
    ran = dropkit("predict", "m")
    assert (ran.status, ran.left) == (2, set())
    assert "m was given without a table. Give the CSV or Parquet file to predict." in ran.err


def test_the_version_is_printed(dropkit):
    import dropkit as package

    ran = dropkit("--version")
    assert (ran.status, ran.out) == (0, f"dropkit {package.__version__}\n")
