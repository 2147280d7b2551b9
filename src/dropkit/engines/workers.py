"""Training by several workers: what they are handed, what they do, and how the one who asked follows them.

Everything passes through a folder that all see, so that any engine will do that starts processes and lets them meet:

    job.json, x.npy, y.npy ...   what to train, written before the workers start
    told.jsonl                   what the first worker tells, a line each: looks, warnings, the error that ended it
    stop                         appears when they are asked to end after the next look

What comes out is not handed back here: it is the last checkpoint. The one who asked goes on from it, finds nothing left
to do, and has the fit; and where a worker died, the next ones go on from the same checkpoint.
"""

from __future__ import annotations

import inspect
import json
import mmap
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from dropkit import errors, training
from dropkit.errors import DropkitError, DropkitWarning, EngineError, OptionError
from dropkit.training import Checkpoints, Fit, ProcessTeam, Progress
from dropkit.training.records import Rows

JOB, TOLD, STOP = "job.json", "told.jsonl", "stop"
ARRAYS = ("rows", "validation_rows")
OPTIONS = (
    "likelihood",
    "classes",
    "rate",
    "seed",
    "validation_share",
    "max_epochs",
    "hidden",
    "weight_decay",
    "effort",
)
ENGINES = ("torchrun", "ray")
POLL = 0.1  # seconds between two looks at what the workers have told
RESTARTS = 3  # times that workers are started anew after one of them has died


class FitArguments(TypedDict, total=False):
    """Arguments of `dropkit.training.fit` that workers take over."""

    likelihood: str
    classes: int | None
    rate: float | str
    seed: int
    rows: Rows
    validation_rows: Rows
    validation_share: float
    max_epochs: int | None
    hidden: tuple[int, ...] | None
    weight_decay: float | None
    effort: str


class Engine(Protocol):
    """Workers that have been started, and train."""

    def running(self) -> bool:
        """Whether they are still at it."""

    def failure(self) -> str | None:
        """After the end: what went wrong, in words; None where all went well."""

    def kill(self) -> None:
        """End them at once."""


Start = Callable[[Path, int], Engine]


def fit(
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    *,
    workers: int,
    start: Start,
    folder: Path,
    checkpoints: Checkpoints,
    progress: Callable[[Progress], None] | None = None,
    **arguments: Unpack[FitArguments],
) -> Fit:
    """Train as `dropkit.training.fit` does, by several workers: the same fit, up to the order of sums.

    Each worker takes a slice of every batch, and the gradients are summed in the order of the workers. Masks are
    functions of row ids, so they are those of one worker, bit for bit. The number of workers is no part of the run: its
    checkpoints can be taken up by more of them, fewer, or one.

    Args:
        x, y, progress, arguments: as in `dropkit.training.fit`.
        workers: how many, at least 1.
        start: starts them; `dropkit.engines.torchrun.start` or `dropkit.engines.ray_train.start`.
        folder: empty, where the job is handed over; all workers must see it.
        checkpoints: likewise. It is what comes out, and what is gone on from when a worker dies.

    Returns:
        The fit. After Ctrl-C the best until then, with `interrupted` set: all workers end after the next look.

    Raises:
        OptionError: fewer than one worker.
        EngineError: the workers failed, more often than they are started anew.
        As `dropkit.training.fit`.
    """
    check_workers(workers)
    write_job(folder, x, y, checkpoints, arguments)
    interrupted = follow(start(folder, workers), folder, progress)
    done = checkpoints.including()
    done.ended = interrupted
    return training.fit(x, y, checkpoints=done, progress=progress, **arguments)  # type: ignore[arg-type]


def start_of(engine: str, workers: int) -> Start | None:
    """What starts the workers of an engine, by its name; None for one worker, who needs nobody to start it.

    Raises:
        OptionError: there is no such engine, or fewer than one worker.
        MissingPackageError: it is not installed.
    """
    check_workers(workers)
    if engine not in ENGINES:
        raise OptionError(f"engine={engine!r} was given; it is one of {', '.join(ENGINES)}.")
    if workers == 1:
        return None
    if engine == "torchrun":
        from dropkit.engines.torchrun import start as by_torchrun

        return by_torchrun
    from dropkit.engines.ray_train import check_installed
    from dropkit.engines.ray_train import start as by_ray

    check_installed()
    return by_ray


