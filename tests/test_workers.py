"""Training by several workers: the fit of one, whoever starts them, and although one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dropkit import training
from dropkit.engines import torchrun
from dropkit.engines import workers as crew
from dropkit.errors import DivergedError, DropkitWarning, EngineError, MissingPackageError, OptionError
from dropkit.training import Checkpoints, Fit, Fold, NetworkSpec, Plan, train_stack

ROWS = 240


class ThreadTeam:
    """Workers that are threads of this process, and wait for each other at a barrier."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.slots, self.barrier = rank, len(slots), slots, barrier

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        self.slots[self.rank] = [t.detach().clone() for t in tensors]
        self.barrier.wait(60)
        totals = []
        for parts in zip(*self.slots, strict=True):
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            totals.append(total)
        self.barrier.wait(60)
        with torch.no_grad():
            for tensor, total in zip(tensors, totals, strict=True):
                tensor.copy_(total)

    def any(self, said: bool) -> bool:
        votes = torch.tensor([int(said)])
        self.sum_([votes])
        return bool(votes)


class Threads:
    """An engine for tests: so many threads, each with its own way of doing the work."""

    def __init__(self, workers: int, work: Callable[[ThreadTeam], Any]) -> None:
        barrier, slots = threading.Barrier(workers), [None] * workers
        self.results: list[Any] = [None] * workers
        self.errors: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                self.results[rank] = work(ThreadTeam(rank, slots, barrier))
            except BaseException as error:
                self.errors.append(error)
                barrier.abort()

        self.threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
        for thread in self.threads:
            thread.start()

    def running(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def failure(self) -> str | None:
        return f"{type(self.errors[0]).__name__}: {self.errors[0]}." if self.errors else None

    def kill(self) -> None:
        for thread in self.threads:
            thread.join(60)

    def wait(self) -> list[Any]:
        self.kill()
        if self.errors:
            raise self.errors[0]
        return self.results


def start(folder: Path, workers: int) -> Threads:
    """Workers that are threads, for the job in a folder."""
    return Threads(workers, lambda team: crew.work(folder, team))


def table(rows: int = ROWS, classes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    x = generator.standard_normal((rows, 4)).astype(np.float32)
    y = 7 + 3 * x[:, 0] + np.sin(3 * x[:, 1]) + 0.3 * generator.standard_normal(rows)
    return x, (np.digitize(y, [5.0, 9.0]) if classes else y)


OPTIONS: dict[str, Any] = {"likelihood": "gaussian", "rate": 0.2, "hidden": (8,), "max_epochs": 12, "seed": 4}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_workers(where: Path, workers: int, options: dict[str, Any] = OPTIONS, **others: Any) -> Fit:
    """A fit by workers, threads unless something else is said."""
    (where / "job").mkdir(parents=True)
    asked = {"start": start, "checkpoints": Checkpoints(where / "run", every=10), **others, **options}
    x, y = asked.pop("table", None) or table(classes=options["likelihood"] == "categorical")
    return crew.fit(x, y, workers=workers, folder=where / "job", **asked)


def same_bits(a: Fit, b: Fit) -> bool:
    networks = zip(a.network.state_dict().values(), b.network.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in networks) and (a.curve, a.search) == (b.curve, b.search)


# --- slices of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize(
    ("workers", "batch"), [(1, 16), (2, 16), (3, 16), (3, 2)]
)  # (3, 2): a worker without rows
def test_a_stack_of_networks_trained_by_workers_is_that_of_one(workers, batch, likelihood):
    x, y = table(90, classes=likelihood == "categorical")
    folds = [Fold(np.arange(20, 90), np.arange(20)), Fold(np.r_[0:50, 70:90], np.arange(50, 70), stream=1)]
    specs = [
        NetworkSpec(4, (8, 8), 2 if likelihood == "gaussian" else 3, *rates, likelihood)
        for rates in ((0.0, 0.0), (0.5, 0.1), (0.2, 0.0))
    ]
    plan = Plan(max_epochs=3, batch=batch, patience=1, members=3, average=5)

    def train(team=None):
        return train_stack(x, y, specs, [0.1, 0.0, 0.01], folds, [0, 1, 0], plan=plan, seed=2, team=team)

    one, found = train(), Threads(workers, train).wait()
    for result in found:
        assert result.operations == one.operations
        for mine, first, alone in zip(result.trained, found[0].trained, one.trained, strict=True):
            assert mine.curve == first.curve
            assert mine.curve.epochs == alone.curve.epochs
            np.testing.assert_allclose(mine.curve.train, alone.curve.train, rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(mine.row_loss, alone.row_loss, rtol=1e-2, atol=1e-2)
            for layer, other, wanted in zip(mine.weights, first.weights, alone.weights, strict=True):
                for a, b, c in zip(layer, other, wanted, strict=True):
                    assert torch.equal(a, b)
                    torch.testing.assert_close(a, c, rtol=1e-2, atol=1e-3)
    if workers == 1:
        assert found[0].trained[1].weights[0][0].equal(one.trained[1].weights[0][0])


def test_workers_see_one_number_of_rows_between_them_and_no_row_twice(monkeypatch):
    seen: list[np.ndarray] = []
    take = training.rows.Table.take

    def watched(self, rows):
        seen.append(rows.copy())
        return take(self, rows)

    x, y = table(50)
    plan = Plan(max_epochs=1, batch=50, members=0)
    monkeypatch.setattr(training.rows.Looks, "both", lambda *_: (torch.zeros(1), torch.zeros(1)))
    monkeypatch.setattr(training.rows.Table, "take", watched)
    spec, fold = NetworkSpec(4, (8,), 2, 0.2, 0.0, "gaussian"), Fold(np.arange(50), np.arange(0))
    Threads(
        3, lambda team: train_stack(x, y, [spec], [0.0], [fold], [0], plan=plan, seed=0, team=team)
    ).wait()
    assert sorted(rows.shape[1] for rows in seen) == [16, 17, 17]
    assert sorted(np.concatenate(seen, axis=1)[0].tolist()) == list(range(50))


# --- the whole fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_a_search_by_workers_is_that_of_one(tmp_path, likelihood):
    options = {"likelihood": likelihood, "effort": "quick", "hidden": (8,), "max_epochs": 4, "seed": 4}
    looks: list[Any] = []
    one = training.fit(*table(classes=likelihood == "categorical"), **options)
    two = by_workers(tmp_path / "2", 2, options, progress=looks.append)
    assert two.spec == one.spec
    assert [trial.candidate for trial in two.search.trials] == [t.candidate for t in one.search.trials]
    for mine, alone in zip(two.search.trials, one.search.trials, strict=True):
        np.testing.assert_allclose(mine.validation, alone.validation, rtol=1e-2, atol=1e-3)
    assert {look.stage for look in looks} == {"search"}
    assert looks[-1].epoch == 4
    assert same_bits(two, by_workers(tmp_path / "again", 2, options))
    assert same_bits(one, by_workers(tmp_path / "1", 1, options))


def test_a_matrix_that_is_a_file_is_not_copied_and_rows_are_handed_over(tmp_path):
    x, y = table()
    file = tmp_path / "x.f32"
    file.write_bytes(b"????" * 4 + x.tobytes())
    mapped = np.memmap(file, np.float32, "c", 16, x.shape)
    rows = {"rows": np.arange(10, ROWS), "validation_rows": np.arange(20, 60)}
    alone = training.fit(x, y, **OPTIONS, **rows)
    assert same_bits(by_workers(tmp_path / "a", 1, table=(mapped, y), **rows), alone)
    assert not (tmp_path / "a" / "job" / "x.npy").exists()
    # A part of a map begins elsewhere in the file than the map says; it is copied.
    assert same_bits(
        by_workers(tmp_path / "b", 1, table=(mapped[3:], y[3:])), training.fit(x[3:], y[3:], **OPTIONS)
    )


def test_workers_that_were_asked_to_stop_are_gone_on_from(tmp_path):
    """The first Ctrl-C stops all at one look; the run goes on where it stopped, with any number of workers."""
    whole = by_workers(tmp_path / "whole", 2)

    def interrupt(look: Any) -> None:
        if not stopped:
            stopped.append(look.epoch)
            raise KeyboardInterrupt

    stopped: list[int] = []
    cut = by_workers(tmp_path / "cut", 2, progress=interrupt)
    assert cut.interrupted
    assert cut.curve.epochs[-1] < whole.curve.epochs[-1] == 12
    assert cut.curve.epochs == whole.curve.epochs[: len(cut.curve.epochs)]
    asked = {"start": start, "checkpoints": Checkpoints(tmp_path / "cut" / "run", every=10)}
    (tmp_path / "cut" / "job" / crew.STOP).unlink()
    resumed = crew.fit(*table(), workers=2, folder=tmp_path / "cut" / "job", **asked, **OPTIONS)
    assert not resumed.interrupted
    assert same_bits(resumed, whole)


def test_a_second_interrupt_ends_the_workers(tmp_path):
    class Endless:
        killed = False

        def running(self):
            raise KeyboardInterrupt

        def kill(self):
            self.killed = True

    engine = Endless()
    with pytest.raises(KeyboardInterrupt):
        crew.follow(engine, tmp_path, None)
    assert engine.killed
    assert (tmp_path / crew.STOP).exists()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_mistake_that_a_worker_finds_is_raised_as_its_own_class(tmp_path):
    x, y = table()
    x[:, 0] = np.inf
    with pytest.raises(DivergedError, match="no finite number any more at step 1 "):
        by_workers(tmp_path, 2, table=(x, y))
    told = [json.loads(line) for line in (tmp_path / "job" / crew.TOLD).read_text().splitlines()]
    assert [line["error"]["kind"] for line in told if "error" in line] == ["DivergedError"]


def test_a_worker_that_fails_ends_the_fit_with_its_message(tmp_path):
    def failing(folder: Path, workers: int) -> Threads:
        def work(team: ThreadTeam) -> None:
            if team.rank:
                raise RuntimeError("the lamp went out")
            crew.work(folder, team)

        return Threads(workers, work)

    with pytest.raises(EngineError, match="failed"):
        by_workers(tmp_path, 2, start=failing)


def test_what_workers_tell_is_handed_on_once_and_whole(tmp_path):
    lines = [{"warning": "mind the gap"}, {"error": {"kind": "NoSuchError", "text": "what?"}}]
    told = tmp_path / crew.TOLD
    assert crew._new_lines(told, 0) == (0, [])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    told.write_text(text[:-5])
    place, found = crew._new_lines(told, 0)
    assert found == lines[:1]
    told.write_text(text)
    assert crew._new_lines(told, place) == (len(text), lines[1:])
    with pytest.warns(DropkitWarning, match="mind the gap"):
        crew._hand_on(lines[0], None)
    with pytest.raises(EngineError, match="what"):
        crew._hand_on(lines[1], None)


def test_warnings_of_others_stay_with_the_worker(tmp_path):
    told = crew.Told(tmp_path, ThreadTeam(0, [None], threading.Barrier(1)))
    silent = crew.Told(tmp_path, ThreadTeam(1, [None, None], threading.Barrier(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = told.warning
        warnings.warn("for programmers", UserWarning, stacklevel=1)
        warnings.warn("for the user", DropkitWarning, stacklevel=1)
        warnings.showwarning = silent.warning
        warnings.warn("said by the first worker already", DropkitWarning, stacklevel=1)
    assert crew._new_lines(tmp_path / crew.TOLD, 0)[1] == [{"warning": "for the user"}]


def test_options_that_cannot_be_meant_are_refused(monkeypatch, tmp_path):
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(OptionError, match="workers="):
            crew.start_of("torchrun", wrong)
    with pytest.raises(OptionError, match=r"engine='slurm' was given; it is one of torchrun, ray"):
        crew.start_of("slurm", 2)
    assert crew.start_of("ray", 1) is None
    assert crew.start_of("torchrun", 2) is torchrun.start
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dropkit\[ray\]'"):
        crew.start_of("ray", 2)


# --- processes --------------------------------------------------------------------------------------------------------


def worker_of(folder: Path, rank: int) -> int:
    """Process number of a worker that torchrun has started for the job in a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"dropkit.engines.torchrun" in words
            and f"RANK={rank}".encode() in environment
            and str(folder).encode() in words
        ):
            return int(process.name)
    raise AssertionError(f"no worker {rank}")


def test_a_killed_worker_costs_time_and_nothing_else(tmp_path):
    """Worker 1 is killed after the second look; torchrun starts both anew, and they end where threads end."""
    options = OPTIONS | {"max_epochs": 20}
    looks: list[Any] = []

    def follow(look: Any) -> None:
        looks.append(look)
        if len(looks) == 2:
            os.kill(worker_of(tmp_path / "torchrun" / "job", 1), signal.SIGKILL)

    found = by_workers(tmp_path / "torchrun", 2, options, start=torchrun.start, progress=follow)
    assert same_bits(found, by_workers(tmp_path / "threads", 2, options))
    log = (tmp_path / "torchrun" / "job" / torchrun.LOG).read_text()
    assert "exitcode: -9" in log
    assert [look.step for look in looks].count(looks[0].step) == 1, "the second start began at the beginning"


def test_workers_that_cannot_do_their_work_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(torchrun, "RESTARTS", 0)
    engine = torchrun.Torchrun(tmp_path, 1)  # there is no job
    with pytest.raises(EngineError, match=r"FileNotFoundError: .*job\.json"):
        crew.follow(engine, tmp_path, None)
    engine = torchrun.Torchrun(tmp_path, 1)
    engine.kill()
    assert not engine.running()
    assert engine.process.returncode is not None


WAITING = """
import sys
from dropkit.engines.torchrun import leave_with
leave_with(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_worker_does_not_outlive_the_one_who_asked():
    """One whose launcher ends leaves; one whose launcher lives stays."""
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watching = {
        pid: subprocess.Popen(
            [sys.executable, "-c", WAITING, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for pid in (launcher.pid, os.getpid())
    }
    assert all(process.stdout.readline() == b"ready\n" for process in watching.values())
    launcher.kill()
    launcher.wait()
    assert watching[launcher.pid].wait(60) == 1
    assert watching[os.getpid()].poll() is None
    watching[os.getpid()].communicate(b"", timeout=60)
    watching[launcher.pid].communicate()
    launcher.stdin.close()
