"""The whole way of the data: a table to a model directory, and a table through a model to predictions."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dropkit import training
from dropkit.committee import ClassificationPrediction, Committee, ConformalInterval
from dropkit.committee.calibrated import LEVEL, CalibratedCommittee
from dropkit.directory import check_directory, check_output, write_directory, write_file
from dropkit.engines import workers as crew
from dropkit.errors import DivergedError, OptionError, OutputError, TableError, check_probability
from dropkit.evaluation import (
    ClassificationEvaluation,
    RegressionEvaluation,
    Split,
    compare,
    evaluate_classification,
    evaluate_regression,
    spread_by_members,
)
from dropkit.evaluation.comparison import MOST_BOOSTED_CLASSES
from dropkit.masks.address import SEEDS
from dropkit.report import FitReport, Timing, to_html, to_text
from dropkit.report.summary import data_summary, learning_curves, model_summary, search_summary
from dropkit.tables.columns import describe_columns
from dropkit.tables.encoder import Encoder
from dropkit.tables.model import LEAST_MEMBERS, MOST_MEMBERS, Seen, TableModel, answer_columns
from dropkit.tables.reading import from_frame, open_table
from dropkit.tables.source import CHUNK_ROWS, TableSource
from dropkit.tables.stream import EncodedTable, encode_stream
from dropkit.tables.target import Target, describe_target
from dropkit.training import Fit, Progress, divide_rows
from dropkit.training.fit import EFFORTS, Effort
from dropkit.training.network import Likelihood

Header = bool | Literal["auto"]
Train = Callable[..., Fit]  # as `training.fit`

LEAST_ROWS = 20  # fewer cannot be divided into rows to learn from, to stop and calibrate by, and to test on
CALIBRATION_ROWS = 9  # the least from which a conformal 90 % interval can be had
LEARNING_ROWS = CALIBRATION_ROWS + 5  # the least beside the test rows, so that some are left to learn from
SPREADS = (1e-12, 1e12)  # standard deviations of a target whose squares float32 holds with room to spare
MOST_OFFSET = (
    1e5  # standard deviations from 0 to a target's mean, beyond which float32 tells too few values apart
)
SAMPLE_ROWS = 100_000  # columns are described, and their encoding learned, from so many rows at most
MOST_TEST_ROWS = 20_000
IN_MEMORY = 1 << 28  # bytes of encoded table; a larger one is a file that is mapped
MOST_CHUNK = 1 << 30  # rows; as good as all
SHOWN_CELLS = 4  # columns shown of the least certain rows
DEMO_TARGET = "progression"


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How to fit; what is not said is chosen from the data.

    Attributes:
        task: "auto", "regression" or "classification".
        rate: chance to drop a hidden unit, or "auto": rates compete.
        members: networks in the committee.
        seed: of splits, weights and masks, 64 bits.
        max_epochs: passes over the training rows at most.
        test_share: rows held out for the report, at most 20 000 of them.
        effort: how many candidates and epochs.
        kinds: {column: "number", "category", "boolean" or "date"} where the caller knows better.
        ignore: columns to leave out.
        header: whether the first row names the columns.
    """

    task: str = "auto"
    rate: float | Literal["auto"] = "auto"
    members: int = 64
    seed: int = 0
    max_epochs: int | None = None
    test_share: float = 0.2
    effort: Effort = "normal"
    kinds: Mapping[str, str] | None = None
    ignore: Sequence[str] = ()
    header: Header = "auto"


