"""Checkpoints: the state of a run on disk, so that a run that was killed ends bit for bit where it would have ended.

A checkpoint is a directory of its own, written beside its place, brought to disk and moved there in one step, with
the digest of every byte in its manifest. The last two stay. What is read is checked first; a damaged one is passed
over for the one before.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from dropkit.directory import MANIFEST, Kind, read_directory, write_directory
from dropkit.errors import CheckpointError, DropkitWarning, ModelDirectoryError, OutputError
from dropkit.training.serialization import STATE, TENSORS, from_files, to_files

CHECKPOINT = Kind("checkpoint", 1, "Checkpoints.save", "The one before is used where there is one.")
FILES = (MANIFEST, STATE, TENSORS)
KEPT = 2  # the last good one, and the one before
_NUMBER = re.compile(r"\d{8}", re.ASCII)
_HALF = re.compile(r"\.\d{8}\..*\.tmp", re.ASCII)  # what a killed writer left
_STAGE = re.compile(r"[a-z][a-z0-9_-]*", re.ASCII)


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be had and given back: modules, optimizers, schedules, scalers, loaders."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state as plain data with tensors."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state up."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Masks need no state: they are functions of seed, step and row id. Where a loop draws from torch's generator as
    well (torch's own dropout, a shuffling loader), hand it over as one more part: `generator=torch.default_generator`.

    Args:
        folder: where they lie; it is made when the first one is saved.
        of: what makes the run what it is: options, sizes, a digest of the data. A checkpoint of a run that differs in
            one of them is refused, by the name of it. The releases of dropkit and torch are added.
        every: steps between two checkpoints, for `due`; None leaves the choice to dropkit's own loop.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Checkpoints(f"{folder}/run", of={"seed": 0}).save(10, model=model).name
        ...     Checkpoints(f"{folder}/run", of={"seed": 0}).restore(model=torch.nn.Linear(2, 1))
        '00000001'
        10
    """

    def __init__(
        self, folder: str | Path, *, of: Mapping[str, Any] | None = None, every: int | None = None
    ) -> None:
        release = importlib.import_module(
            "dropkit"
        ).__version__  # named so, this floor imports nothing from above
        if every is not None and every < 1:
            raise CheckpointError(f"every={every!r} was given; at least 1 step lies between two checkpoints.")
        self.folder, self.every = Path(folder), every
        self.of = {"dropkit": release, "torch": torch.__version__, **(of or {})}
        self.ended = False  # stopped elsewhere: whoever takes the run up stops before a step is done
        self._read: set[str] | None = None  # names that were found in order; None: nobody has looked

    def stage(self, name: str) -> Checkpoints:
        """The checkpoints of a part of the run, such as a search before the fit, in a folder within."""
        if not _STAGE.fullmatch(name):
            raise CheckpointError(f"{name!r} was given; a stage is named by small letters, digits, - and _.")
        return self._with(self.folder / name, {})

    def including(self, **of: Any) -> Checkpoints:
        """The same checkpoints, of a run of which more is known."""
        return self._with(self.folder, of)

    def _with(self, folder: Path, of: Mapping[str, Any]) -> Checkpoints:
        other = Checkpoints(folder, of=self.of, every=self.every)
        other.of = {**self.of, **of}
        other.ended = self.ended
        return other

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after so many steps."""
        return self.every is not None and step % self.every == 0

    def there(self) -> bool:
        """Whether there is a checkpoint to go on from, in this folder or in that of a stage."""
        return bool(self._numbers()) or any(self._with(s, {})._numbers() for s in self._stages())

    def save(self, step: int, /, **parts: Stateful | torch.Generator) -> Path:
        """Write a checkpoint; the last two stay.

        Args:
            step: how many steps are done.
            parts: by name, whatever the run goes on with.

        Returns:
            The directory of the checkpoint.

        Raises:
            CheckpointError: a part has no state, or one that is no plain data; or an earlier run's checkpoints lie
                here that nobody has taken up or cleared.
            OutputError: the disk is full or refuses. The checkpoints before are as they were.
        """
        numbers = self._numbers()
        if numbers and self._read is None:
            raise CheckpointError(
                f"{self.folder} holds checkpoints of an earlier run. Take them up with restore(), or clear() them."
            )
        state = {name: _state(part, name) for name, part in parts.items()}
        files = to_files({"of": _texts(self.of), "step": step, "parts": state})
        taken = [int(name) for name in _names(self.folder) if _NUMBER.fullmatch(name)]
        path = self.folder / f"{max(taken, default=0) + 1:08d}"
        made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_directory(path, files, kind=CHECKPOINT)
        except OSError as error:
            for place in made:
                with contextlib.suppress(OSError):
                    place.rmdir()
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"{self.folder} could not be made: {error.strerror or error}. Give a folder you may write to."
            ) from None
        self._read = {*(self._read or ()), path.name}
        # Damaged ones do not count among those that stay.
        stay = sorted(self._read & {*numbers, path.name})[-KEPT:]
        for old in (*self._halves(), *(n for n in numbers if n not in stay)):
            _remove(self.folder / old)
        return path

    def restore(self, **parts: Stateful | torch.Generator) -> int:
        """Give every part the state it had at the last good checkpoint.

        Args:
            parts: those of `save`, under their names.

        Returns:
            How many steps are done; 0 where there is no checkpoint, and the parts are as they were.

        Raises:
            CheckpointError: the checkpoints are of another run, or of other parts; or all of them are damaged.

        Warns:
            DropkitWarning: the last checkpoint is damaged, and the one before was taken.
        """
        found = self._last_good()
        if found is None:
            self._read = set()
            return 0
        path, content = found
        try:
            of, step, states = content["of"], content["step"], content["parts"]
        except (TypeError, KeyError):
            raise CheckpointError(f"{path} is a checkpoint without parts. Delete {self.folder}.") from None
        self._compare(of)
        if set(states) != set(parts):
            raise CheckpointError(
                f"{path} holds {_listed(states)}; {_listed(parts)} was asked for. Name the parts as they were saved."
            )
        for name, part in parts.items():
            try:
                _take_up(part, states[name])
            except CheckpointError:
                raise
            except Exception as error:  # torch says by many classes that a state does not fit
                said = " ".join(str(error).split())
                raise CheckpointError(
                    f"{path} holds another {name} than the one given: {said[:300]} Build the run as it was, or delete "
                    f"{self.folder} to start anew."
                ) from error
        self._read = {path.name}
        return int(step)

    def clear(self) -> None:
        """Remove the checkpoints of this run and of its stages, and the folder where nothing else lies in it."""
        for stage in self._stages():
            self._with(stage, {}).clear()
        for name in (*self._halves(), *self._numbers()):
            _remove(self.folder / name)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        self._read = set()

    def _last_good(self) -> tuple[Path, Any] | None:
        numbers, damage = self._numbers()[::-1], ""
        for name in numbers:
            path = self.folder / name
            try:
                content = from_files(read_directory(path, CHECKPOINT).files)
            except ModelDirectoryError as error:  # names the file
                damage = damage or str(error).removesuffix(f" {CHECKPOINT.again}")  # what follows says which
                continue
            except ValueError as error:
                damage = damage or f"{path} holds no state: {error}."
                continue
            if damage:
                message = f"The last checkpoint cannot be used: {damage} The run goes on from {path}."
                warnings.warn(message, DropkitWarning, stacklevel=3)
            return path, content
        if numbers:
            raise CheckpointError(f"No checkpoint is in order: {damage} Delete {self.folder} to start anew.")
        return None

    def _compare(self, saved: Mapping[str, str]) -> None:
        """Refuse the checkpoint of another run, and say by what it differs."""
        given = _texts(self.of)
        for key in dict.fromkeys((*given, *saved)):
            was, now = saved.get(key), given.get(key)
            if was == now:
                continue
            if key in ("data", "networks"):  # digests, which tell nobody anything
                what = f"a run on other {key}. Give the {key} as they were"
            else:
                what = f"a run with {key}={was}, and {key}={now} was given. Give what was given then"
            raise CheckpointError(
                f"{self.folder} holds checkpoints of {what}, or delete that folder to start anew."
            )

    def _numbers(self) -> list[str]:
        """Names of the checkpoints, the oldest first."""
        names = [name for name in _names(self.folder) if _NUMBER.fullmatch(name)]
        return sorted(n for n in names if any((self.folder / n / file).is_file() for file in FILES))

    def _halves(self) -> list[str]:
        return [name for name in _names(self.folder) if _HALF.fullmatch(name)]

    def _stages(self) -> list[Path]:
        names = [name for name in _names(self.folder) if _STAGE.fullmatch(name)]
        return [self.folder / name for name in names if not (self.folder / name).is_symlink()]


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OutputError(
            f"{folder} could not be looked at: {error.strerror or error}. Give a folder you may read and write."
        ) from None


def _remove(path: Path) -> None:
    """Remove a checkpoint, first of all its name, so that nobody ever meets half of one.

    What dropkit did not write stays where it is.
    """
    with contextlib.suppress(OSError):
        if not _HALF.fullmatch(path.name) and {entry.name for entry in path.iterdir()} <= set(FILES):
            path = path.rename(path.with_name(f".{path.name}.old.tmp"))
        for name in FILES:
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _texts(of: Mapping[str, Any]) -> dict[str, str]:
    """What a run is, as text that can be compared and shown."""
    return {
        key: json.dumps(value, sort_keys=True, ensure_ascii=True, default=str) for key, value in of.items()
    }


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _state(part: Stateful | torch.Generator, name: str) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if not isinstance(part, Stateful):
        raise CheckpointError(
            f"{name} is a {type(part).__qualname__} without state_dict and load_state_dict; a checkpoint is made of "
            "modules, optimizers, schedules and others that have them, and of torch.Generators."
        )
    return part.state_dict()


def _take_up(part: Stateful | torch.Generator, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)
