"""Which module's forward is running, and along which dimension its tensors count the rows.

A call of torch.nn.functional.dropout does not say where it stands. Modules that are *served* put a frame around their
forward, and the innermost frame names the site of the calls made inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dropkit.masks import address, compiled

TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One forward that is running.

    Attributes:
        module: whose.
        site: its qualified name.
        rows: the dimension that counts rows in this module's own calls; None: there is none, all is one row.
        rows_inside: the same for the modules it calls.
        packed: the packed sequence it was given, if any.
    """

    module: nn.Module
    site: str
    rows: int | None
    rows_inside: int | None
    packed: PackedSequence | None

    def named(self, what: str) -> str:
        """The site of a call; a colon cannot stand in a module's name, so it is nobody else's."""
        return f"{self.site}:{what}"


_current: ContextVar[Frame | None] = ContextVar("dropkit.conversion", default=None)


def current() -> Frame | None:
    """The innermost forward that is running, if any."""
    return _current.get()


def member_asked() -> bool:
    """Whether a committee member is asked for, so that masks act in evaluation too."""
    if torch.compiler.is_compiling():  # as for dropkit's layers
        return compiled.members_recorded()
    context = address.current()
    return context is not None and context.member is not None


def is_message_passing(module: nn.Module) -> bool:
    """A graph layer of PyTorch Geometric, known by its parent's name: nothing is imported for it."""
    return any(parent.__name__ == "MessagePassing" for parent in type(module).__mro__)


@contextmanager
def running(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Within it, `module` is the innermost forward that runs."""
    outer = _current.get()
    rows = outer.rows_inside if outer is not None else 0
    rows_inside = rows
    if isinstance(module, TRANSFORMERS) and inputs and isinstance(inputs[0], Tensor):
        rows = rows_inside = _transformer_rows(module, inputs[0])
    elif is_message_passing(module):
        rows = None  # what it drops stands on edges, and an edge is known by its place in the list
    if "dropkit_rows" in vars(module):  # said by the user
        rows = rows_inside = vars(module)["dropkit_rows"]
    packed = inputs[0] if inputs and isinstance(inputs[0], PackedSequence) else None
    site = vars(module).get("dropkit_site", "")
    token = _current.set(Frame(module, site, rows, rows_inside, packed))
    try:
        yield
    finally:
        _current.reset(token)


def _transformer_rows(module: nn.Module, x: Tensor) -> int | None:
    """torch's transformers count rows along dim 1 unless batch_first; a sequence alone is one row."""
    if x.ndim < 3:
        return None
    first = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return 0 if first is None or first.batch_first else 1