@dataclass(frozen=True, slots=True)
class PredictSummary:
    """What was predicted.

    Attributes:
        rows: how many.
        columns: names of the columns that were added.
        notes: what the table held that the model had not met, in sentences.
    """

    rows: int
    columns: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """The summary as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def demo_table() -> TableSource:
    """The data set that comes along: 442 diabetes patients, and how far the disease had come a year later.

    Source: Efron, Hastie, Johnstone and Tibshirani 2004, "Least Angle Regression"; as scikit-learn ships it.
    """
    from sklearn.datasets import load_diabetes

    frame = load_diabetes(as_frame=True, scaled=False).frame.rename(
        columns={
            "target": DEMO_TARGET, "bp": "blood_pressure", "bmi": "body_mass_index", "s1": "total_cholesterol",
            "s2": "low_density_lipoproteins", "s3": "high_density_lipoproteins", "s4": "cholesterol_ratio",
            "s5": "log_triglycerides", "s6": "blood_sugar",
        }
    )  # fmt: skip
    return from_frame(frame, "diabetes")


def fit_table(
    table: str | Path | TableSource,
    target: str,
    out: str | Path,
    options: FitOptions | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    checkpoint_every: int | None = None,
    workers: int = 1,
    engine: str = "torchrun",
    command: str = "",
    say: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[Progress], None] | None = None,
) -> FitReport:
    """Learn one column of a table from the others, and write model, record and report.

    Rows are divided once, by the seed: held-out test rows that nothing looks at before the report; validation rows
    that stop the training, choose the rate and calibrate; the rest to learn from.

    While it trains, checkpoints lie beside the directory, in `OUT.partial`. They go when the model is written, and stay
    where the run was stopped or killed.

    Args:
        table: a CSV or Parquet file, or an open table.
        target: the column to predict.
        out: the model directory to write.
        options: how to fit.
        force: replace a model that is there, and begin anew where checkpoints are there.
        resume: go on from those checkpoints; a model that an interrupted run left is replaced. What comes out is what
            a run that nobody stopped would have written, byte for byte.
        checkpoint_every: optimizer steps between two checkpoints; by default some half a minute of work.
        workers: processes that train together, each on a slice of every batch; what comes out is the same, up to the
            order in which gradients are summed. They are no part of the options: a run may be resumed with others.
        engine: who starts them: "torchrun", on this machine, or "ray", on a Ray cluster, all of whose machines must
            see the folder of `out`, the table, and the folder for temporary files (TMPDIR).
        command: the line to repeat this fit, for the report.
        say: told in sentences what was decided.
        progress: told how the training goes.

    Returns:
        The record of the fit, as it stands in the directory.

    Raises:
        TableError: the table or its target cannot be learned from.
        OptionError, ProbabilityError: an option outside what is allowed.
        OutputError: the directory cannot be written, or a fit that was cut short left its checkpoints beside it.
        CheckpointError: those checkpoints are of other options or another table, or damaged.
        DivergedError: the loss was no finite number any more before anything was learned.
        EngineError, MissingPackageError: the workers failed again and again, or their engine is not installed.
    """
    options = options or FitOptions()
    _check(options, target)
    start = crew.start_of(engine, workers)
    run = _Run(out, options, target, force, resume, checkpoint_every)
    if resume:
        say(run.going_on)
    begun = time.perf_counter()
    source = table if isinstance(table, TableSource) else open_table(table, header=options.header)
    described = describe_target(source.cells(source.column(target)), options.task, name=target)
    with _scratch() as scratch:
        prepared = _prepare(source, described, options, scratch)
        for note in (*source.notes, described.reason, *prepared.notes):
            say(note)
        if start is None:
            train: Train = training.fit
        else:
            (scratch / "job").mkdir()
            train = partial(crew.fit, workers=workers, start=start, folder=scratch / "job")
        return _learn(source, prepared, options, run, train, command, begun, say, progress)


class _Run:
    """Where a fit writes: the model directory, and its checkpoints beside it."""

    def __init__(
        self, out: str | Path, options: FitOptions, target: str, force: bool, resume: bool, every: int | None
    ) -> None:
        real = Path(os.path.realpath(out))
        self.out, self.resume = out, resume
        self.checkpoints = training.Checkpoints(
            real.with_name(f"{real.name}.partial"), of={"target": target, **asdict(options)}, every=every
        )
        self.there = self.checkpoints.there()
        # An interrupted run has left the best model until then; going on from its checkpoints, it is replaced.
        self.force = force or (resume and self.there)
        if self.there and not force and not resume:
            raise OutputError(
                f"{self.checkpoints.folder} holds the checkpoints of a fit that was cut short. Go on from them with "
                "--resume, or begin anew with --force."
            )
        check_directory(out, force=self.force)

    @property
    def going_on(self) -> str:
        """In words, where a resumed run begins."""
        if self.there:
            return f"The run goes on from the checkpoints in {self.checkpoints.folder}."
        return f"There are no checkpoints in {self.checkpoints.folder}; the run begins at the beginning."


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A table ready to learn from."""

    target: Target
    encoder: Encoder
    encoded: EncodedTable
    y: np.ndarray[Any, Any]
    test_rows: np.ndarray[Any, Any]
    sample: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def likelihood(self) -> Likelihood:
        return "gaussian" if self.target.task == "regression" else "categorical"


