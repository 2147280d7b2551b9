"""A committee as a plain graph with its masks inside, for torch.export and for what reads its graphs.

Whoever runs the graph needs no dropkit: x goes in, mean and spread come out. The graph is deterministic, so no
optimiser can take its dropout away. `onnx.py` writes it to a file.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dropkit.committee.frozen import (
    Form,
    FrozenMembers,
    NotBatchableError,
    fixed,
    rows_now,
    site_masks,
    widest,
)
from dropkit.committee.frozen_thin import ThinnedMembers
from dropkit.committee.graph import Graph, RecordingError, record
from dropkit.committee.look import every_layer_runs
from dropkit.committee.prediction import mean_and_variance
from dropkit.errors import ExportError, NoMaskError, OptionError, ShapeError
from dropkit.masks.address import masks

if TYPE_CHECKING:
    from dropkit.committee.committee import Committee

# What the widest value of the members that run together may take, if rows come by the committee's tile.
PASS_BYTES = 64 << 20
# How far the graph may be from the members themselves: rounding, in another order, and nothing else.
RELATIVE, ABSOLUTE = 1e-3, 1e-5
CHECKED_MEMBERS = 3


class FrozenCommittee(nn.Module):
    """x -> {name: what the committee says}; masks inside, names as in the predictions.

    Likelihood "point" gives mean, std, epistemic and standard_error, each (B, *out); "gaussian" aleatoric and total,
    too; "categorical" gives probabilities and their standard_error, (B, C), entropy, expected_entropy and
    mutual_information, (B,).

    Args:
        asked: the members.
        likelihood: what the output is.
        samples: put out what each member says too, `samples` (M, B, ...), and for "gaussian" its variance, `noise`.
    """

    def __init__(self, asked: nn.Module, likelihood: str, samples: bool) -> None:
        super().__init__()
        self.asked = asked
        self.likelihood = likelihood
        self.samples = samples
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, ...) -> statistics over the members, computed in float64 and given in the model's dtype."""
        output = self.asked(x)
        said = self._classes(output) if self.likelihood == "categorical" else self._numbers(output)
        return {name: value.to(output.dtype) for name, value in said.items()}

    def _numbers(self, output: Tensor) -> dict[str, Tensor]:
        values, noise = output, None
        if self.likelihood == "gaussian":
            values, noise = output[..., 0], output[..., 1].exp()
        mean, epistemic = mean_and_variance(values)
        aleatoric = 0.0 if noise is None else noise.mean(dim=0, dtype=torch.float64)
        said = {
            "mean": mean,
            "std": (epistemic + aleatoric).sqrt(),
            "epistemic": epistemic,
            "standard_error": (epistemic / values.shape[0]).sqrt(),
        }
        if isinstance(aleatoric, Tensor):
            said |= {"aleatoric": aleatoric, "total": epistemic + aleatoric}
        if self.samples:
            said |= {"samples": values} if noise is None else {"samples": values, "noise": noise}
        return said

    def _classes(self, output: Tensor) -> dict[str, Tensor]:
        # `information.py` has these formulas behind checks of the values, which a graph cannot make.
        samples = output.softmax(dim=-1)
        member = samples.double()
        mean, variance = mean_and_variance(samples)
        divergence = member * (_log(member) - _log(mean)) - member + mean
        said = {
            "probabilities": mean,
            "entropy": -(mean * _log(mean)).sum(dim=-1),
            "expected_entropy": -(member * _log(member)).sum(dim=-1).mean(dim=0),
            "mutual_information": divergence.sum(dim=-1).mean(dim=0).clamp_min(0.0),
            "standard_error": (variance / samples.shape[0]).sqrt(),
        }
        return {**said, "samples": samples} if self.samples else said


