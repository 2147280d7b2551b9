"""A result is on disk whole or not at all, and what is read back is what was written."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropkit import directory
from dropkit.directory import (
    MODEL,
    check_output,
    read_directory,
    strict_json,
    write_directory,
    write_file,
)
from dropkit.errors import ModelDirectoryError, OutputError

FILES = {"model.json": {"a": [1, 2.5, None], "é": "ü"}, "weights.safetensors": bytes(range(256)) * 8}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "model", FILES)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def change_manifest(model: Path, change) -> None:
    manifest = json.loads((model / "manifest.json").read_text())
    change(manifest)
    (model / "manifest.json").write_text(json.dumps(manifest))


@given(data=JSON)
def test_json_comes_back_as_it_was(data):
    assert strict_json(directory.dump_json(data)) == data


def test_a_model_comes_back_as_it_was(model, tmp_path):
    files = read_directory(model)
    assert files.schema == MODEL.schema
    assert files.json("model.json") == FILES["model.json"]
    assert files.bytes("weights.safetensors") == FILES["weights.safetensors"]
    assert names(tmp_path) == {"model"}  # nothing temporary is left
    assert names(model) == {"model.json", "weights.safetensors", "manifest.json"}


def test_a_file_is_copied_in(tmp_path):
    (tmp_path / "report.html").write_text("<p>")
    model = write_directory(tmp_path / "m", {"report.html": tmp_path / "report.html"})
    assert read_directory(model).bytes("report.html") == b"<p>"
    with pytest.raises(ModelDirectoryError, match=r"has no model\.json"):
        read_directory(model).json("model.json")


DAMAGE = {
    "file missing": (lambda m: (m / "model.json").unlink(), r"model\.json is missing from the model"),
    "truncated": (
        lambda m: (m / "weights.safetensors").write_bytes(b"abc"),
        r"weights\.safetensors is truncated: 3 of 2048 bytes",
    ),
    "longer": (lambda m: (m / "weights.safetensors").write_bytes(b"a" * 2049), r"is altered or damaged"),
    "one bit": (
        lambda m: (m / "weights.safetensors").write_bytes(b"\1" + b"\1" * 2047),
        r"is altered or damaged",
    ),
    "a link": (
        lambda m: ((m / "model.json").rename(m.parent / "x"), (m / "model.json").symlink_to(m.parent / "x")),
        r"model\.json is a link; a model holds plain files",
    ),
    "a folder": (lambda m: ((m / "model.json").unlink(), (m / "model.json").mkdir()), r"is not a plain file"),
    "a pipe": (lambda m: ((m / "model.json").unlink(), os.mkfifo(m / "model.json")), r"is not a plain file"),
    "no manifest": (
        lambda m: (m / "manifest.json").unlink(),
        r"has no manifest\.json, so it is not a dropkit model",
    ),
    "no json": (lambda m: (m / "manifest.json").write_text("{"), r"manifest\.json is not valid JSON"),
    "not utf-8": (
        lambda m: (m / "manifest.json").write_bytes(b"\xff{}"),
        r"manifest\.json is not valid JSON",
    ),
    "deep": (
        lambda m: (m / "manifest.json").write_text("[" * 100_000),
        r"not valid JSON \(it is nested too deeply\)",
    ),
    "twice": (lambda m: (m / "manifest.json").write_text('{"a":1,"a":2}'), r"\(a name is given twice\)"),
    "not a number": (
        lambda m: (m / "manifest.json").write_text('{"a":NaN}'),
        r"\(NaN is not a number in JSON\)",
    ),
    "too large": (
        lambda m: (m / "manifest.json").write_text('{"a":1e999}'),
        r"\(1e999 is too large for a number\)",
    ),
    "other format": (
        lambda m: (m / "manifest.json").write_text("[]"),
        r"is not the manifest of a dropkit model",
    ),
}
MANIFESTS = {
    "newer": (
        lambda d: d.update(schema=MODEL.schema + 1),
        rf"schema {MODEL.schema + 1}; this release reads .* to {MODEL.schema}\. Upgrade",
    ),
    "schema text": (lambda d: d.update(schema="1"), r"has schema '1'; a schema is a whole number"),
    "schema truth": (lambda d: d.update(schema=True), r"has schema True"),
    "no files": (lambda d: d.update(files=[]), r"lists no files"),
    "path up": (
        lambda d: d["files"].update({"../secret": {}}),
        r"lists '\.\./secret', which is no plain file name",
    ),
    "absolute": (
        lambda d: d["files"].update({"/etc/passwd": {}}),
        r"lists '/etc/passwd', which is no plain file name",
    ),
    "backslash": (lambda d: d["files"].update({"a\\b": {}}), r"which is no plain file name"),
    "hidden": (lambda d: d["files"].update({".x": {}}), r"which is no plain file name"),
    "no digest": (
        lambda d: d["files"]["model.json"].pop("sha256"),
        r"lists model\.json without a valid size and digest",
    ),
    "size text": (lambda d: d["files"]["model.json"].update(size="9"), r"without a valid size and digest"),
    "size negative": (lambda d: d["files"]["model.json"].update(size=-1), r"without a valid size and digest"),
}


@pytest.mark.parametrize("case", [*DAMAGE, *MANIFESTS])
def test_a_damaged_model_is_refused_in_one_line(model, case):
    if case in DAMAGE:
        damage, message = DAMAGE[case]
        damage(model)
    else:
        change, message = MANIFESTS[case]
        change_manifest(model, change)
    with pytest.raises(ModelDirectoryError, match=message) as caught:
        read_directory(model)
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)


@given(place=st.integers(0, 2047), bit=st.integers(0, 7))
def test_every_changed_bit_is_noticed(tmp_path_factory, place, bit):
    model = write_directory(tmp_path_factory.mktemp("bits") / "m", FILES)
    content = bytearray(FILES["weights.safetensors"])
    content[place] ^= 1 << bit
    (model / "weights.safetensors").write_bytes(content)
    with pytest.raises(ModelDirectoryError, match="altered or damaged"):
        read_directory(model)


def test_what_is_no_directory_is_refused(tmp_path):
    with pytest.raises(
        ModelDirectoryError, match=r"no does not exist\. Give the directory that dropkit fit wrote"
    ):
        read_directory(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(ModelDirectoryError, match="is not a directory"):
        read_directory(tmp_path / "file")


def test_a_model_is_replaced_only_by_force_and_only_a_model(model, tmp_path):
    with pytest.raises(OutputError, match=r"exists\. Give another path, or --force to replace it"):
        write_directory(model, FILES)
    write_directory(model, {"model.json": {"new": 1}}, force=True)
    assert read_directory(model).json("model.json") == {"new": 1}
    (model / "diary.txt").write_text("mine")
    with pytest.raises(
        OutputError, match=r"files that dropkit did not write \(diary\.txt\).*Move them away first"
    ):
        write_directory(model, FILES, force=True)
    other = tmp_path / "photos"
    other.mkdir()
    write_directory(other, FILES, force=True)  # an empty folder holds nothing to lose
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="is not a dropkit model; not even --force replaces it"):
        write_directory(tmp_path / "work", FILES, force=True)
    (tmp_path / "work" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match="has a manifest that is not of a dropkit model"):
        write_directory(tmp_path / "work", FILES, force=True)
    assert names(tmp_path / "work") == {"thesis.tex", "manifest.json"}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a model directory"):
        write_directory(tmp_path / "file", FILES, force=True)
    with pytest.raises(OutputError, match=r"nowhere is not a folder that exists\. Create it first"):
        write_directory(tmp_path / "nowhere" / "m", FILES)
    with pytest.raises(OutputError, match="nowhere"):
        check_output(tmp_path / "nowhere" / "m")


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_model_and_nothing_else(model, tmp_path, monkeypatch, step):
    before = read_directory(model).files

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(directory.os, "fsync", full)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: full() if a.suffix == ".tmp" else rename(a, b))
    with pytest.raises(
        OutputError, match=r"the disk is full\. Nothing was left there\. Free some space"
    ) as caught:
        write_directory(model, {"model.json": {}}, force=True)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OutputError, match="disk is full"):
        write_directory(tmp_path / "new", FILES)
    monkeypatch.undo()
    assert names(tmp_path) == {"model"}
    assert read_directory(model).files == before


def test_an_interrupt_leaves_the_old_model(model, tmp_path, monkeypatch):
    before = read_directory(model).files
    rename = Path.rename

    def interrupted(a: Path, b: Path) -> Path:
        if a.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(a, b)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_directory(model, {"model.json": {}}, force=True)
    assert names(tmp_path) == {"model"}
    assert read_directory(model).files == before


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "p.csv"
    with write_file(path) as file:
        file.write("a,b\r\n")
        assert not path.exists()
    assert path.read_bytes() == b"a,b\r\n"
    with pytest.raises(OutputError, match=r"p\.csv exists\. Give another path, or --force"), write_file(path):
        pass
    with pytest.raises(ZeroDivisionError), write_file(path, force=True) as file:
        print("half", 1 / 0, file=file)
    assert path.read_bytes() == b"a,b\r\n"
    with write_file(path, force=True) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == {"p.csv"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~directory._umask()
    with pytest.raises(OutputError, match="is a folder"), write_file(tmp_path, force=True):
        pass


def test_a_file_that_does_not_fit_is_not_begun(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OutputError, match="could not be written"), write_file(tmp_path / "p.csv") as file:
            file.writelines(["0123456789"] * 10_000)
        with pytest.raises(OutputError, match="could not be written"):
            write_directory(tmp_path / "m", {"w.safetensors": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(tmp_path) == set()


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_directory(tmp_path / "m", {"a.json": {"x": float("nan")}})
    assert names(tmp_path) == set()