def _check(options: FitOptions, target: str) -> None:
    """Refuse, before the table is read, what cannot be meant."""
    if options.rate != "auto" and check_probability(options.rate, "rate") == 1:
        raise OptionError("rate=1 was given; a network without any unit cannot learn. Give less than 1.")
    if options.effort not in EFFORTS:
        raise OptionError(f"effort={options.effort!r} was given; it is one of {', '.join(EFFORTS)}.")
    if not 0 < options.test_share < 1:
        raise OptionError(f"test_share={options.test_share!r} was given; it lies strictly between 0 and 1.")
    if not LEAST_MEMBERS <= options.members <= MOST_MEMBERS:
        raise OptionError(
            f"members={options.members!r} was given; a committee has {LEAST_MEMBERS} to {MOST_MEMBERS}."
        )
    if not 0 <= options.seed < SEEDS:
        raise OptionError(
            f"seed={options.seed!r} was given; a seed is a whole number of 64 bits, not negative."
        )
    if options.max_epochs is not None and options.max_epochs < 1:
        raise OptionError(f"max_epochs={options.max_epochs!r} was given; at least 1 is needed.")
    if target in options.ignore:
        raise OptionError(f"{target!r} was given both as the target and to be left out. Name one of them.")
    if target in (options.kinds or {}):
        raise OptionError(
            f"a kind was given for the target {target!r}; kinds are for the other columns. Say its task instead."
        )


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what does not fit into memory, gone afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="dropkit-")
    except OSError as error:
        raise OutputError(
            f"no temporary folder could be made: {error.strerror or error}. Name another place with TMPDIR."
        ) from None
    with folder as path:
        yield Path(path)


def _prepare(source: TableSource, target: Target, options: FitOptions, scratch: Path) -> _Prepared:
    """Divide the rows, learn the encoding from those that are not held out, and encode all."""
    if target.rows < LEAST_ROWS:
        raise TableError(
            f"{source.name} has {target.rows} rows with a target; at least {LEAST_ROWS} are needed to learn, to "
            "calibrate and to test. Collect more rows."
        )
    sample = source.sample(SAMPLE_ROWS, options.seed)
    columns = describe_columns(sample.drop(columns=[target.name]), kinds=options.kinds, ignore=options.ignore)
    y = target.encode(source.cells(target.name))
    if target.task == "regression":
        _check_scale(y, target.name)
    likelihood: Likelihood = "gaussian" if target.task == "regression" else "categorical"
    test_rows = divide_rows(
        y, options.test_share, likelihood=likelihood, seed=options.seed, most=MOST_TEST_ROWS
    )
    if len(y) - len(test_rows) < LEARNING_ROWS:
        raise OptionError(
            f"test_share={options.test_share!r} leaves {len(y) - len(test_rows)} of {len(y)} rows to learn from and "
            f"to calibrate on; at least {LEARNING_ROWS} are needed. Give a smaller share."
        )
    taken = {c.name for c in columns if c.dropped is None} & set(answer_columns(target))
    if taken:
        raise TableError(
            f"{source.name} has a column {min(taken)!r}, the name of a column that predicting adds. Rename it, or "
            "leave it out."
        )
    encoder = Encoder.fit(sample[~sample.index.isin(test_rows)], columns)
    large = 4 * len(y) * encoder.features > IN_MEMORY
    encoded = encode_stream(source, encoder, target=target, path=scratch / "encoded.f32" if large else None)
    notes = [f"{c.name!r} is left out: {c.dropped}." for c in columns if c.dropped]
    notes += [f"{c.name!r}: {c.note}." for c in columns if c.note and not c.dropped]
    if len(target.classes) > MOST_BOOSTED_CLASSES:
        notes.append(
            "Gradient boosting takes no part in the comparison: it would grow a tree for each of "
            f"{len(target.classes)} classes."
        )
    if len(y) > SAMPLE_ROWS:
        notes.append(
            f"Columns were described and their encoding learned from {SAMPLE_ROWS:,} rows, drawn evenly."
        )
    return _Prepared(target, encoder, encoded, y, test_rows, sample, tuple(notes))


