"""A committee as an ONNX file: mean and spread from any runtime, without dropkit, torch or Python."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dropkit.committee.export import example_rows, freeze, rows_of, trace
from dropkit.committee.frozen import Form
from dropkit.errors import ExportError, MissingPackageError, OptionError, OutputError
from dropkit.masks.address import SCHEME

if TYPE_CHECKING:
    from dropkit.committee.committee import Committee

# A file of this format holds less than 2 GiB; names and operators take some room beside the numbers.
MOST_BYTES = (2 << 30) - (16 << 20)
PACKAGES = ("onnx", "onnxscript")


@dataclass(frozen=True, slots=True)
class Export:
    """What was written, and how close it is to the committee itself.

    Attributes:
        path: the file.
        members: M, whose masks are inside.
        form: "batched": the members run together, among the rows; "unrolled": one after the other, each with operators
            of its own; "thinned": likewise, and each with weights of its own.
        rows: how many rows the file takes; None: any number.
        inputs: {name: shape} of what goes in; "rows" is their number.
        outputs: {name: shape} of what comes out.
        bytes: size of the file.
        difference: the largest |onnxruntime - committee.predict| on the given rows, each output relative to its largest
            value; None where onnxruntime is not installed.
    """

    path: Path
    members: int
    form: Form
    rows: int | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    bytes: int
    difference: float | None

    def __str__(self) -> str:
        rows = "any number of rows" if self.rows is None else f"{self.rows} rows"
        checked = (
            "not checked: onnxruntime is not installed"
            if self.difference is None
            else f"onnxruntime differs by at most {self.difference:.1e} of the largest value"
        )
        return (
            f"{self.path}: {self.members} members, {self.form}, {rows}, {self.bytes / 1e6:.1f} MB; "
            f"puts out {', '.join(self.outputs)}; {checked}"
        )


def export(
    committee: Committee,
    path: str | Path,
    x: Tensor | np.ndarray[Any, Any],
    *,
    samples: bool = False,
    members_at_once: int | None = None,
    thinned: bool = False,
    opset: int | None = None,
    force: bool = False,
) -> Export:
    """Write the committee as ONNX: x -> mean, spread and the rest of its prediction, masks inside as constants.

    What no mask touches is computed once. The file appears under its name when it is complete and has been read back
    and, with onnxruntime there, compared with the committee; otherwise nothing is left.

    Args:
        committee: with consistent members.
        path: the file.
        x: (B, ...), rows of the kind that will come.
        samples: put out what each member says, too.
        members_at_once: members that run together, which takes memory for so many; by default as many as 64 MiB hold of
            the widest value for the rows of a tile.
        thinned: cut the units that a member drops out of its weights: less to compute, and a larger file, as each
            member then has weights of its own.
        opset: version of ONNX's operators; by default the exporter's.
        force: replace a file that is there.

    Returns:
        What was written.

    Raises:
        MissingPackageError: the packages onnx and onnxscript are not installed.
        ExportError: the model cannot be written as a graph or in these operators, a mask depends on the rows, the file
            would be too large, or what onnxruntime computes is not what the committee says.
        NoMaskError: no mask acts.
        OutputError: the path exists, or the disk refuses.
        ShapeError, OptionError: as in `exported_program`.

    Source: the format, https://onnx.ai/onnx/repo-docs/IR.html
    """
    path = Path(path)
    check_packages()
    if opset is not None and (isinstance(opset, bool) or not 18 <= opset <= 30):
        raise OptionError(
            f"opset={opset!r} was given; torch's exporter writes ONNX operators from version 18 on."
        )
    _check_path(path, force)
    rows = example_rows(committee, x)
    frozen, form = freeze(committee, rows, samples=samples, members_at_once=members_at_once, thinned=thinned)
    _check_size(sum(t.numel() * t.element_size() for t in frozen.state_dict().values()))
    program = trace(frozen, rows)
    with torch.no_grad():
        names = list(frozen(rows))
    model = _convert(program, names, opset, committee)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent)
        os.close(handle)
        temporary = Path(name)
        model.save(temporary, external_data=False)
        shapes = _shapes(temporary)
        difference = _compare(temporary, committee, x, rows_of(program))
        size = temporary.stat().st_size
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        _check_path(path, force)  # someone may have been quicker
        temporary.replace(path)
        temporary = None
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}. Nothing was left there."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return Export(path, committee.members, form, rows_of(program), *shapes, size, difference)


def check_packages() -> None:
    """Say which package is missing, and what brings it.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"writing ONNX needs {' and '.join(missing)}, which is not installed. Get it: pip install 'dropkit[onnx]'."
        )


