"""A run that was stopped or killed, and started again, ends bit for bit where the run that nobody stopped ends."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dropkit import cli, directory, jobs, training
from dropkit.errors import CheckpointError, DivergedError, DropkitWarning, OutputError
from dropkit.jobs import FitOptions, fit_table
from dropkit.tables.reading import from_frame
from dropkit.training import Candidate, Checkpoints, Fold, NetworkSpec, Plan, fit, train_stack
from dropkit.training import stack as stacking
from dropkit.training.state import StackState
from table_examples import measurements

fitting = importlib.import_module("dropkit.training.fit")  # the module; the package hands on its function

STEPS, ROWS, INPUTS = 50, 60, 3
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((ROWS, INPUTS)).astype(np.float32)
Y = 40 + 6 * np.sin(2 * X[:, 0]) + GENERATOR.standard_normal(ROWS)
CLASSES = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0.5)
FOLDS = [Fold(np.arange(20, 60), np.arange(20)), Fold(np.r_[0:30, 50:60], np.arange(30, 50), stream=1)]
PLAN = Plan(max_epochs=10, batch=8, patience=2, average=0, members=2)  # 40 rows: 5 steps an epoch


class KilledError(BaseException):
    """The process is gone: nothing catches this, nothing is saved."""


def specs(*rates, hidden=(6,), likelihood="gaussian"):
    outputs = 2 if likelihood == "gaussian" else 3
    return [NetworkSpec(INPUTS, hidden, outputs, r, r / 2, likelihood) for r in rates]


def regression(**options):
    return train_stack(
        X, Y, specs(0.2), [0.1], FOLDS[:1], [0], plan=replace(PLAN, patience=99), seed=1, **options
    )


def classification(**options):
    plan, spec = replace(PLAN, patience=99), specs(0.3, likelihood="categorical")
    return train_stack(X, CLASSES, spec, [0.0], FOLDS[:1], [0], plan=plan, seed=2, **options)


def deep_and_averaged(**options):
    plan, deep = replace(PLAN, average=20, patience=99), specs(0.1, 0.5, hidden=(6, 5, 4))
    return train_stack(X, Y, deep, [0.0, 0.3], FOLDS[:1], [0, 0], plan=plan, seed=3, **options)


def many_that_stop(**options):
    """Folds, early stopping at looks of their own, and a program that shrinks as networks leave it."""
    many, plan = (
        specs(0.0, 0.05, 0.1, 0.3, 0.5, 0.7),
        replace(PLAN, patience=3, max_epochs=14, learning_rate=0.05),
    )
    return train_stack(X, Y, many, [0.0] * 6, FOLDS, [0, 1, 0, 1, 0, 1], plan=plan, seed=4, **options)


def ends_of_their_own(**options):
    plan = replace(PLAN, evaluate_every=3, keep="last")
    fold = Fold(FOLDS[0].train, np.zeros(0, np.int64))
    return train_stack(
        X,
        Y,
        specs(0.2, 0.2, 0.4),
        [0.0] * 3,
        [fold],
        [0] * 3,
        plan=plan,
        seed=5,
        epochs=[2, 7, 10],
        **options,
    )


KINDS = [regression, classification, deep_and_averaged, many_that_stop, ends_of_their_own]


def bits(result):
    """All of a result, to be compared to the bit."""
    return [
        (
            [t.numpy().tobytes() for pair in trained.weights for t in pair], trained.row_loss.numpy().tobytes(),
            repr(trained.curve), trained.location, trained.scale, trained.diverged,
        )
        for trained in result.trained
    ] + [result.operations, result.interrupted]  # fmt: skip


@pytest.fixture
def stop_at(monkeypatch):
    """Let something happen in the middle of a step, counted from 1 over all stacks of a run."""
    real = stacking.train_step

    def arrange(number, happens):
        count = 0

        def step(*args):
            nonlocal count
            count += 1
            if count == number:
                happens()
            real(*args)

        monkeypatch.setattr(stacking, "train_step", step)

    return arrange


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Waiting for the disk is most of the time of many small checkpoints, and not what is looked at."""
    monkeypatch.setattr(directory.os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Drawing the page is most of the time of a short fit; the page is a function of the record, which is compared."""
    monkeypatch.setattr(jobs, "to_html", lambda report: report.to_json())


def kill():
    raise KilledError


@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_any_of_50_steps_it_ends_as_if_nothing_had_been(kind, tmp_path, stop_at):
    expected = bits(kind())
    killed = 0
    for n in range(1, STEPS + 1):
        folder = tmp_path / str(n)
        every = 1 + n % 7
        stop_at(n, kill)
        try:
            kind(checkpoints=Checkpoints(folder, every=every))
        except KilledError:
            killed += 1
        stop_at(0, kill)
        checkpoints = Checkpoints(folder, every=every)
        assert checkpoints.there() == (n > every)
        assert bits(kind(checkpoints=checkpoints)) == expected
    assert killed == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_saves_at_the_step_it_came_and_gives_the_best_until_then(kind, tmp_path, stop_at):
    expected = bits(kind())
    for n in (1, 5, 23, 46):
        folder = tmp_path / str(n)
        stop_at(n, lambda: signal.raise_signal(signal.SIGINT))
        assert kind(checkpoints=Checkpoints(folder)).interrupted
        (state,) = folder.glob("*/state.json")
        tree = dict(json.loads(state.read_text())["dict"])
        assert tree["step"] == n
        stop_at(0, kill)
        assert bits(kind(checkpoints=Checkpoints(folder))) == expected


@pytest.mark.parametrize("kind", [many_that_stop, ends_of_their_own])
def test_ctrl_c_after_a_look_does_not_look_again(kind, tmp_path):
    """A look counts patience and may change the program, so it must be neither lost nor repeated."""
    expected = bits(kind())
    for epoch in (3, 6, 7, 9):
        checkpoints = Checkpoints(tmp_path / str(epoch))

        def pressed(event, epoch=epoch):
            if event.epoch == epoch:
                raise KeyboardInterrupt

        kind(checkpoints=checkpoints, progress=pressed)
        assert bits(kind(checkpoints=checkpoints)) == expected


def test_ctrl_c_twice_is_obeyed_in_the_middle_of_a_step_which_is_then_not_saved(tmp_path, monkeypatch):
    expected = bits(regression())
    real, count = torch.optim.Adam.step, 0

    def half(self, *args):
        nonlocal count
        count += 1
        if count == 13:  # weights have decayed, and are not yet moved
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", half)
    assert regression(checkpoints=Checkpoints(tmp_path, every=5)).interrupted
    assert bits(regression(checkpoints=Checkpoints(tmp_path, every=5))) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_stopped_over_and_over_ends_as_if_nothing_had_been(tmp_path, stop_at):
    expected = bits(many_that_stop())
    for _ in range(20):
        stop_at(4, lambda: signal.raise_signal(signal.SIGINT))
        result = many_that_stop(checkpoints=Checkpoints(tmp_path))
        if not result.interrupted:
            break
    assert bits(result) == expected


def test_checkpoints_change_no_bit_and_a_finished_run_is_not_trained_again(tmp_path, stop_at):
    expected = bits(many_that_stop())
    assert bits(many_that_stop(checkpoints=Checkpoints(tmp_path, every=3))) == expected
    stop_at(1, kill)
    assert bits(many_that_stop(checkpoints=Checkpoints(tmp_path))) == expected


def test_how_often_is_counted_in_operations_and_steps(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, **parts: saved.append(step))
    regression(checkpoints=Checkpoints(tmp_path))
    assert saved == [50]
    one = StackState.fresh(specs(0.2), [0.0], FOLDS[:1], [0], PLAN, 0).step_operations(8)
    assert one == 6 * 8 * (INPUTS * 6 + 6 * 2)
    monkeypatch.setattr(stacking, "CHECKPOINT_WORK", 12 * (one + stacking.STEP_WORK))
    saved.clear()
    regression(checkpoints=Checkpoints(tmp_path))
    assert saved == [12, 24, 36, 48, 50]


OTHERS = {
    "seed": {"seed": 9},
    "rates": {"specs": specs(0.3)},
    "decay": {"weight_decays": [0.2]},
    "plan": {"plan": replace(PLAN, learning_rate=0.02)},
    "rows": {"folds": [Fold(FOLDS[0].train[1:], FOLDS[0].validation)]},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_networks_do_not_go_on_from_these_checkpoints(change, tmp_path):
    given = {
        "x": X, "y": Y, "specs": specs(0.2), "weight_decays": [0.1], "folds": FOLDS[:1], "fold_of": [0],
        "plan": PLAN, "seed": 1,
    }  # fmt: skip
    train_stack(**given, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match="holds checkpoints of a run on other networks"):
        train_stack(**given | change, checkpoints=Checkpoints(tmp_path))


# --- the fit: a search in stages, and the training of the winner --------------------------------------------------


@pytest.fixture
def staged(monkeypatch):
    """A search of two widths on some of the rows, and then the winner on all: three stages of a short run."""
    some = [Candidate(rate, 0.0, 0.1, hidden) for hidden in [(6,), (8,)] for rate in (0.0, 0.3)]
    monkeypatch.setattr(fitting, "make_candidates", lambda *given: some)
    monkeypatch.setattr(fitting, "SEARCH_ROWS", 30)

    def run(**options):
        found = fit(X, Y, likelihood="gaussian", max_epochs=4, seed=3, **options)
        weights = {name: t.numpy().tobytes() for name, t in found.network.state_dict().items()}
        return weights, repr((found.spec, found.curve, found.search, found.operations, found.diverged))

    return run


def test_a_fit_killed_in_any_stage_ends_as_if_nothing_had_been(staged, tmp_path, stop_at):
    expected, killed = staged(), 0
    for n in (1, 2, 6, 9, 12, 14, 15):
        folder = tmp_path / str(n)
        stop_at(n, kill)
        try:
            staged(checkpoints=Checkpoints(folder, every=2))
        except KilledError:
            killed += 1
        stop_at(0, kill)
        assert staged(checkpoints=Checkpoints(folder, every=2)) == expected
    assert killed == 7
    assert {p.name for p in folder.iterdir()} == {"search-0", "search-1", "fit"}


def test_a_fit_goes_on_from_the_checkpoint_before_a_damaged_one(staged, tmp_path, stop_at):
    expected = staged()
    stop_at(15, kill)
    with pytest.raises(KilledError):
        staged(checkpoints=Checkpoints(tmp_path, every=1))
    last = max((tmp_path / "fit").iterdir())
    (last / "tensors.safetensors").write_bytes(b"")
    stop_at(0, kill)
    with pytest.warns(DropkitWarning, match="truncated"):
        assert staged(checkpoints=Checkpoints(tmp_path, every=1)) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 4}, "seed=3, and seed=4 was given"),
        ({"max_epochs": 5}, "max_epochs=4, and max_epochs=5 was given"),
        ({"effort": "thorough"}, 'effort="normal", and effort="thorough" was given'),
        ({"x": np.where(np.arange(ROWS)[:, None] == 7, X + 1, X).astype(np.float32)}, "a run on other data"),
        ({"validation_rows": [1, 2, 3]}, "a run on other data"),
    ],
)
def test_a_fit_of_other_options_or_data_is_refused(change, says, tmp_path):
    given = {"x": X, "y": Y, "likelihood": "gaussian", "max_epochs": 4, "seed": 3, "rate": 0.2}
    fit(**given, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match=says):
        fit(**given | change, checkpoints=Checkpoints(tmp_path))


# --- a loss that is no number ------------------------------------------------------------------------------------


def test_a_network_that_diverges_stops_and_the_others_do_not_notice():
    decays = [0.1, 1e30, 0.1]
    result = train_stack(X, Y, specs(0.2, 0.2, 0.5), decays, FOLDS[:1], [0] * 3, plan=PLAN, seed=1)
    assert [t.diverged for t in result.trained] == [None, 2, None]
    _, lost, _ = result.trained
    assert lost.curve.epochs == (0,)
    assert all(torch.isfinite(t).all() for pair in lost.weights for t in pair)
    for k in (0, 2):
        alone = train_stack(X, Y, specs((0.2, 0, 0.5)[k]), [0.1], FOLDS[:1], [0], plan=PLAN, seed=1)
        assert result.trained[k].curve.epochs == alone.trained[0].curve.epochs
        torch.testing.assert_close(result.trained[k].weights[0][0], alone.trained[0].weights[0][0])


def poisoned(at):
    """Rows, and what makes them infinite once the networks have been looked at in this epoch."""
    x = X.copy()

    def poison(event):
        if event.epoch == at:
            x[:] = np.inf

    return x, poison


def test_a_fit_that_diverges_keeps_the_last_good_weights_and_says_the_step():
    x, poison = poisoned(6)  # the first look
    cut = fit(x, Y, likelihood="gaussian", rate=0.2, max_epochs=30, seed=3, progress=poison)
    steps = len(cut.train_rows) // cut.plan.batch
    assert cut.diverged == 6 * steps + 1
    assert not cut.interrupted
    # The weights are those of a training that ended at that look.
    short = fit(X, Y, likelihood="gaussian", rate=0.2, max_epochs=6, seed=3)
    assert short.diverged is None
    for name, weight in cut.network.state_dict().items():
        assert torch.equal(weight, short.network.state_dict()[name])


def test_a_fit_that_learned_nothing_before_it_diverged_is_an_error(tmp_path):
    x = X.copy()
    x[:] = np.inf
    with pytest.raises(DivergedError, match=r"no finite number any more at step 1 of the training"):
        fit(x, Y, likelihood="gaussian", rate=0.2, max_epochs=30)


# --- the whole way: a table to a model directory -----------------------------------------------------------------

OPTIONS = FitOptions(rate=0.2, max_epochs=12, members=8, effort="quick")


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def press(event):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def table():
    return measurements(60)


@pytest.fixture
def whole(table, tmp_path_factory):
    """The model that a run makes which nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "m"
    fit_table(from_frame(table), "y", out, OPTIONS)
    return contents(out)


def test_an_interrupted_fit_leaves_a_model_and_goes_on_to_the_same_bytes(table, whole, tmp_path):
    out, said = tmp_path / "m", []
    fit_table(from_frame(table), "y", out, OPTIONS, progress=press, say=said.append)
    assert said[-1].endswith("m.partial: the same command with --resume goes on.")
    assert contents(out) != whole
    with pytest.raises(OutputError, match=r"m\.partial holds the checkpoints of a fit that was cut short"):
        fit_table(from_frame(table), "y", out, OPTIONS)
    fit_table(from_frame(table), "y", out, OPTIONS, resume=True, say=said.append)
    assert any("goes on from the checkpoints" in s for s in said)
    assert contents(out) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_command_hands_on_what_was_asked_and_records_one_command_for_run_and_resumption(
    monkeypatch, capsys
):
    words = ["dropkit", "fit", "t.csv", "--target", "a b", "--checkpoint-every", "7"]
    seen = []

    def fit_table(*args, **options):
        seen.append(options)
        raise CheckpointError("that will do")

    monkeypatch.setattr(jobs, "fit_table", fit_table)
    for more in ([], ["--resume"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err == "dropkit: that will do\n"
    assert [s["resume"] for s in seen] == [False, True]
    assert [s["checkpoint_every"] for s in seen] == [7, 7]
    assert {s["command"] for s in seen} == {"dropkit fit t.csv --target 'a b' --checkpoint-every 7"}


def test_force_begins_anew_and_resume_without_checkpoints_begins_at_the_beginning(table, whole, tmp_path):
    out, said = tmp_path / "m", []
    fit_table(from_frame(table), "y", out, replace(OPTIONS, seed=5), progress=press)
    fit_table(from_frame(table), "y", out, OPTIONS, force=True)
    assert contents(out) == whole
    with pytest.raises(OutputError, match=r"m exists"):  # nothing says that this model is half of a run
        fit_table(from_frame(table), "y", out, OPTIONS, resume=True)
    shutil.rmtree(out)
    fit_table(from_frame(table), "y", out, OPTIONS, resume=True, say=said.append)
    assert any("begins at the beginning" in s for s in said)
    assert contents(out) == whole


def test_another_table_or_other_options_are_refused_and_cost_nothing(table, whole, tmp_path):
    out = tmp_path / "m"
    fit_table(from_frame(table), "y", out, OPTIONS, progress=press)
    other = table.copy()
    other.loc[7, other.columns[0]] += 1
    calls = {
        r"rate=0\.2, and rate=0\.3 was given": (table, replace(OPTIONS, rate=0.3)),
        r"members=8, and members=9": (table, replace(OPTIONS, members=9)),
        r"a run on other data\. Give the data as they were": (other, OPTIONS),
    }
    for says, (frame, options) in calls.items():
        with pytest.raises(CheckpointError, match=says):
            fit_table(from_frame(frame), "y", out, options, resume=True)
    fit_table(from_frame(table), "y", out, OPTIONS, resume=True)
    assert contents(out) == whole


def test_a_fit_that_diverged_says_so_in_the_report(table, tmp_path, monkeypatch):
    real = training.fit
    monkeypatch.setattr(jobs.training, "fit", lambda *a, **b: replace(real(*a, **b), diverged=77))
    said = []
    report = fit_table(from_frame(table), "y", tmp_path / "m", OPTIONS, say=said.append)
    assert any("no finite number any more at step 77" in s for s in said)
    assert any("at step 77" in s for s in report.data.warnings)


def test_a_fit_that_learned_nothing_leaves_nothing(table, tmp_path, monkeypatch):
    monkeypatch.setitem(stacking.LOSSES, "gaussian", lambda outputs, y: outputs.sum(-1) * torch.inf)
    with pytest.raises(DivergedError):
        fit_table(from_frame(table), "y", tmp_path / "m", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_a_checkpoint_costs_no_training(tmp_path):
    """The kernel itself refuses to write more than so many bytes of a file: the write ends in its middle."""
    expected = bits(regression())
    checkpoints = Checkpoints(tmp_path / "run", every=20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    events = []

    def allow(event):  # space is made before the end
        events.append(event.epoch)
        if event.epoch == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.warns(DropkitWarning, match="No checkpoint at step [24]0; the training goes on") as said:
            result = regression(checkpoints=checkpoints, progress=allow)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [str(w.message)[:24] for w in said] == ["No checkpoint at step 20", "No checkpoint at step 40"]
    assert bits(result) == expected
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["00000001"]


KILLING = """
import json, os, random, shutil, signal, sys
from pathlib import Path
import torch
import torch._dynamo  # torch's optimizers load it; here, so that not every process does
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from table_examples import measurements
from dropkit import jobs
from dropkit.tables.reading import from_frame
import importlib
from dropkit.training import stack

importlib.import_module("dropkit.training.fit").SEARCH_ROWS = 20
options = jobs.FitOptions(max_epochs=12, members=4, seed=1)
table = measurements(44)
jobs.to_html = lambda report: report.to_json()  # drawing is most of the time of so short a fit
countdown = -1

def deadly(real):
    def call(*args, **named):
        global countdown
        elsewhere = isinstance(args[0], Path) and here not in args[0].parents  # such as what Python itself imports
        countdown -= not elsewhere
        if countdown == 0 and not elsewhere:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    return call

def run(out, moment, resume):
    global countdown
    countdown = moment
    stack.train_step = deadly(stack.train_step)
    for owner, name in ((os, "fsync"), (Path, "open"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir")):
        setattr(owner, name, deadly(getattr(owner, name)))
    jobs.fit_table(from_frame(table), "y", out, options, resume=resume, checkpoint_every=3)

def child(*args):
    pid = os.fork()
    if not pid:
        try:
            run(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(pid, 0)[1]) else os.WEXITSTATUS(status)

def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}

here = Path(sys.argv[2])
assert child(here / "whole", -1, False) == 0
expected = contents(here / "whole")
chance, kills, ends, stages, out = random.Random(2), 0, 0, set(), here / "m"
while kills < 30 or not ends:
    ended = child(out, chance.randrange(1, 100) if kills < 30 else -1, True)
    if ended == signal.SIGKILL:
        kills += 1
        stages.update(p.name for p in here.glob("m.partial/*"))
    elif ended == 0:
        ends += 1
        assert contents(out) == expected, "another model"
        shutil.rmtree(out)
    else:
        sys.exit(f"a run ended with {ended} after {kills} kills")
    if out.exists() and not any(here.glob("m.partial/*/0*")):  # killed after its very last file
        assert contents(out) == expected, "another model"
        shutil.rmtree(out)
print(json.dumps({"kills": kills, "stages": sorted(stages)}))
"""


def test_a_process_killed_30_times_ends_with_the_same_bytes(tmp_path):
    """Killed by the kernel in the middle of a step, of a write, or of tidying up, and started again each time."""
    words = [sys.executable, "-c", KILLING, str(Path(__file__).parent), str(tmp_path)]
    one = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # processes are forked
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=one)
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Not all of the kills fell into the beginning.
    assert json.loads(ran.stdout.splitlines()[-1]) == {"kills": 30, "stages": ["fit", "search-0"]}