def _check_scale(y: np.ndarray[Any, Any], name: str) -> None:
    """Refuse a target whose squares, or whose differences, are lost in float32: its errors would be wrong unseen."""
    mean, spread = float(y.mean()), float(y.std())
    if not SPREADS[0] <= spread <= SPREADS[1]:
        raise TableError(
            f"Target {name!r} has a standard deviation of {spread:.3g}; from {SPREADS[0]:g} to {SPREADS[1]:g} can be "
            "learned. Write it in another unit."
        )
    if abs(mean) > MOST_OFFSET * spread:
        raise TableError(
            f"Target {name!r} has a mean of {mean:.6g} beside a standard deviation of {spread:.3g}; seven digits "
            f"hardly tell its values apart. Subtract {mean:.0f} from it first."
        )


def _learn(
    source: TableSource, prepared: _Prepared, options: FitOptions, run: _Run, train: Train, command: str,
    begun: float, say: Callable[[str], None], progress: Callable[[Progress], None] | None,
) -> FitReport:  # fmt: skip
    x, y, classes = prepared.encoded.x, prepared.y, len(prepared.target.classes)
    rest = np.setdiff1d(np.arange(len(y)), prepared.test_rows)
    started = time.perf_counter()
    if not run.resume:
        run.checkpoints.clear()
    try:
        fit = train(
            x, y, likelihood=prepared.likelihood, classes=classes or None, rate=options.rate,
            seed=options.seed, rows=rest, validation_share=max(0.2, CALIBRATION_ROWS / len(rest)),
            max_epochs=options.max_epochs, effort=options.effort, progress=progress, checkpoints=run.checkpoints,
        )  # fmt: skip
    except DivergedError:  # there is nothing to go on from
        run.checkpoints.clear()
        raise
    trained = time.perf_counter()
    try:
        with _one_more_chance(say):
            report = _finish(source, prepared, fit, options, run, command, say)
    except KeyboardInterrupt:  # asked twice: the model is given up
        run.checkpoints.clear()
        raise
    if fit.interrupted and run.checkpoints.there():
        say(
            f"What was trained so far is kept in {run.checkpoints.folder}: the same command with --resume goes on."
        )
    else:
        run.checkpoints.clear()
    seconds = Timing(search=0.0, training=trained - started, total=time.perf_counter() - begun)
    return replace(report, timing=seconds)


def _finish(
    source: TableSource, prepared: _Prepared, fit: Fit, options: FitOptions, run: _Run, command: str,
    say: Callable[[str], None],
) -> FitReport:  # fmt: skip
    """Calibrate, evaluate, and write the directory."""
    x, y, target = prepared.encoded.x, prepared.y, prepared.target
    committee = Committee(
        fit.network, options.members, options.seed, prepared.likelihood, allow=("no spread",)
    )
    held = fit.validation_rows
    asked = CalibratedCommittee.fit(committee, x[held], y[held])
    model = TableModel(prepared.encoder, target, fit.spec, fit.network, asked)
    warnings = list(source.notes) + list(prepared.notes)
    if fit.interrupted:
        warnings.append("The training was interrupted; the model is the best there was until then.")
        say(warnings[-1])
    if fit.diverged is not None:
        warnings.append(
            f"The loss was no finite number any more at step {fit.diverged} of the training, which ended there; the "
            f"model is the best until then, of epoch {fit.best_epoch}."
        )
        say(warnings[-1])
    if fit.search is not None:
        say(fit.search.verdict)
    report = FitReport(
        data=data_summary(
            source.name, target, prepared.encoder.columns, fit, len(prepared.test_rows), warnings
        ),
        model=model_summary(fit, options.members, command, rate_given=options.rate != "auto"),
        search=search_summary(fit),
        curves=learning_curves(fit),
        **_evaluate(source, prepared, fit, asked),
    )
    # The files say nothing of seconds, so that equal seeds give equal bytes.
    texts = {
        "report.json": report.to_json(),
        "report.html": to_html(report),
        "report.txt": to_text(report),
    }
    # A file's name may hold bytes that are no text; they are shown as escapes.
    files = {name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}
    write_directory(run.out, {**model.to_files(), **files}, force=run.force)
    return report


