"""`dropkit inspect`: what it prints and writes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dropkit.jobs import FitOptions, fit_table
from table_examples import measurements
from test_cli import dropkit, model, refused, tables
from test_measure_penalty import one_thread

__all__ = ["dropkit", "model", "one_thread", "tables"]

FEW = ["--members", "4"]


def test_it_prints_what_to_change_and_writes_the_page(dropkit, tables, model):
    ran = dropkit("inspect", model, tables / "t.csv", *FEW)
    assert (ran.status, ran.err, ran.left) == (0, "", {"inspection.html"})
    assert "dropout1 (dropkit.nn.Dropout, p = 0.2" in ran.out
    assert "The page is in inspection.html." in ran.out
    page = Path("inspection.html").read_text(encoding="utf-8")
    assert "Site by site" in page
    assert f"dropkit inspect {model}" in page
    refused(dropkit("inspect", model, tables / "t.csv", *FEW), "inspection.html exists")
    ran = dropkit("inspect", model, tables / "t.csv", *FEW, "--force", "--new", tables / "t.csv", "--json")
    assert (ran.status, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["rows"] == 120
    assert found["figures"]["gap"]["value"] == 0  # the rows are the same
    assert found["sites"][0]["site"].startswith("dropout")


WORDS = {
    "no model": (["inspect", "nowhere", "{}/t.csv"], "nowhere does not exist"),
    "no table": (["inspect", "{}/model"], "was given without a table"),
    "no such table": (["inspect", "{}/model", "nowhere.csv"], "nowhere.csv does not exist"),
    "no target": (["inspect", "{}/model", "{}/k.csv"], "lacks the target 'y'"),
    "seed": (
        ["inspect", "{}/model", "{}/t.csv", "--seed", str(1 << 64)],
        "seed=18446744073709551616 was given",
    ),
    "members": (["inspect", "{}/model", "{}/t.csv", "--members", "1"], "Invalid value for '--members'"),
    "rows": (["inspect", "{}/model", "{}/t.csv", "--rows", "3"], "Invalid value for '--rows'"),
    "page nowhere": (["inspect", "{}/model", "{}/t.csv", "--out", "a/b.html"], "is not a folder that exists"),
    "page exists": (["inspect", "{}/model", "{}/t.csv", "--out", "{}/t.csv"], "t.csv exists"),
    "tolerance": (
        ["inspect", "{}/model", "{}/t.csv", *FEW, "--tolerance", "0.0001"],
        "tolerance=0.0001 was asked; with 120 rows the standard error is",
    ),
    "tolerance 0": (["inspect", "{}/model", "{}/t.csv", *FEW, "--tolerance", "0"], "tolerance=0.0 was given"),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_mistake_is_one_line_and_leaves_nothing(dropkit, tables, model, name):
    words, said = WORDS[name]
    refused(dropkit(*(word.replace("{}", str(tables)) for word in words)), said)


def test_a_model_without_dropout_or_with_rows_too_few_or_not_finite_is_one_line(dropkit, tables, model):
    fit_table(tables / "t.csv", "y", "plain", FitOptions(rate=0.0, members=4, max_epochs=2, effort="quick"))
    refused_by_name = [
        (["inspect", "plain", tables / "t.csv"], "every rate of this model is 0"),
        (["inspect", model, "few.csv"], "has 5 rows with a target among 5 looked at; at least 8"),
        (["inspect", model, "infinite.csv"], "Column 'x', row 1, holds inf"),
    ]
    measurements(5).to_csv("few.csv", index=False)
    measurements().assign(x=np.inf).to_csv("infinite.csv", index=False)
    for words, said in refused_by_name:
        refused(dropkit(*words, *FEW), said)


@pytest.mark.parametrize("option", [("--out",), ("--new", "{}/k.csv", "--out")])
def test_force_replaces_no_table_that_is_read(dropkit, tables, model, option):
    read = tables / "k.csv" if len(option) > 1 else tables / "t.csv"
    before = read.read_bytes()
    words = [word.replace("{}", str(tables)) for word in option]
    refused(dropkit("inspect", model, tables / "t.csv", *words, read, "--force"), "is the table that is read")
    assert read.read_bytes() == before


def test_a_log_does_not_replace_the_table(dropkit, tables):
    before = (tables / "t.csv").read_bytes()
    words = ["--target", "y", "--effort", "quick", "--max-epochs", "1", "--force", "--log"]
    refused(dropkit("fit", tables / "t.csv", *words, tables / "t.csv"), "is the table that is read")
    assert (tables / "t.csv").read_bytes() == before
