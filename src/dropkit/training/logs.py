"""How a run went, written down while it goes: lines of JSON, or TensorBoard's events."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from dropkit.directory import check_output
from dropkit.errors import MissingPackageError, OptionError, OutputError
from dropkit.records import finite
from dropkit.training.records import Progress

Event = Progress | Mapping[str, Any]
SECONDS = "seconds"  # the only key whose value a clock gave


def follow(*callbacks: Callable[[Progress], None] | None) -> Callable[[Progress], None] | None:
    """One callback that tells several, in their order; None where there is none."""
    wanted = [callback for callback in callbacks if callback is not None]
    if not wanted:
        return None

    def tell(event: Progress) -> None:
        for callback in wanted:
            callback(event)

    return tell


class JsonLines:
    """A log with one JSON object a line, one line a look.

    Of a `Progress` the keys are its fields and `gap`; losses are in nats a row, NaN is null. Equal runs write equal
    bytes, unless `seconds` are asked for. A run that is resumed writes into the log that it left: from its first look
    on, the old lines are replaced, so that the log ends as that of a run that nobody stopped.

    Args:
        path: the file; its folder must be there. Each line is on the way to the disk before training goes on.
        resume: go on with a file that is there.
        force: replace a file that is there. Without one of both it is an error.
        seconds: add the seconds since the log was opened, which are the only thing that differs from run to run.

    Raises:
        OutputError: the file exists, or cannot be written.
        OptionError: with `resume`, the file is no log of JSON lines.

    Example:
        >>> import pathlib, tempfile
        >>> from dropkit.training import JsonLines
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.jsonl")
        >>> with JsonLines(path) as log:
        ...     for step in range(2):
        ...         log({"step": step, "train": 0.5 ** step})
        >>> print(path.read_text().rstrip())
        {"step": 0, "train": 1.0}
        {"step": 1, "train": 0.5}
    """

    def __init__(
        self, path: str | Path, *, resume: bool = False, force: bool = False, seconds: bool = False
    ) -> None:
        self.path = Path(path)
        self.seconds = seconds
        self._begun = time.monotonic()
        self._old: list[bytes] | None = None
        self._file: FileIO | None = None
        with self._said():
            if resume and self.path.exists():
                self._old = _whole_lines(self.path)
            else:
                check_output(self.path, force=force)

    def __call__(self, event: Event) -> None:
        """Write one line."""
        line = as_line(event)
        if self.seconds:
            line = {**line, SECONDS: round(time.monotonic() - self._begun, 3)}
        text = (json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with self._said():
            file = self._open(line) if self._file is None else self._file
            if file.write(text) < len(text):  # the rest did not fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self, line: dict[str, Any]) -> FileIO:
        """The file, ready for the first line: before it a run that fails leaves nothing behind."""
        self._file = self.path.open("wb" if self._old is None else "r+b", buffering=0)
        if self._old is not None:
            self._file.seek(self._same(self._old, line))
            self._file.truncate()
        return self._file

    @staticmethod
    def _same(old: Sequence[bytes], line: dict[str, Any]) -> int:
        """Where the log says what this run says again; with no such line, behind its last whole one."""
        place = 0
        for text in old:
            if _without_clock(json.loads(text)) == _without_clock(line):
                break
            place += len(text)
        return place

    def close(self) -> None:
        """Bring the last line to disk."""
        with self._said():
            if self._file is not None and not self._file.closed:
                with self._file:
                    os.fsync(self._file.fileno())

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutputError:
            if error is None:  # else the first trouble is the one to tell
                raise

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """What the disk refuses is said as an error of ours."""
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror}). Give another path for the log."
            ) from None


def as_line(event: Event) -> dict[str, Any]:
    """What is logged of an event, as plain values."""
    if isinstance(event, Progress):
        event = {**dataclasses.asdict(event), "gap": event.gap}
    line: dict[str, Any] = finite(dict(event))
    return line


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; half a line at its end, of a run that was killed while writing, is left out.

    Raises:
        OptionError: the file cannot be read, or a line is no JSON object.
    """
    try:
        return [json.loads(line) for line in _whole_lines(Path(path))]
    except OSError as error:
        raise OptionError(
            f"{path} cannot be read ({error.strerror}). Give a log that `--log` or JsonLines wrote."
        ) from None


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that end, each one an object."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            fits = isinstance(json.loads(line), dict)
        except (ValueError, RecursionError):
            fits = False
        if not fits:
            raise OptionError(
                f"line {number} of {path} is no JSON object. Give a log that `--log` or JsonLines wrote."
            )
    return lines


def _without_clock(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != SECONDS}


class TensorBoard:
    """A log that TensorBoard shows: losses, gap, rate and live networks by optimizer step.

    Networks of one shape that train together are one group of curves, such as "search 32x32".

    Args:
        folder: of the event files; made where it is not there.

    Raises:
        MissingPackageError: tensorboard is not installed.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingPackageError(
                "logs for TensorBoard need the package tensorboard: pip install 'dropkit[logs]'"
            ) from None
        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written ({error.strerror}). Give another folder for the log."
            ) from None

    def __call__(self, event: Event) -> None:
        """Add the numbers of an event; a mapping needs a key "step"."""
        line = as_line(event)
        group, step = "run", int(line.pop("step"))
        if isinstance(event, Progress):
            widths = "x".join(map(str, event.hidden)) or "linear"
            group = f"{event.stage} {widths}" if event.stage == "search" else event.stage
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{key}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Bring the last event to disk."""
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