@contextmanager
def _one_more_chance(say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C after the training is answered, the second one obeyed: the model is moments away."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # others decide what Ctrl-C means
        return

    def answer(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        say("The training is over and the report is being made; press Ctrl-C again to give the model up.")

    signal.signal(signal.SIGINT, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(
    source: TableSource, prepared: _Prepared, fit: Fit, asked: CalibratedCommittee
) -> dict[str, Any]:
    """What the held-out rows say: the evaluation, the spread against members, the comparison."""
    x, y, test = prepared.encoded.x, prepared.y, prepared.test_rows
    prediction = asked.predict(x[test])
    shown = [column.name for column in prepared.encoder.used[:SHOWN_CELLS]]
    rows = _table_rows(source, prepared, test, shown)

    def cells(position: int) -> dict[str, object]:
        return dict(rows.iloc[position])

    calibration: ConformalInterval | None = None
    held: ClassificationEvaluation | RegressionEvaluation
    if isinstance(prediction, ClassificationPrediction):
        held = evaluate_classification(
            y[test], prediction, prepared.target.classes, row_numbers=test + 1, cells=cells
        )
    else:
        assert isinstance(asked.calibration, ConformalInterval)  # LEAST_ROWS sees to it
        calibration = asked.calibration
        held = evaluate_regression(
            y[test], prediction, calibration, level=LEVEL, row_numbers=test + 1, cells=cells
        )
    splits = [Split(x, y, part) for part in (fit.train_rows, fit.validation_rows, test)]
    return {
        "held_out": held,
        "members": spread_by_members(prediction),
        "comparison": compare(prediction, calibration, *splits, level=LEVEL),
    }


def _table_rows(
    source: TableSource, prepared: _Prepared, rows: np.ndarray[Any, Any], columns: list[str]
) -> pd.DataFrame:
    """Some columns of some rows, as they stand in the table."""
    if len(prepared.sample) == len(prepared.y):
        return prepared.sample.loc[rows, columns]
    return pd.concat([frame[frame.index.isin(rows)] for frame in source.chunks(columns=columns)])


def predict_table(
    model: str | Path,
    table: str | Path | TableSource | None,
    out: str | Path,
    *,
    force: bool = False,
    header: Header = "auto",
    chunk_rows: int = CHUNK_ROWS,
) -> PredictSummary:
    """Ask the committee of a model about every row of a table, and write the table with the answers.

    Args:
        model: the directory that `fit_table` wrote.
        table: a CSV or Parquet file with the columns the model learned from, or an open table; None is the data set
            that comes along, for a model of it.
        out: the CSV file to write; all columns of the table, then those of the answer.
        force: replace a file that is there.
        header: whether the first row names the columns.
        chunk_rows: rows read at a time; it changes nothing in the output.

    Raises:
        ModelDirectoryError: the model is damaged, altered, incomplete or of a newer release.
        TableError: the table cannot be read, or lacks a column.
        OutputError: the file cannot be written.
    """
    if Path(out).suffix.lower() not in (".csv", ".txt", ""):
        raise OutputError(f"{out} was given; predictions are written as CSV. Give a name that ends in .csv.")
    check_output(out, force=force)
    loaded = TableModel.read(model)
    if table is None:
        if loaded.target.name != DEMO_TARGET:
            raise OptionError(f"{model} was given without a table. Give the CSV or Parquet file to predict.")
        table = demo_table()
    source = table if isinstance(table, TableSource) else open_table(table, header=header)
    loaded.check_source(source)
    seen = Seen()
    with write_file(out, force=force) as file:
        for number, frame in enumerate(loaded.stream(source, seen, min(chunk_rows, MOST_CHUNK))):
            for name in loaded.answer_columns:
                if frame[name].dtype == np.float64:  # seven digits are what float32 holds
                    frame[name] = np.char.mod("%.7g", frame[name].to_numpy())
            frame.to_csv(file, index=False, header=number == 0, lineterminator="\n")
    return PredictSummary(seen.rows, loaded.answer_columns, seen.notes)
