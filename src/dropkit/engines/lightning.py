"""Lightning: the masks of a training run as functions of their address, by one callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dropkit.errors import MissingPackageError, OptionError
from dropkit.masks import masks

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    raise MissingPackageError(
        "dropkit.engines.lightning needs the package lightning: pip install 'dropkit[lightning]'"
    ) from None


class Masks(Callback):
    """Open `dropkit.masks(seed, step, samples)` around every training batch: forward pass, backward pass and step.

    The step is the trainer's `global_step`, which stands still while gradients accumulate; the row ids come with the
    batch. So masks are the same after a resume, with more devices, and with smaller batches that are accumulated.

    Args:
        seed: of all masks, 64 bits.
        rows: where the row ids are in a batch: a key, a position, or a function of the batch that gives (B,) whole
            numbers.

    Raises:
        OptionError: when training begins, a batch without row ids there.
    """

    def __init__(self, seed: int = 0, rows: str | int | Callable[[Any], Any] = "row") -> None:
        self.seed = seed
        self.rows = rows
        self._open: masks | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Open the context of this batch."""
        self._close()
        context = masks(seed=self.seed, step=trainer.global_step, samples=self._ids(batch))
        context.__enter__()
        self._open = context

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close it."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close it when a batch fails."""
        self._close()

    def _ids(self, batch: Any) -> Any:
        try:
            return self.rows(batch) if callable(self.rows) else batch[self.rows]
        except (KeyError, IndexError, TypeError):
            raise OptionError(
                f"rows={self.rows!r} was given, and a batch of type {type(batch).__name__} has nothing there. Let the "
                "data set hand out row ids, such as TensorDataset(torch.arange(len(x)), x, y) with rows=0."
            ) from None

    def _close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