def exported_program(
    committee: Committee,
    x: Tensor | np.ndarray[Any, Any],
    *,
    samples: bool = False,
    members_at_once: int | None = None,
    thinned: bool = False,
) -> torch.export.ExportedProgram:
    """The committee as a program of torch.export: torch's operators, weights, and masks as constants.

    `program.module()(x)` gives {name: tensor}, as `FrozenCommittee` has them. It can be compiled ahead of time, or
    lowered by any backend that reads such programs. `torch.export.save` writes it with pickle inside, so load such
    files from yourself alone; the ONNX file of `export` has none.

    Args:
        committee: with consistent members.
        x: (B, ...), rows of the kind that will come.
        samples: put out what each member says, too.
        members_at_once: members that run together; by default as many as 64 MiB hold of the widest value for the
            rows of a tile.
        thinned: cut the units that a member drops out of its weights: less to compute, more to store, as each member
            then has weights of its own.

    Returns:
        The program, which takes any number of rows where the model does.

    Raises:
        ExportError: the model cannot be written as a graph, a mask depends on the rows, or each row has its own.
        NoMaskError: no mask acts.
        ShapeError: x has no rows, or the output is not what the likelihood says.
        OptionError: members_at_once is out of range.

    Example:
        >>> import torch, dropkit as dk
        >>> from dropkit.committee.export import exported_program
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), dk.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        >>> committee, x = dk.Committee(model, members=16), torch.ones(5, 3)
        >>> told = exported_program(committee, x).module()(x)
        >>> torch.allclose(told["std"], committee.predict(x).std, atol=1e-6)
        True
    """
    rows = example_rows(committee, x)
    frozen, _ = freeze(committee, rows, samples=samples, members_at_once=members_at_once, thinned=thinned)
    return trace(frozen, rows)


def freeze(
    committee: Committee, x: Tensor, *, samples: bool, members_at_once: int | None, thinned: bool = False
) -> tuple[FrozenCommittee, Form]:
    """The committee as a module without chance, and the form in which its members run.

    Args:
        committee: with consistent members.
        x: as `example_rows` gives them.
        samples, members_at_once, thinned: see `exported_program`.

    Raises:
        As `exported_program`.
    """
    if committee.per_row:
        raise ExportError(
            "a committee with per_row=True was given; the masks of a graph are constants, the same for all rows. "
            "Export one with per_row=False."
        )
    if members_at_once is not None and (isinstance(members_at_once, bool) or members_at_once < 1):
        raise OptionError(f"members_at_once={members_at_once!r} was given; at least 1 member runs at a time.")
    with every_layer_runs(committee.network), torch.no_grad():
        try:
            graph = record(committee.network, x)
        except RecordingError as error:
            raise ExportError(
                f"the model cannot be written as a graph: {error}. A way that depends on values is the usual reason; "
                "such a committee can be asked in Python alone."
            ) from None
    if not graph.draws:
        raise NoMaskError("a model in which no mask acts was given: there is no committee to export.")
    at_once = members_at_once or _at_once(graph, committee, x)
    asked, form = _freeze_members(
        graph, committee, x, at_once, ("thinned",) if thinned else ("batched", "unrolled")
    )
    return FrozenCommittee(asked, committee.likelihood, samples), form


def trace(frozen: FrozenCommittee, x: Tensor) -> torch.export.ExportedProgram:
    """A frozen committee as a program; the number of rows stays open where the graph allows it."""
    error: Exception | None = None
    for size in (torch.export.Dim("rows", min=1), torch.export.Dim.AUTO):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.export.export(frozen, (x,), dynamic_shapes={"x": {0: size}}, strict=False)
        except Exception as caught:  # what does not go with an open number may go with a fixed one
            error = caught
        else:
            _check_operators(program, frozen)
            return program
    raise ExportError(f"torch.export cannot read the committee's graph: {_first_line(error)}") from error


def _check_operators(program: torch.export.ExportedProgram, frozen: FrozenCommittee) -> None:
    """Say so if a mask is still drawn."""
    if any("dropkit" in str(node.target) for node in program.graph.nodes):
        left = "; ".join(f"{name!r}: {why}" for name, why in getattr(frozen.asked, "left", ())[:3])
        raise ExportError(
            f"thinned=True was given, and not every mask can be cut out of weights: {left}. Export with thinned=False, "
            "where masks are constants."
        )


