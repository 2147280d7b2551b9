"""What a run writes down while it goes, and what a terminal shows of it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropkit.cli import console
from dropkit.errors import MissingPackageError, OptionError, OutputError
from dropkit.training import (
    Checkpoints,
    Fold,
    JsonLines,
    NetworkSpec,
    Plan,
    Progress,
    TensorBoard,
    follow,
    read_log,
    train_stack,
)

EVENT = Progress("search", 3, 9, 4, 12, 0.25, 60, (16, 8), 0.2, 0.1, 0.125, 0.5)


def run(progress, validate=True, **options):
    """Three networks on a line with noise."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((80, 3)).astype(np.float32)
    y = x[:, 0] + 0.3 * generator.standard_normal(80)
    rows = np.arange(80)
    folds = [Fold(rows[:60], rows[60:] if validate else rows[:0])]
    specs = [NetworkSpec(3, (8,), 2, rate, 0.0, "gaussian") for rate in (0.5, 0.0, 0.2)]
    plan = Plan(max_epochs=5, batch=16)
    return train_stack(
        x, y, specs, [0.0] * 3, folds, [0] * 3, plan=plan, seed=1, progress=progress, **options
    )


def test_a_line_says_what_was_seen_and_which_network_leads(tmp_path):
    with JsonLines(tmp_path / "run.jsonl") as log:
        result = run(log)
    lines = read_log(tmp_path / "run.jsonl")
    curves = [network.curve for network in result.trained]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    for i, line in enumerate(lines, start=1):
        lowest = [min(curve.validation[: i + 1]) for curve in curves]
        leader = int(np.argmin(lowest))
        assert line["best"] == lowest[leader]
        assert line["rate"] == result.trained[leader].spec.rate
        assert (line["train"], line["validation"]) == (curves[leader].train[i], curves[leader].validation[i])
        assert line["gap"] == line["validation"] - line["train"]
        assert line["step"] == 3 * i  # 60 rows in batches of 16
        assert (line["live"], line["networks"], line["hidden"]) == (3 if i < 5 else 0, 3, [8])
    assert "seconds" not in lines[0]


def test_equal_runs_write_equal_bytes_and_seconds_are_under_their_key(tmp_path):
    for name in "ab":
        with JsonLines(tmp_path / name) as log:
            run(log)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with JsonLines(tmp_path / "c", seconds=True) as log:
        run(log)
    timed = read_log(tmp_path / "c")
    assert all(line.pop("seconds") >= 0 for line in timed)
    assert timed == read_log(tmp_path / "a")


def test_what_is_not_finite_is_null(tmp_path):
    with JsonLines(tmp_path / "run.jsonl") as log:
        run(log, validate=False)
        log({"step": 9, "train": math.inf})
    *lines, last = read_log(tmp_path / "run.jsonl")
    assert all(line["best"] is line["validation"] is line["gap"] is None for line in lines)
    assert all(line["train"] > 0 and line["rate"] == 0.5 for line in lines)
    assert last == {"step": 9, "train": None}


@given(
    losses=st.lists(st.floats(allow_nan=False), min_size=1, max_size=12, unique=True),
    data=st.data(),
    clock=st.booleans(),
)
def test_a_resumed_log_is_that_of_a_run_that_nobody_stopped(losses, data, clock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    whole, parts = folder / "whole", folder / "parts"
    events = [{"step": step, "train": loss} for step, loss in enumerate(losses)]
    with JsonLines(whole) as log:
        for event in events:
            log(event)
    killed = data.draw(st.integers(0, len(events)))  # lines that were written
    saved = data.draw(st.integers(0, killed))  # of which so many lie before the checkpoint
    half = data.draw(st.integers(0, 20))  # bytes of a line that was being written
    with JsonLines(parts, seconds=clock) as log:
        for event in events[:killed]:
            log(event)
    if killed < len(events):
        with parts.open("ab") as file:
            file.write((json.dumps(events[killed]) + "\n").encode()[:half].rstrip(b"\n"))
    another_day = mock.patch("dropkit.training.logs.time.monotonic", itertools.count(1000).__next__)
    with another_day, JsonLines(parts, resume=True, seconds=clock) as log:
        for event in events[saved:]:
            log(event)
    if clock:
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(parts)] == read_log(
            whole
        )
    else:
        assert parts.read_bytes() == whole.read_bytes()


def test_a_run_that_is_killed_leaves_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "run.jsonl"
    code = (
        "import os, sys; from dropkit.training import JsonLines; log = JsonLines(sys.argv[1])\n"
        "for step in range(5): log({'step': step})\n"
        'log._file.write(b\'{"step": 5, "tr\'); log._file.flush(); os.kill(os.getpid(), 9)'
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert killed.returncode == -9
    assert [line["step"] for line in read_log(path)] == [0, 1, 2, 3, 4]
    with JsonLines(path, resume=True) as log:
        log({"step": 3})
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(4))


