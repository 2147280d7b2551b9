"""Claims in processes of their own, the longest first; what is finished is kept, and only what changed runs again.

A process for each claim: it begins like any other, has one thread of torch, and a claim that brings down its process
takes nothing with it. What a result depends on (declaration, program, setting, versions, data) is in its digest.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dropkit.claims import data
from dropkit.claims.chapters import CLAIMS
from dropkit.claims.claim import Claim, Setting
from dropkit.claims.record import Outcome, Results, Unfinished, plain, read_outcome
from dropkit.claims.worker import NOT_RUN, missing_extras, versions
from dropkit.directory import write_file
from dropkit.errors import DropkitError, OptionError, OutputError

LEAST_SEEDS = 5
LOOK = 0.05  # seconds between two looks at the running processes
GRACE = 5.0  # seconds that a process has to end when it is asked to
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


@dataclass(frozen=True, slots=True)
class Step:
    """One event of a run, for who watches it.

    Attributes:
        name: of the claim.
        state: "kept": finished earlier; "begun", "finished", "failed", "not run".
        said: the verdict, or the line that says why there is none; "" at the beginning.
        seconds: since it began.
    """

    name: str
    state: Literal["kept", "begun", "finished", "failed", "not run"]
    said: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Running:
    claim: Claim
    process: subprocess.Popen[bytes]
    begun: float
    log: Path


def choose(names: Sequence[str], claims: Sequence[Claim] = CLAIMS) -> tuple[Claim, ...]:
    """The claims with these names, in the order of the article; all where none is given.

    Raises:
        OptionError: no claim has the name; it says the nearest, and all there are.
    """
    known = [claim.name for claim in claims]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise OptionError(f"{name!r} was given. {hint}The claims are {', '.join(known)}.")
    return tuple(claim for claim in claims if not names or claim.name in names)


def run_claims(
    claims: Sequence[Claim] = CLAIMS,
    setting: Setting = Setting(),  # noqa: B008 - it is frozen
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    force: bool = False,
    watch: Callable[[Step], None] = lambda step: None,
) -> Results:
    """Try claims, and write results, `claims.json` and `report.html` into a folder.

    Args:
        claims: which; a claim must be a value of the module of its experiment, where its process finds it.
        setting: seeds, and whether the long form is run.
        out: folder; what is finished there and fits is not run again. The report there also shows what earlier runs
            of the same setting left. None: nothing is written.
        jobs: processes at a time; None: one for each core.
        force: run all again.
        watch: is told what begins and ends.

    Returns:
        The outcomes of `claims`, and which have none and why.

    Raises:
        OptionError: too few seeds, or less than one job.
        OutputError: the folder cannot be written, or is somebody else's.
    """
    if setting.seeds < LEAST_SEEDS:
        raise OptionError(
            f"seeds={setting.seeds} was given; an interval needs at least {LEAST_SEEDS} repetitions."
        )
    if setting.seed < 0:
        raise OptionError(f"seed={setting.seed} was given; the first seed is 0 or more.")
    jobs = available_cores() if jobs is None else jobs
    if jobs < 1:
        raise OptionError(f"jobs={jobs} was given; at least one process runs at a time.")
    with _folder(out) as folder:
        data_digest = data.fingerprint()
        digests = {claim.name: digest(claim, setting, data_digest) for claim in claims}
        found: dict[str, Outcome | Unfinished] = {}
        for claim in claims:
            kept = None if force else kept_outcome(folder, claim.name, digests[claim.name])
            if kept is not None:
                found[claim.name] = kept
                watch(Step(claim.name, "kept", kept.verdict))
            elif package := missing_package(claim.extras):
                line = f"{claim.name} {missing_extras(package, claim.extras)}"
                found[claim.name] = Unfinished(claim.name, claim.title, "not run", line)
                watch(Step(claim.name, "not run", line))
        waiting = sorted((c for c in claims if c.name not in found), key=lambda c: c.seconds)
        found |= _run_all(waiting, setting, digests, folder, jobs, watch)
        results = _gather(setting, [found[claim.name] for claim in claims])
        if out is not None:
            others = [c for c in CLAIMS if c.name not in found]
            kept_too = [kept_outcome(folder, c.name, digest(c, setting, data_digest)) for c in others]
            everything = {one.name: one for one in kept_too if one is not None} | found
            order = [c.name for c in (*CLAIMS, *claims) if c.name in everything]
            write_report(_gather(setting, [everything[name] for name in dict.fromkeys(order)]), folder)
    return results


def write_report(results: Results, folder: str | Path) -> tuple[Path, Path]:
    """Write claims.json and report.html into a folder, each whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    from dropkit.claims.page import to_html

    paths = Path(folder) / "claims.json", Path(folder) / "report.html"
    for path, text in zip(paths, (results.to_json(), to_html(results)), strict=True):
        with write_file(path, force=True) as file:
            file.write(text)
    return paths