def rows_of(program: torch.export.ExportedProgram) -> int | None:
    """How many rows a program takes; None: any number."""
    name = program.graph_signature.user_inputs[0]
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    return rows_now(value.shape[0]) if fixed(value.shape[0]) else None


def example_rows(committee: Committee, x: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Rows in the dtype and on the device of the weights, at least two: of one alone a graph cannot tell the rows.

    Raises:
        ShapeError: x has no rows.
    """
    rows = x if isinstance(x, Tensor) else torch.tensor(np.ascontiguousarray(x))
    if rows.ndim == 0 or len(rows) == 0:
        raise ShapeError(
            f"x of shape {tuple(rows.shape)} was given; an export needs at least one row of the kind that will come, "
            "(B, ...)."
        )
    weight = next((p for p in committee.network.parameters() if p.is_floating_point()), None)
    if weight is not None:
        rows = rows.to(weight.device, weight.dtype if rows.is_floating_point() else rows.dtype)
    return torch.cat((rows, rows)) if len(rows) == 1 else rows.detach()


def _freeze_members(
    graph: Graph, committee: Committee, x: Tensor, at_once: int, forms: tuple[Form, ...]
) -> tuple[nn.Module, Form]:
    """Members in the first of these forms that the graph allows, checked against the members themselves."""
    with torch.no_grad():
        wanted = [
            _member(graph, committee.seed, k, x) for k in range(min(committee.members, CHECKED_MEMBERS))
        ]
        found = None if forms == ("thinned",) else site_masks(graph, committee.seed, committee.members)
        for form in forms:
            try:
                asked: nn.Module = (
                    ThinnedMembers(graph, committee.seed, committee.members)
                    if found is None
                    else FrozenMembers(graph, found, committee.members, at_once, form)
                )
                given = asked(x)
            except (NotBatchableError, RuntimeError) as error:
                if form == forms[-1]:
                    raise ExportError(
                        f"the graph of the model cannot be run: {_first_line(error)}"
                    ) from error
                continue
            _check_output(given, committee.likelihood)
            if all(_agree(ours, theirs) for ours, theirs in zip(given, wanted, strict=False)):
                return asked, form
    raise ExportError(
        "the model's graph gives other numbers than its members do: something in it depends on more than its input. "
        "Such a committee can be asked in Python alone."
    )


def _member(graph: Graph, seed: int, member: int, x: Tensor) -> Tensor:
    with masks(seed=seed, member=member):
        output = graph.module(x)
    if not isinstance(output, Tensor):
        raise ExportError(
            f"the model puts out a {type(output).__name__}; a committee is exported with one tensor, (B, *out). Wrap "
            "the model in a module that returns the one you need."
        )
    return output


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    finite = theirs[theirs.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(ours, theirs, rtol=RELATIVE, atol=ABSOLUTE * (scale or 1.0), equal_nan=True)


def _at_once(graph: Graph, committee: Committee, x: Tensor) -> int:
    size = widest(graph, len(x)) * committee.tile * torch.get_default_dtype().itemsize
    return max(1, min(committee.members, math.floor(PASS_BYTES / max(size, 1))))


def _check_output(output: Tensor, likelihood: str) -> None:
    """Say so if (M, B, *out) is not what the likelihood means."""
    given, last = tuple(output.shape[1:]), output.shape[-1]
    if likelihood == "gaussian" and (output.ndim < 3 or last != 2):
        raise ShapeError(f"outputs {given} were given; likelihood='gaussian' needs (rows, ..., 2).")
    if likelihood == "categorical" and (output.ndim != 3 or last < 2):
        raise ShapeError(f"outputs {given} were given; likelihood='categorical' needs (rows, C) with C >= 2.")


def _log(probabilities: Tensor) -> Tensor:
    """Logarithm for p log p, which is 0 at p = 0."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
