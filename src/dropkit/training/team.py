"""A team of processes that train one model: what each found on its rows, summed.

Masks are functions of row ids, so a team needs nothing more than that sum: no generator is kept in step, and nothing is
set up worker by worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dropkit.errors import EngineError, OptionError

TIMEOUT = 300.0  # seconds that a worker waits for the others before it takes one of them for dead


class ProcessTeam:
    """The processes of a group of torch.distributed, as a `Team`.

    Args:
        group: of processes; None is all of them.

    Raises:
        EngineError: no group of processes has been set up.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise EngineError(
                "a team was asked for where no processes have met. Start the script with torchrun and call "
                "torch.distributed.init_process_group first, or use join_team."
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the team.

        t <- ((t[0] + t[1]) + t[2]) + ...,    t[r] that of worker r

        Every worker gets all parts and adds them in the same order, so that the sum has equal bits everywhere, and
        depends on how many workers there are, never on who came first. A worker receives size * bytes.

        Args:
            tensors: of any shapes, alike on all workers; changed in place.

        Raises:
            EngineError: another worker is gone, or did not answer in time.
        """
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            alike = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1) for t in alike])
            parts = [torch.empty_like(flat) for _ in range(self.size)]
            try:
                dist.all_gather(parts, flat, group=self.group)
            except RuntimeError as error:
                raise EngineError(
                    f"worker {self.rank} of {self.size} waited in vain for the others: {str(error).splitlines()[0]}. "
                    "One of them has failed; its own message says why."
                ) from error
            total = parts[0]
            for part in parts[1:]:
                total += part
            pieces = total.split([t.numel() for t in alike])
            with torch.no_grad():
                for tensor, piece in zip(alike, pieces, strict=True):
                    tensor.copy_(piece.view(tensor.shape))

    def any(self, said: bool) -> bool:
        """Whether any worker says yes; all get the same answer."""
        votes = torch.tensor([int(said)])
        self.sum_([votes])
        return bool(votes)


@contextmanager
def join_team(timeout: float = TIMEOUT) -> Iterator[ProcessTeam]:
    """Meet the other processes that torchrun has started, and part at the end.

    Args:
        timeout: seconds that a worker waits for the others before it gives up; a dead worker is never waited for
            longer.

    Raises:
        OptionError: the timeout is not above 0.
        EngineError: this process was not started by torchrun, or the others were not found.
    """
    if not timeout > 0:
        raise OptionError(f"timeout={timeout!r} was given; seconds above 0 are needed.")
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise EngineError(
            "this process was not started by torchrun, so there is no team to join. Start it as: torchrun "
            "--nproc-per-node 2 script.py"
        )
    wait = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=wait))
        # Where torchrun starts workers anew, the store may still hold the addresses of those who are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"the workers could not meet: {str(error).splitlines()[0]}") from error
    try:
        yield ProcessTeam()
    finally:
        dist.destroy_process_group()