def check_workers(workers: int) -> None:
    """Refuse what is no number of workers."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise OptionError(f"workers={workers!r} was given; a whole number from 1 on is allowed.")


def write_job(
    folder: Path,
    x: NDArray[np.float32],
    y: NDArray[np.generic],
    checkpoints: Checkpoints,
    arguments: Mapping[str, Any],
) -> None:
    """Lay down what workers need; a matrix that is a file already stays where it is."""
    if isinstance(x, np.memmap) and isinstance(x.base, mmap.mmap):
        place = {"file": str(Path(x.filename).resolve()), "shape": x.shape, "offset": x.offset}
    else:
        place = {"file": "x.npy"}
        np.save(folder / "x.npy", x, allow_pickle=False)
    np.save(folder / "y.npy", y, allow_pickle=False)
    for name in ARRAYS:
        if arguments.get(name) is not None:
            np.save(folder / f"{name}.npy", np.asarray(arguments[name], np.int64), allow_pickle=False)
    job = {
        "x": place,
        "arrays": [name for name in ARRAYS if arguments.get(name) is not None],
        "options": {name: arguments[name] for name in OPTIONS if name in arguments},
        "checkpoints": {
            "folder": str(checkpoints.folder.resolve()), "of": checkpoints.of, "every": checkpoints.every,
        },
    }  # fmt: skip
    (folder / JOB).write_text(json.dumps(job, default=str), encoding="utf-8")


def work(folder: Path, team: ProcessTeam) -> None:
    """What each worker does: train its part of the job.

    A mistake in what was asked is told, by the first worker, and ends the work; nobody need try again. What goes wrong
    otherwise, such as a worker that is gone, is raised, and the engine starts the workers anew.

    Args:
        folder: of the job.
        team: the workers.
    """
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    told = Told(folder, team)
    place = job["x"]
    x: NDArray[np.float32] = (
        np.memmap(place["file"], np.float32, "c", place["offset"], tuple(place["shape"]))
        if "shape" in place
        else np.load(folder / place["file"], mmap_mode="c", allow_pickle=False)
    )
    y = np.load(folder / "y.npy", allow_pickle=False)
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in job["arrays"]}
    options = job["options"]
    if options.get("hidden") is not None:
        options["hidden"] = tuple(options["hidden"])
    with warnings.catch_warnings():
        warnings.showwarning = told.warning
        try:
            training.fit(
                x, y, **arrays, **options, team=team, progress=told.look,
                checkpoints=Checkpoints(**job["checkpoints"]),
            )  # fmt: skip
        except EngineError:
            raise
        except DropkitError as error:
            told.error(error)


class Told:
    """What the first worker tells the one who asked; all workers ask whether they are to stop."""

    def __init__(self, folder: Path, team: ProcessTeam) -> None:
        self.folder, self.team = folder, team

    def _tell(self, **line: Any) -> None:
        if not self.team.rank:
            with (self.folder / TOLD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def look(self, event: Progress) -> None:
        """After each look: all stop at the same one, if one of them sees that they should."""
        self._tell(progress=asdict(event))
        if self.team.any((self.folder / STOP).exists()):
            raise KeyboardInterrupt

    def warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        """A warning of dropkit's is for the user; those of others are for nobody here."""
        if issubclass(category, DropkitWarning):
            self._tell(warning=str(message))

    def error(self, error: DropkitError) -> None:
        """What ended the work."""
        self._tell(error={"kind": type(error).__name__, "text": str(error)})


def follow(engine: Engine, folder: Path, progress: Callable[[Progress], None] | None) -> bool:
    """Hand on what the workers tell until they are done. Ctrl-C asks them to stop, a second one ends them.

    Returns:
        Whether they were asked to stop.

    Raises:
        EngineError: they failed.
        DropkitError: of the class that a worker told.
    """
    asked, place = False, 0

    def stop() -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        (folder / STOP).touch()

    try:
        running = True
        while running:
            try:
                running = engine.running()  # before the last look, or its last words would be lost
                place, lines = _new_lines(folder / TOLD, place)
                for line in lines:
                    _hand_on(line, progress)
                if running:
                    time.sleep(POLL)
            except KeyboardInterrupt:
                stop()
        failure = engine.failure()
    except BaseException:
        engine.kill()
        raise
    if failure is not None:
        raise EngineError(
            f"the workers failed, after {RESTARTS} new starts: {failure} What was trained is kept in the checkpoints."
        )
    return asked


def _new_lines(path: Path, place: int) -> tuple[int, list[Any]]:
    """Whole lines beyond a place of the file, and the place behind them."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            new = file.read()
    except FileNotFoundError:
        return place, []
    end = new.rfind(b"\n") + 1
    return place + end, [json.loads(line) for line in new[:end].splitlines()]


def _hand_on(line: Mapping[str, Any], progress: Callable[[Progress], None] | None) -> None:
    """One line of what was told, as if it had happened here."""
    if "warning" in line:
        warnings.warn(line["warning"], DropkitWarning, stacklevel=4)
    elif "error" in line:
        kind = getattr(errors, line["error"]["kind"], None)
        if not (inspect.isclass(kind) and issubclass(kind, DropkitError)):
            kind = EngineError
        raise kind(line["error"]["text"])
    elif progress is not None:
        event = line["progress"]
        progress(Progress(**{**event, "hidden": tuple(event["hidden"])}))