@pytest.mark.parametrize("looks", [0, 2, 3])
def test_a_training_that_is_killed_and_resumed_ends_with_the_log_of_one_that_was_not(tmp_path, looks):
    with JsonLines(tmp_path / "whole") as log:
        run(log)

    def killed(event):
        if event.epoch > looks:
            raise MemoryError  # nothing that training knows how to end well

    # Every 4 steps, of 3 an epoch: seldom where a line is written.
    checkpoints = Checkpoints(tmp_path / "states", every=4)
    with JsonLines(tmp_path / "parts") as log, pytest.raises(MemoryError):
        run(follow(log, killed), checkpoints=checkpoints)
    assert len(read_log(tmp_path / "parts")) == looks + 1
    with JsonLines(tmp_path / "parts", resume=True) as log:
        run(log, checkpoints=Checkpoints(tmp_path / "states", every=4))
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_log_is_never_lost_by_mistake(tmp_path):
    path = tmp_path / "run.jsonl"
    JsonLines(path).close()
    assert not path.exists()  # a run that fails before its first look leaves nothing
    path.write_text('{"step": 1}\n')
    with pytest.raises(OutputError, match="exists"):
        JsonLines(path)
    with JsonLines(path, resume=True):
        pass
    assert path.read_text() == '{"step": 1}\n'
    with JsonLines(path, force=True) as log:
        log({"step": 7})
    assert read_log(path) == [{"step": 7}]
    path.write_text("a,b\n1,2\n")
    for reading in (lambda: JsonLines(path, resume=True), lambda: read_log(path)):
        with pytest.raises(OptionError, match="line 1"):
            reading()
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(OutputError, match="not a folder that exists"):
        JsonLines(tmp_path / "nowhere" / "run.jsonl")
    with pytest.raises(OptionError, match="cannot be read"):
        read_log(tmp_path / "nowhere")


def test_a_full_disk_is_one_line():
    with pytest.raises(OutputError, match="No space left"), JsonLines("/dev/full", force=True) as log:
        log({"step": 0})


def test_tensorboard_gets_every_number_by_step(tmp_path):
    with TensorBoard(tmp_path / "board") as board:
        run(follow(board, None))
        board(EVENT)
        board({"step": 4, "loss": 0.5, "note": "not a number", "flag": True})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(tmp_path / "board"))
    seen.Reload()
    tags = set(seen.Tags()["scalars"])
    assert {
        "fit/train",
        "fit/validation",
        "fit/gap",
        "fit/rate",
        "fit/live",
        "search 16x8/gap",
        "run/loss",
    } <= tags
    assert not tags & {"run/note", "run/flag"}
    assert [event.step for event in seen.Scalars("fit/gap")] == [3, 6, 9, 12, 15]
    assert seen.Scalars("search 16x8/gap")[0].value == 0.375


def test_without_tensorboard_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"dropkit\[logs\]"):
        TensorBoard(tmp_path)


def test_several_follow_one_run():
    heard: list[str] = []
    tell = follow(
        lambda event: heard.append(f"a{event.epoch}"), None, lambda event: heard.append(f"b{event.epoch}")
    )
    tell(EVENT)
    assert heard == ["a3", "b3"]
    assert follow(None, None) is None


def test_a_terminal_shows_loss_gap_rate_and_networks():
    assert console.state_in_words(EVENT) == (
        "epoch 3/9, 4 of 12 networks, loss 0.250, gap +0.375, rate 0.2 (inputs 0.1)"
    )
    nan = math.nan
    alone = Progress("fit", 1, 4, 1, 1, nan, 20, (8,), 0.5, 0.0, 0.75, nan)
    assert console.state_in_words(alone) == "epoch 1/4, training loss 0.750, rate 0.5"


def test_the_command_line_writes_both_logs(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dropkit.cli import app

    generator = np.random.default_rng(3)
    x = generator.standard_normal(60)
    table = tmp_path / "data.csv"
    table.write_text(
        "x,y\n" + "".join(f"{a},{2 * a + b}\n" for a, b in zip(x, generator.standard_normal(60), strict=True))
    )
    arguments = [
        "fit",
        str(table),
        "--target",
        "y",
        "--effort",
        "quick",
        "--max-epochs",
        "2",
        "--members",
        "4",
    ]
    logs = ["--log", str(tmp_path / "run.jsonl"), "--tensorboard", str(tmp_path / "board")]
    done = CliRunner().invoke(app, [*arguments, *logs, "--out", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    lines = read_log(tmp_path / "run.jsonl")
    assert {line["stage"] for line in lines} == {
        "search"
    }  # so few rows: the winner of the search is the model
    assert lines[-1]["epoch"] == 2
    assert list((tmp_path / "board").iterdir())
    again = CliRunner().invoke(app, [*arguments, *logs, "--out", str(tmp_path / "other")])
    assert again.exit_code == 2
    assert "run.jsonl exists" in " ".join(again.output.split())
    assert not (tmp_path / "other").exists()
