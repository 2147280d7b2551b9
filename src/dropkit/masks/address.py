"""Where a mask lives: seed, site, step, sample, member. The same address gives the same mask again.

Inside `masks(...)` the address comes from the context; outside, each call draws 64 bits from torch's
default generator, so that `torch.manual_seed` and `torch.random.fork_rng` keep their meaning.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar, Token
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from dropkit.errors import AddressError
from dropkit.masks.philox import WORD, philox_rounds

SCHEME = 1  # a change of the way from address to bits is a new number; the old one stays
# Purpose: which use of a site's bits. Bernoulli masks are NOISE; the laws of `noise.py` have keys of their own.
NOISE, UNIFORM, GAUSSIAN, EXACT = 1, 2, 3, 4

SEEDS, STEPS, SAMPLES, MEMBERS = 1 << 64, 1 << 32, 1 << 40, 1 << 24


class Draw(NamedTuple):  # of which one is made in every call, in a third of a dataclass's time
    """One draw of a site, ready for a kernel.

    Attributes:
        key: the site's 64 bits, as a signed number; a () int64 tensor where a transform or a mode of torch is at work,
            batched where torch.func.vmap draws different masks.
        member: a number, or a () int64 tensor, which torch.func.vmap may have batched.
        samples: (B,) int64 row ids, or None: row i is `row_offset + i`.
        step: the optimizer step.
        row_offset: id of the first row where samples is None.
        batch_shared: one mask for all rows (a committee member), sample 0.
    """

    key: int | Tensor
    member: int | Tensor
    samples: Tensor | None
    step: int
    row_offset: int
    batch_shared: bool

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Key and member as () int64 tensors."""
        return as_int64(self.key), as_int64(self.member)


