"""Work shared out among threads: all of it once, errors come out, and a forked child does it too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropkit.masks import threads

MUCH = 1 << 24  # elements: worth all threads that torch has


@pytest.fixture(params=["team", "pool"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Torch's team of OpenMP threads, and the pool of our own that stands in for it elsewhere."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


def test_the_team_is_found_where_torch_has_gnus_openmp(way: str) -> None:
    there = "libgomp" in Path("/proc/self/maps").read_text()
    assert (threads._openmp() is not None) is (there and way == "team")


@settings(max_examples=50, deadline=None)
@given(units=st.integers(1, 500), grain=st.integers(1, 40))
def test_every_unit_is_done_once(units: int, grain: int) -> None:
    done, starts, lock = [], [], threading.Lock()

    def run(start: int, stop: int) -> None:
        with lock:
            done.extend(range(start, stop))
            starts.append(start)

    threads.in_parallel(run, units, MUCH, grain)
    assert sorted(done) == list(range(units))
    assert all(start % grain == 0 for start in starts)


def test_several_threads_take_part() -> None:
    # Each waits for the others, so that none can do the work of two.
    barrier = threading.Barrier(3, timeout=20)
    seen = set()

    def run(start: int, stop: int) -> None:
        barrier.wait()
        seen.add(threading.get_ident())

    threads.in_parallel(run, 3, MUCH)
    assert len(seen) == 3


def test_an_error_of_any_thread_comes_out() -> None:
    for bad in range(3):

        def run(start: int, stop: int, bad: int = bad) -> None:
            if start == bad:
                raise ValueError(f"unit {bad}")

        with pytest.raises(ValueError, match=f"unit {bad}"):
            threads.in_parallel(run, 3, MUCH)
    assert threads._jobs == {}


def test_several_callers_at_once() -> None:
    results: dict[int, int] = {}

    def call(number: int) -> None:
        total = []
        threads.in_parallel(lambda start, stop: total.append(stop - start), 100 + number, MUCH)
        results[number] = sum(total)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == {number: 100 + number for number in range(8)}


def test_a_forked_child_has_threads_of_its_own() -> None:
    threads.in_parallel(lambda start, stop: None, 3, MUCH)  # the parent's threads are there
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        done = []
        threads.in_parallel(lambda start, stop: done.append(stop - start), 9, MUCH)
        os._exit(0 if sum(done) == 9 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
