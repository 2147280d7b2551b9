"""check_dropout: try a dropout, anybody's, against the list of laws."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from dropkit.errors import OptionError, ShapeError, check_probability
from dropkit.masks import masks
from dropkit.nn.features import dropout
from dropkit.nn.layer import StochasticLayer
from dropkit.testing import (
    addresses,
    draws,
    gradients,
    modes,
    modules,
    tensors,
    transforms,
    values,
)
from dropkit.testing.law import Kind, Law, LawName
from dropkit.testing.registry import Check, entered
from dropkit.testing.report import Outcome, Report, Result
from dropkit.testing.subject import (
    RATE_NAMES,
    TRAINING_NAMES,
    Broken,
    Context,
    NotApplicable,
    Subject,
    parameter_names,
)

# Importing a topic enters its checks; this is the order of the report.
TOPICS = [
    topic.__name__.rpartition(".")[2]
    for topic in (values, modes, gradients, tensors, draws, modules, transforms, addresses)
]
CHECKS = {check.name: check for check in sorted(entered, key=lambda check: TOPICS.index(check.topic))}

# What torch's own layers promise: how masks are shared, the law, a shape they take.
TORCH: dict[str, tuple[Kind, LawName, tuple[int, ...]]] = {
    "Dropout1d": ("channels", "inverted", (8, 6, 5)),
    "Dropout2d": ("channels", "inverted", (8, 6, 4, 5)),
    "Dropout3d": ("channels", "inverted", (6, 5, 3, 2, 4)),
    "AlphaDropout": ("elementwise", "alpha", (16, 24)),
    "FeatureAlphaDropout": ("channels", "alpha", (8, 6, 4, 5)),
    "dropout1d": ("channels", "inverted", (8, 6, 5)),
    "dropout2d": ("channels", "inverted", (8, 6, 4, 5)),
    "dropout3d": ("channels", "inverted", (6, 5, 3, 2, 4)),
    "alpha_dropout": ("elementwise", "alpha", (16, 24)),
    "feature_alpha_dropout": ("channels", "alpha", (8, 6, 4, 5)),
}
KINDS = ("elementwise", "channels", "rows", "batch", "auto")
LAWS = ("inverted", "classic", "alpha")


def check_dropout(
    thing: Any,
    *,
    p: float | None = None,
    shape: tuple[int, ...] | None = None,
    kind: Kind | None = None,
    shared: Collection[int] | None = None,
    law: LawName | None = None,
    context: Context | None = None,
    select: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    slow: bool = False,
    name: str | None = None,
    seed: int = 0,
    false_alarm: float = 1e-9,
    device: str | torch.device = "cpu",
) -> Report:
    """Try a dropout, anybody's, against about seventy laws, and say which it keeps.

    A statistical check blames what chance explains less often than `false_alarm`; its single decisions share that
    rate evenly (Bonferroni). Chance comes from torch's generator, seeded for each check and put back after the run.

    Args:
        thing: a layer, a class of layers made as thing(p=...), or a function of (x, p, training, inplace) or fewer.
            A rate may also be called drop_prob, rate, dropout or dropout_p, the flag train.
        p: the rate of most checks, in [0.01, 0.99]; by default the layer's own, else 0.3.
        shape: of most inputs, dim 0 counting rows; by default one that fits the kind.
        kind: which elements share a mask element: "elementwise" none, "channels" dims from 2 on, "rows" dims from 1
            on, "batch" dim 0; "auto" finds out by trial. By default known for torch's layers, else elementwise.
        shared: the dims themselves, in place of a kind.
        law: "inverted", "classic" or "alpha"; by default known for torch's layers, else inverted.
        context: opens an address: called with some of seed, step, row_offset, samples, member, as `dropkit.masks` is;
            that is the default for dropkit's own layers.
        select: names of checks or topics to run; by default all that are quick.
        skip: names of checks or topics to leave out.
        slow: run the checks that compile or export too.
        name: for the report; by default the class's or function's.
        seed: of the run.
        false_alarm: chance that a statistical check blames a dropout that is right.
        device: where inputs are made.

    Returns:
        What was found; nothing is raised for a law that is broken until `Report.raise_on_failure()`.

    Raises:
        ProbabilityError: p or false_alarm is no probability.
        OptionError: an unknown check, topic, kind or law, or a rate in (0, 0.01) or (0.99, 1).
        ShapeError: shared dims that the shape does not have, or all of them.

    Example:
        >>> import torch
        >>> from dropkit.testing import check_dropout
        >>> report = check_dropout(torch.nn.Dropout(0.3), select=["rate_is_p", "dropped_nan_and_infinity_are_gone"])
        >>> report.passed, report.failed
        (('rate_is_p',), ('dropped_nan_and_infinity_are_gone',))
    """
    chosen = choose(select, skip, slow)
    subject = describe(thing, p, shape, kind, shared, law, context, name, false_alarm, device)
    subject_device = [subject.device] if subject.device.type == "cuda" else []
    with torch.random.fork_rng(devices=subject_device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer may warn about a shape; verdicts are what this speaks with
        if kind == "auto":
            torch.manual_seed(seed)
            subject = with_shared_dims_found(subject)
        outcomes = tuple(run_one(check, subject, seed) for check in chosen)
    dims = (
        f"mask shared along dims {list(subject.shared)}"
        if subject.shared
        else "a mask element for each element"
    )
    return Report(
        subject=subject.name,
        contract=f"{subject.law.name}, {dims} of {subject.shape}, p={subject.p}",
        false_alarm=false_alarm * sum(check.statistical for check in chosen),
        outcomes=outcomes,
    )


def choose(select: Iterable[str] | None, skip: Iterable[str], slow: bool) -> list[Check]:
    """The checks that were asked for."""
    known = {*CHECKS, *(check.topic for check in CHECKS.values())}
    wanted, unwanted = None if select is None else set(select), set(skip)
    if unknown := ((wanted or set()) | unwanted) - known:
        raise OptionError(
            f"{sorted(unknown)} were given; there are these checks and topics: {sorted(known)}."
        )
    return [
        check
        for check in CHECKS.values()
        if not {check.name, check.topic} & unwanted
        and ((slow or not check.slow) if wanted is None else _selected(check, wanted, slow))
    ]


def _selected(check: Check, wanted: set[str], slow: bool) -> bool:
    return check.name in wanted or (check.topic in wanted and (slow or not check.slow))


def describe(
    thing: Any, p: float | None, shape: tuple[int, ...] | None, kind: Kind | None, shared: Collection[int] | None,
    law: LawName | None, context: Context | None, name: str | None, false_alarm: float, device: str | torch.device,
) -> Subject:  # fmt: skip
    """What was given, with what is known about it filled in; arguments as in `check_dropout`."""
    if not callable(thing):
        raise OptionError(f"{thing!r} was given; a layer, a class of layers or a function is checked.")
    if isinstance(thing, type) and not issubclass(thing, nn.Module):
        raise OptionError(f"the class {thing.__name__} was given; a class must be one of torch.nn.Module.")
    own_kind = type(thing) if isinstance(thing, nn.Module) else thing
    own_name = getattr(own_kind, "__name__", type(own_kind).__name__)
    from_torch = str(getattr(own_kind, "__module__", "")).startswith("torch.")
    known = TORCH.get(own_name) if from_torch else None
    kind = kind or (known[0] if known else "elementwise")
    law = law or (known[1] if known else "inverted")
    if kind not in KINDS or law not in LAWS:
        raise OptionError(f"kind={kind!r}, law={law!r} was given; kinds are {KINDS}, laws are {LAWS}.")
    shape = tuple(shape or (known[2] if known else (8, 6, 4, 5) if kind == "channels" else (16, 24)))
    names = parameter_names(own_kind)
    if isinstance(thing, nn.Module):
        rate_name = next((word for word in RATE_NAMES if hasattr(thing, word)), None)
    else:
        rate_name = next((word for word in RATE_NAMES if word in names), None)
    if p is None:
        own = getattr(thing, rate_name, None) if isinstance(thing, nn.Module) and rate_name else None
        p = float(own) if own is not None else 0.3
    if not 0.01 <= check_probability(p) <= 0.99:
        raise OptionError(
            f"p={p} was given; most checks need a rate in [0.01, 0.99], and extremes have checks of their own."
        )
    if not 0 < check_probability(false_alarm, "false_alarm") < 0.5:
        raise OptionError(f"false_alarm={false_alarm} was given; it lies in (0, 0.5).")
    if context is None and (_is_ours(own_kind) or thing is dropout):
        context = masks
    return Subject(
        name=name or own_name,
        thing=thing,
        rate_name=rate_name,
        training_name=next((word for word in TRAINING_NAMES if word in names), None),
        has_inplace="inplace" in names,
        p=float(p),
        shape=shape,
        shared=shared_dims(kind, shape, shared),
        law=Law(law),
        context=context,
        device=torch.device(device),
        false_alarm=false_alarm,
    )


def _is_ours(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StochasticLayer)


def shared_dims(kind: Kind, shape: tuple[int, ...], shared: Collection[int] | None) -> tuple[int, ...]:
    """The dims along which a mask is constant, in order."""
    dims = len(shape)
    if shared is not None:
        found = tuple(sorted({dim + dims if dim < 0 else dim for dim in shared}))
    else:
        first = {"channels": 2, "rows": 1}.get(kind, dims)
        found = (0,) if kind == "batch" else tuple(range(first, dims))
    if not shape or math.prod(shape) == 0 or any(not 0 <= dim < dims for dim in found) or len(found) == dims:
        raise ShapeError(
            f"shape={shape} with shared dims {found} was given; the shape has no empty dim, has all shared dims, and "
            "at least one dim along which masks vary."
        )
    return found


def with_shared_dims_found(subject: Subject) -> Subject:
    """The same with the dims along which 64 trial masks were constant.

    Raises:
        ShapeError: the masks never varied.
    """
    call = subject.build()
    keep = torch.stack([subject.mask(call=call) for _ in range(64)])
    constant = [dim for dim in range(len(subject.shape)) if bool((keep == keep.narrow(dim + 1, 0, 1)).all())]
    fields = {name: getattr(subject, name) for name in subject.__dataclass_fields__}
    return Subject(**{**fields, "shared": shared_dims("auto", subject.shape, constant)})


def run_one(check: Check, subject: Subject, seed: int) -> Outcome:
    """One check, from a seed of its own, so that a selection finds what the whole list finds."""
    torch.manual_seed(zlib.crc32(f"{seed} {check.name}".encode()))
    result: Result
    try:
        remark = check.run(subject)
        result, reason = "passed", remark or ""
    except NotApplicable as why:
        result, reason = "not applicable", str(why)
    except Broken as what:
        result, reason = "failed", str(what)
    except Exception as error:  # what a stranger's code raises is a finding, not an end
        lines = str(error).strip().splitlines()
        result, reason = "failed", f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
    return Outcome(check.name, check.topic, check.law, result, reason)