def _check_path(path: Path, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists. Give another path, or force=True to replace it.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a plain file. Give the path of a file.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} is not a folder that exists. Create it first.")


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ExportError(
            f"weights and masks take {size / 2**30:.1f} GiB; an ONNX file holds less than 2 GiB. Ask for fewer "
            "members: the masks of each are in the file."
        )


def _convert(
    program: torch.export.ExportedProgram, names: list[str], opset: int | None, committee: Committee
) -> Any:
    """A program in ONNX's operators, with a note on which committee it is."""
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            model = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # of whatever kind the exporter has
        why = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"the graph cannot be written in ONNX's operators: {why[0]}") from error
    assert model is not None
    _rename(model.model.graph, names)
    model.model.metadata_props.update(
        {
            "dropkit": version("dropkit"),
            "scheme": str(SCHEME),
            "seed": str(committee.seed),
            "members": str(committee.members),
            "likelihood": committee.likelihood,
        }
    )
    model.model.producer_name = "dropkit"
    model.model.producer_version = version("dropkit")
    return model


def _rename(graph: Any, outputs: list[str]) -> None:
    """Name input and outputs; what had such a name before gives way, as a mean within the model would be "mean" too."""
    ends = [*graph.inputs, *graph.outputs]
    names = ["x", *outputs]
    inner = [value for node in graph.all_nodes() for value in node.outputs] + list(
        graph.initializers.values()
    )
    for value in inner:
        if value.name in names:
            value.name = f"{value.name}_inside"
    for value, name in zip(ends, names, strict=True):
        value.name = name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from logging which other packages it could have served."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


Shapes = dict[str, tuple[int | str, ...]]


def _shapes(path: Path) -> tuple[Shapes, Shapes]:
    """Names and shapes of inputs and outputs, of a file that is checked on the way."""
    onnx = importlib.import_module("onnx")
    onnx.checker.check_model(str(path))
    graph = onnx.load(str(path), load_external_data=False).graph
    inputs, outputs = (
        {
            value.name: tuple(
                dim.dim_value if dim.HasField("dim_value") else "rows"
                for dim in value.type.tensor_type.shape.dim
            )
            for value in values
        }
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


def _compare(
    path: Path, committee: Committee, x: Tensor | np.ndarray[Any, Any], fixed: int | None
) -> float | None:
    """The largest relative difference between the file, run with default optimisations, and the committee.

    Raises:
        ExportError: it is more than rounding.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime = importlib.import_module("onnxruntime")
    # Where any number of rows is taken, those of the caller are, also one row, which the graph was not made with.
    rows = example_rows(committee, x)
    if fixed is None:
        rows = rows[: len(x)]
    try:
        session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        told = dict(
            zip(
                [o.name for o in session.get_outputs()],
                session.run(None, {session.get_inputs()[0].name: rows.cpu().numpy()}),
                strict=True,
            )
        )
    except Exception as error:  # of whatever kind the runtime has
        raise ExportError(
            f"onnxruntime cannot run what was exported: {str(error).splitlines()[0]}"
        ) from error
    prediction = committee.predict(rows)
    worst = 0.0
    for name, ours in told.items():
        theirs = getattr(prediction, name)
        theirs = np.zeros_like(ours) if theirs is None else theirs.detach().cpu().numpy()
        worst = max(worst, relative_difference(ours, theirs))
    if not worst <= 1e-3:
        raise ExportError(
            f"onnxruntime gives other numbers than the committee: {worst:.1e} of the largest value. "
            "Nothing was written."
        )
    return worst


def relative_difference(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """max |ours - theirs| / max |theirs|; infinite where one is not a number and the other is."""
    if ours.shape != theirs.shape or not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return float("inf")
    there = np.isfinite(theirs)
    if not there.any():
        return 0.0
    scale = float(np.abs(theirs[there]).max()) or 1.0
    return float(np.abs(ours[there].astype(np.float64) - theirs[there]).max()) / scale


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
