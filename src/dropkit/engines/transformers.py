"""transformers' Trainer: the masks of a training run as functions of their address, by one callback."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dropkit.errors import MissingPackageError, OptionError
from dropkit.masks import masks

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingPackageError(
        "dropkit.engines.transformers needs the package transformers: pip install transformers"
    ) from None


class Masks(TrainerCallback):
    """Open `dropkit.masks(seed, step, samples)` around every forward pass in training.

    The step is the trainer's `global_step`, which stands still while gradients accumulate. The row ids are a column of
    the data set; they are taken out of a batch before the model sees it, in training and in evaluation. A callback is
    not shown the batch, so this one hooks itself into the model; `remove` takes it out again.

    Args:
        seed: of all masks, 64 bits.
        rows: the column, (B,) whole numbers in a batch. Say `remove_unused_columns=False`, or the trainer drops it.

    Raises:
        OptionError: when training begins, a batch without that column.
    """

    def __init__(self, seed: int = 0, rows: str = "row") -> None:
        self.seed = seed
        self.rows = rows
        self.step = 0
        self._open: masks | None = None
        self._handles: tuple[RemovableHandle, ...] = ()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Hook into the model of the trainer."""
        self.remove()
        if model is not None:
            self._handles = (
                model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
                model.register_forward_hook(self._after, always_call=True),
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn the step."""
        self.step = state.global_step

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        rows = kwargs.pop(self.rows, None)
        if model.training:
            if rows is None:
                raise OptionError(
                    f"rows={self.rows!r} was given, and a batch has the columns {sorted(kwargs)}. Give the data set a "
                    "column of row ids, and the trainer remove_unused_columns=False."
                )
            context = masks(seed=self.seed, step=self.step, samples=rows)
            context.__enter__()
            self._open = context
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
