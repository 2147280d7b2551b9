"""Workers on this machine, started and watched by torchrun, which is part of torch.

When a worker dies, torchrun ends the others and starts all of them anew; they go on from the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from dropkit.engines.workers import RESTARTS, check_workers, work
from dropkit.training import join_team
from dropkit.training.team import TIMEOUT

LOG = "torchrun.log"
LAUNCHER = "DROPKIT_LAUNCHER"  # number of the process that asked: workers do not outlive it
PATIENCE = 5.0  # seconds in which processes that were told to end do so


class Torchrun:
    """Workers of torchrun, in a session of their own: Ctrl-C on the terminal is for the one who asked.

    Args:
        folder: of the job.
        workers: how many.
        timeout: seconds that a worker waits for the others.
    """

    def __init__(self, folder: Path, workers: int, timeout: float = TIMEOUT) -> None:
        check_workers(workers)
        self.log = folder / LOG
        threads = max(1, torch.get_num_threads() // workers)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost",
                    "--nproc-per-node", str(workers), "--max-restarts", str(RESTARTS), "--monitor-interval", "0.2",
                    "-m", "dropkit.engines.torchrun", str(folder), str(timeout),
                ],
                env=os.environ | {"OMP_NUM_THREADS": str(threads), LAUNCHER: str(os.getpid())},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        """Whether they are still at it."""
        return self.process.poll() is None

    def failure(self) -> str | None:
        """What went wrong, as the last worker to fail said it."""
        if self.process.wait() == 0:
            return None
        said = [
            line.strip() for line in self.log.read_text("utf-8", "replace").splitlines() if "Error: " in line
        ]
        own = [line for line in said if not line.startswith("torch.distributed.elastic")]
        return (own or said or [f"torchrun ended with status {self.process.returncode}"])[-1].rstrip(
            "."
        ) + "."

    def kill(self) -> None:
        """End torchrun, which ends its workers; then whoever is left."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def start(folder: Path, workers: int) -> Torchrun:
    """Start workers on this machine for the job in a folder; see `dropkit.engines.workers.fit`."""
    return Torchrun(folder, workers)


def leave_with(launcher: int) -> None:
    """End this process when torchrun, its parent, or the launcher is gone: nobody waits for what it does."""
    parent = os.getppid()

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                os._exit(1)
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: str, timeout: str) -> None:
    """One worker."""
    if LAUNCHER in os.environ:
        leave_with(int(os.environ[LAUNCHER]))
    with join_team(float(timeout)) as team:
        work(Path(folder), team)


if __name__ == "__main__":
    main(*sys.argv[1:])
