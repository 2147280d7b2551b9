"""Workers of a Ray cluster, started and watched by Ray Train.

When a worker dies, Ray Train ends the others and starts all of them anew; they go on from the last checkpoint. The
folders of the job and of the checkpoints must lie where all machines of the cluster see them.
"""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import torch

from dropkit.engines.ray_parts import start_ray
from dropkit.engines.workers import RESTARTS, check_workers, work
from dropkit.errors import MissingPackageError, OptionError
from dropkit.training import ProcessTeam
from dropkit.training.team import TIMEOUT


class RayTrain:
    """Workers of Ray Train, each with one CPU of the cluster.

    Args:
        folder: of the job, where Ray keeps its own records too.
        workers: how many.

    Raises:
        MissingPackageError: Ray, or what Ray Train needs, is not installed.
        OptionError: the cluster has fewer CPUs than workers.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        check_workers(workers)
        check_installed()
        ray = start_ray()
        there = float(ray.cluster_resources().get("CPU", 0))
        if workers > there:
            raise OptionError(
                f"workers={workers} were asked for, and the cluster has {there:g} CPUs; they would wait for each other "
                "without end. Ask for fewer."
            )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, args=(self._trainer(folder, workers),), daemon=True)
        self._thread.start()

    @staticmethod
    def _trainer(folder: Path, workers: int) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        return TorchTrainer(
            train_loop,
            train_loop_config={"folder": str(folder.resolve())},
            torch_config=TorchConfig(backend="gloo", timeout_s=int(TIMEOUT)),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="dropkit", storage_path=str(folder.resolve() / "ray"),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )  # fmt: skip

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:  # told in `failure`, by the thread that asks
            self._error = error

    def running(self) -> bool:
        """Whether they are still at it."""
        return self._thread.is_alive()

    def failure(self) -> str | None:
        """What went wrong, as the last worker to fail said it."""
        self._thread.join()
        if self._error is None:
            return None
        from dropkit.engines.ray_parts import told_by

        return told_by(self._error) + "."

    def kill(self) -> None:
        """Leave the cluster, which ends what was started on it."""
        import ray

        if self._thread.is_alive():
            ray.shutdown()
            self._thread.join(10)


def check_installed() -> None:
    """Say what is missing, before anything is done.

    Raises:
        MissingPackageError: Ray, or what Ray Train needs, is not installed.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pydantic") is None:
        raise MissingPackageError(
            "training on many machines needs Ray Train, which is not installed. Get it: pip install 'dropkit[ray]'."
        )


def start(folder: Path, workers: int) -> RayTrain:
    """Start workers on a Ray cluster for the job in a folder; see `dropkit.engines.workers.fit`."""
    return RayTrain(folder, workers)


def train_loop(config: dict[str, str]) -> None:
    """One worker; Ray Train has let the workers meet."""
    torch.set_num_threads(1)
    work(Path(config["folder"]), ProcessTeam())