def digest(claim: Claim, setting: Setting, data_digest: str) -> str:
    """What a result depends on: declaration, the experiment's module, setting, versions, data."""
    module = inspect.getsourcefile(experiment_of(claim))
    program = hashlib.sha256(Path(module).read_bytes()).hexdigest() if module else ""
    declared = [claim.name, claim.title, claim.article, claim.prediction, claim.condition, plain(claim.rules)]
    parts = [declared, program, plain(setting), versions(), data_digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def experiment_of(claim: Claim) -> Callable[..., object]:
    """The function that is run, without the arguments that are bound to it."""
    function: Callable[..., object] = claim.experiment
    while isinstance(function, functools.partial):
        function = function.func
    return function


def kept_outcome(folder: Path, name: str, wanted: str) -> Outcome | None:
    """The finished result of a claim in a folder; None where it is not there, damaged, or of something else."""
    try:
        outcome = read_outcome((folder / "results" / f"{name}.json").read_bytes())
    except (DropkitError, OSError):
        return None
    return outcome if (outcome.name, outcome.digest) == (name, wanted) else None


def missing_package(extras: Sequence[str]) -> str | None:
    """A package that one of the optional extras asks for and that is not installed, or None."""
    try:
        asked = importlib.metadata.requires("dropkit") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder; the experiment itself will tell
        return None
    for line in asked:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if name is None or extra is None or extra[1] not in extras:
            continue
        if name[0] == "dropkit":
            inner = re.search(r"\[([\w,-]+)\]", line)
            if inner and (missing := missing_package(inner[1].split(","))):
                return missing
            continue
        try:
            importlib.metadata.distribution(name[0])
        except importlib.metadata.PackageNotFoundError:
            return name[0]
    return None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gather(setting: Setting, found: Sequence[Outcome | Unfinished]) -> Results:
    return Results(
        setting,
        tuple(one for one in found if isinstance(one, Outcome)),
        tuple(one for one in found if isinstance(one, Unfinished)),
    )


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The folder of the results, made if need be; one that vanishes where nothing is to be written."""
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "results").mkdir()
            yield Path(temporary)
        return
    folder = Path(out)
    ours = not folder.exists() or (
        folder.is_dir() and (not any(folder.iterdir()) or (folder / "results").is_dir())
    )
    if not ours:
        raise OutputError(
            f"{folder} was given; it is not an empty folder, nor one that dropkit claims made. Give another with --out."
        )
    try:
        (folder / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} was given; no folder can be made there ({error.strerror}). Give a folder of your own."
        ) from None
    yield folder


def _run_all(
    waiting: list[Claim],
    setting: Setting,
    digests: dict[str, str],
    folder: Path,
    jobs: int,
    watch: Callable[[Step], None],
) -> dict[str, Outcome | Unfinished]:
    """Run claims, the last of the list first; whatever ends this ends the processes."""
    found: dict[str, Outcome | Unfinished] = {}
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                claim = waiting.pop()
                running.append(_start(claim, setting, digests[claim.name], folder))
                watch(Step(claim.name, "begun"))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                found[one.claim.name] = ended = _ended(one, digests[one.claim.name], folder)
                seconds = time.monotonic() - one.begun
                if isinstance(ended, Outcome):
                    watch(Step(ended.name, "finished", ended.verdict, seconds))
                else:
                    watch(Step(ended.name, ended.status, ended.line, seconds))
            time.sleep(LOOK)
    finally:
        _stop(running)
    return found


def _start(claim: Claim, setting: Setting, wanted: str, folder: Path) -> _Running:
    """Begin a claim's process; it hears no Ctrl-C, and ends when its standard input is closed."""
    target, log = (folder / "results" / f"{claim.name}.{kind}" for kind in ("json", "log"))
    words = [
        experiment_of(claim).__module__,
        claim.name,
        json.dumps(plain(setting)),
        wanted,
        str(target.resolve()),
    ]
    path = os.pathsep.join(str(Path(part or ".").resolve()) for part in sys.path)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", "from dropkit.claims.worker import start; start()", *words],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
            start_new_session=True,
        )
    return _Running(claim, process, time.monotonic(), log)


def _ended(one: _Running, wanted: str, folder: Path) -> Outcome | Unfinished:
    """What a process left; its log stays where it failed."""
    claim, status = one.claim, one.process.returncode
    if one.process.stdin is not None:
        one.process.stdin.close()
    outcome = kept_outcome(folder, claim.name, wanted) if status == 0 else None
    if outcome is not None:
        one.log.unlink()
        return outcome
    lines = one.log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status == NOT_RUN:
        return Unfinished(claim.name, claim.title, "not run", said)
    if status < 0:
        said = f"its process was ended by signal {-status}" + (
            ", as for want of memory" if status == -9 else ""
        )
    elif status == 0:
        said = "its result cannot be read back"
    return Unfinished(claim.name, claim.title, "failed", said or f"its process ended with status {status}")


def _stop(running: Sequence[_Running]) -> None:
    """End the processes that still run, and wait for them."""
    for one in running:
        one.process.terminate()
    for one in running:
        try:
            one.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        if one.process.stdin is not None:
            one.process.stdin.close()
        one.log.unlink(missing_ok=True)
