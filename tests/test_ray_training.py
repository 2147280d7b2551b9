"""Ray Train and Ray Tune on two CPUs of this machine: what threads of one process find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dropkit import training
from dropkit.engines import ray_train, ray_tune
from dropkit.engines import workers as crew
from dropkit.errors import EngineError, OptionError, ProbabilityError
from test_workers import by_workers, same_bits, table

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of the packages that it brings
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_workers_of_ray_train_end_where_threads_end(tmp_path: Path) -> None:
    looks: list[Any] = []
    found = by_workers(tmp_path / "ray", 2, start=ray_train.start, progress=looks.append)
    assert same_bits(found, by_workers(tmp_path / "threads", 2))
    assert [look.epoch for look in looks] == list(found.curve.epochs[1:])
    with pytest.raises(OptionError, match="workers=3 were asked for, and the cluster has 2 CPUs"):
        by_workers(tmp_path / "three", 3, start=ray_train.start)


def test_a_search_by_ray_tune_is_that_of_one_process(tmp_path: Path) -> None:
    options = {"likelihood": "gaussian", "effort": "quick", "max_epochs": 2, "seed": 4}
    one = training.fit(*table(), **options).search
    assert one is not None
    two = ray_tune.search_candidates(*table(), folder=tmp_path, **options)
    assert two.chosen == one.chosen
    assert [trial.candidate for trial in two.trials] == [trial.candidate for trial in one.trials]
    for mine, alone in zip(two.trials, one.trials, strict=True):
        np.testing.assert_allclose(mine.validation, alone.validation, rtol=1e-4)
        np.testing.assert_allclose(mine.train, alone.train, rtol=1e-4)
        assert mine.best_epoch == alone.best_epoch
    assert (two.rows, two.networks, two.operations, two.folds) == (
        one.rows, one.networks, one.operations, one.folds,
    )  # fmt: skip


def test_rates_of_anything_are_tried_each_once(tmp_path: Path) -> None:
    def loss(rate: float) -> float:
        return (rate - 0.3) ** 2

    found = ray_tune.search_rates(loss, [0.5, 0.2, 0.5], folder=tmp_path / "good")
    assert found == {0.5: loss(0.5), 0.2: loss(0.2)}
    with pytest.raises(ProbabilityError, match=r"1\.5"):
        ray_tune.search_rates(loss, [1.5], folder=tmp_path)
    with pytest.raises(OptionError, match="no rates"):
        ray_tune.search_rates(loss, [], folder=tmp_path)
    with pytest.raises(OptionError, match="workers=0"):
        ray_tune.search_rates(loss, [0.5], folder=tmp_path, workers=0)


def test_a_trial_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rate: float) -> float:
        raise ValueError("no such rate")

    monkeypatch.setattr(ray_tune, "RESTARTS", 0)
    with pytest.raises(EngineError, match="no such rate"):
        ray_tune.search_rates(broken, [0.5], folder=tmp_path)


def test_a_job_that_cannot_be_read_ends_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "RESTARTS", 0)
    engine = ray_train.start(tmp_path, 1)
    with pytest.raises(EngineError, match=r"job\.json"):
        crew.follow(engine, tmp_path, None)