def as_int64(value: int | Tensor) -> Tensor:
    """A signed number as a () tensor on the CPU; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64, device="cpu")


def site_hash(name: str, call: int = 0) -> int:
    """64 bits of a site's name and of which call of it within the pass this is."""
    digest = hashlib.blake2b(f"{name}\0{call}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@lru_cache(maxsize=4096)
def site_key(seed: int, site: int, purpose: int = NOISE) -> int:
    """The site's own Philox key: the first 64 bits of Philox(seed, (site hash, scheme, purpose))."""
    low, high, _, _ = philox_rounds(site & WORD, site >> 32, SCHEME, purpose, seed & WORD, seed >> 32)
    return low | high << 32


def signed(value: int) -> int:
    """The same 64 bits as a signed number, which is what an int64 tensor holds."""
    return value - SEEDS if value >= SEEDS >> 1 else value


def _check_field(value: int, limit: int, name: str, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        bits = limit.bit_length() - 1
        raise AddressError(f"{name}={value!r} was given; {what} is a whole number from 0 to 2**{bits} - 1.")
    return value


def _check_samples(samples: Tensor) -> Tensor:
    if not isinstance(samples, Tensor):
        samples = torch.as_tensor(samples)
    if samples.dtype.is_floating_point or samples.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise AddressError(f"samples of dtype {samples.dtype} were given; row ids are whole numbers (int64).")
    if samples.ndim != 1:
        raise AddressError(
            f"samples of shape {tuple(samples.shape)} were given; one id for each row, (B,), is needed."
        )
    if samples.numel() and not (0 <= int(samples.min()) and int(samples.max()) < SAMPLES):
        raise AddressError(
            f"samples from {int(samples.min())} to {int(samples.max())} were given; a row id lies in [0, 2**40)."
        )
    return samples.to(torch.int64)


class masks:  # a context manager, named like contextlib's in lower case
    """Within this context every mask is a pure function of its address.

    One context is one pass through a model: a layer that is called twice inside it is told apart by a call
    number. Split a pass into chunks by opening the context once for each chunk, with `row_offset` or `samples`.

    Args:
        seed: the run, 64 bits.
        step: the optimizer step, 32 bits.
        member: None: each row has a mask of its own (training noise). A number: thinned network `member`,
            one mask for all rows, so that the member is one function. A 0-d int64 tensor may be given, also one
            that `torch.func.vmap` has batched: a whole committee in one pass.
        row_offset: id of the first row, for a shard or a chunk of a larger batch.
        samples: (B,) row ids in place of positions; with a member, each row then has its own mask again.

    Raises:
        AddressError: a field is outside its range; it is never wrapped.

    Example:
        >>> import torch, dropkit as dk
        >>> x = torch.ones(4, 6)
        >>> with dk.masks(seed=0, step=12):
        ...     whole = dk.functional.dropout(x, 0.5)
        >>> with dk.masks(seed=0, step=12, row_offset=2):
        ...     lower_half = dk.functional.dropout(x[2:], 0.5)
        >>> torch.equal(whole[2:], lower_half)
        True
    """

    def __init__(
        self,
        seed: int = 0,
        step: int = 0,
        member: int | Tensor | None = None,
        row_offset: int = 0,
        samples: Tensor | None = None,
    ) -> None:
        self.seed = _check_field(seed, SEEDS, "seed", "a seed")
        self.step = _check_field(step, STEPS, "step", "a step")
        self.row_offset = _check_field(row_offset, SAMPLES, "row_offset", "the id of the first row")
        if member is not None and not isinstance(member, Tensor):
            _check_field(member, MEMBERS, "member", "a member")
        self.member = member
        self.samples = None if samples is None else _check_samples(samples)
        self._names: dict[int, str] = {}  # id of a layer without a name -> the name it got in this pass
        self._owners: dict[str, object] = {}  # site name -> the layer that draws there
        self._calls: dict[str, int] = {}  # site name -> calls so far
        self._hashes: dict[int, tuple[str, int]] = {}  # site hash -> who has it
        self._tokens: list[Token[masks | None]] = []

    def __enter__(self) -> masks:
        self._names.clear()
        self._owners.clear()
        self._calls.clear()
        self._hashes.clear()
        self._tokens.append(_current.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._tokens.pop())

    @property
    def drawn(self) -> tuple[str, ...]:
        """Names of the sites that drew in this pass, in order."""
        return tuple(self._calls)

    def _site(self, owner: object | None, name: str | None) -> int:
        """The hash of this call's site, registered so that no two draws share an address unseen."""
        if in_backward():
            return self._recomputed_site(owner, name)
        if name is None:  # a place without a name is known by its order in the pass
            if owner is None:
                name = f"#{len(self._owners)}"
                owner = name
            else:
                name = self._names.setdefault(id(owner), f"#{len(self._owners)}")
        elif owner is None and name in self._owners:
            raise AddressError(
                f"site {name!r} was drawn twice within one masks(...) context, which would give the same mask twice. "
                "Give each call a site of its own, or open a context for each pass."
            )
        if self._owners.setdefault(name, owner) is not owner:
            raise AddressError(
                f"site {name!r} belongs to two layers of this pass, which would get the same mask. "
                "Name the sites of the whole model at once: dropkit.nn.name_sites(model)."
            )
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        site = site_hash(name, call)
        if self._hashes.setdefault(site, (name, call)) != (name, call):
            raise AddressError(
                f"sites {name!r} and {self._hashes[site][0]!r} meet in one hash; rename one of the layers."
            )
        return site

    def _recomputed_site(self, owner: object | None, name: str | None) -> int:
        """The site of a call that activation checkpointing makes again: the one of its first time."""
        if name is None and owner is not None:
            name = self._names.get(id(owner))
        if name is None or self._calls.get(name) != 1:
            raise AddressError(
                f"site {name or 'without a name'!r} is computed again in the backward pass, and which of its calls "
                "this is cannot be told. Name the sites (dropkit.nn.name_sites(model), or site=), and call each once "
                "in a pass."
            )
        return site_hash(name, 0)


_current: ContextVar[masks | None] = ContextVar("dropkit.masks", default=None)


def current() -> masks | None:
    """The context that is open, if any."""
    return _current.get()


# Layers, and names of calls of functions, whose last mask came from a context: computed again outside of it, they would
# get another one.
_addressed_layers: WeakSet[Any] = WeakSet()
_addressed_calls: set[str] = set()


def in_backward() -> bool:
    """Whether autograd is running a backward pass here, as when checkpointing computes a forward pass again."""
    return torch._C._current_graph_task_id() != -1


def draw(owner: object | None = None, name: str | None = None, purpose: int = NOISE) -> Draw:
    """The address of the next draw: from the context, or from torch's default generator outside of one.

    Args:
        owner: the layer that draws, or None for a call of a function.
        name: its qualified name in the model, or None: known by its order in the pass.
        purpose: which use of the site's bits; outside of a context each draw has bits of its own anyway.

    Raises:
        AddressError: the draw cannot be told from another one of this pass.
    """
    context = current()
    if context is None:
        is_layer = isinstance(owner, torch.nn.Module)
        if owner in _addressed_layers if is_layer else (name or "") in _addressed_calls:
            if in_backward():
                raise AddressError(
                    f"site {name or 'without a name'!r} is computed again in the backward pass after its masks(...) "
                    "context has ended, which would give it another mask. Call backward() inside the context."
                )
            if is_layer:
                _addressed_layers.discard(owner)
            else:
                _addressed_calls.discard(name or "")
        # Drawn by torch, so that manual_seed, fork_rng and vmap(randomness=...) mean what they always mean.
        drawn = torch.randint(-(1 << 63), (1 << 63) - 1, (), device="cpu")
        plain = type(drawn) is Tensor and not torch._C._are_functorch_transforms_active()
        return Draw(int(drawn) if plain else drawn, 0, None, 0, 0, batch_shared=False)
    key = signed(site_key(context.seed, context._site(owner, name), purpose))
    if isinstance(owner, torch.nn.Module):
        _addressed_layers.add(owner)
    else:
        _addressed_calls.add(name or "")
    member = 0 if context.member is None else context.member
    batch_shared = context.member is not None and context.samples is None
    return Draw(key, member, context.samples, context.step, context.row_offset, batch_shared)
