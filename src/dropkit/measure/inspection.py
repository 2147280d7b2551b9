"""All that the instruments say about one model, on one page, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dropkit.conversion import scan
from dropkit.errors import MeasurementError, MissingPackageError, OptionError, ShapeError
from dropkit.measure.advice import advise
from dropkit.measure.attenuation import attenuation
from dropkit.measure.capacity import capacity
from dropkit.measure.coadaptation import coadaptation
from dropkit.measure.flatness import flatness
from dropkit.measure.generalization_gap import generalization_gap
from dropkit.measure.gradient_bias import gradient_bias
from dropkit.measure.gradient_noise import GradientNoise, gradient_noise
from dropkit.measure.inspected import Finding, Inspection, ModelFigures, Reading, Skipped
from dropkit.measure.inspected_sites import inspect_sites
from dropkit.measure.learned import learned
from dropkit.measure.losses import LossFunction
from dropkit.measure.penalty import penalty
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole
from dropkit.measure.site_figures import Answer, Estimate, NoiseFigures, noise_figures
from dropkit.measure.stability import stability
from dropkit.measure.subject import Subject, check_rows, subject_of
from dropkit.measure.variance_shift import variance_shift

LEAST_ROWS = 8  # fewer give no error bar over rows that could be believed
FEW_ROWS = 256  # for what takes a pass for each unit
# What `dropkit.scan` finds that is wrong with the model itself, and not with how others ask for its masks.
FAULTS = ("last layer", "one layer", "always on", "never on", "not reached", "rows")
RECURRENT = ("LSTM", "GRU", "RNN", "Zoneout")

Found = TypeVar("Found", bound=Measurement)
Data = tuple[Tensor, Tensor]


def inspect(
    model: nn.Module,
    x: Tensor | Data,
    y: Tensor | None = None,
    *,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    rows: int = 1000,
    batch: int = 32,
    new: Data | None = None,
    deep: bool = False,
    columns: Sequence[str] | None = None,
    answer: Answer | None = None,
    tolerance: float | None = None,
) -> Inspection:
    """Run the instruments that apply to this model, and say of each dropout what it does and what to change.

    An instrument that cannot run is named with the reason in `skipped`. Advice is given only where a figure is beyond
    its limit by three standard errors; the limits stand in `dropkit.measure.advice`.

    Args:
        model: as in `dropkit.measure.penalty`; not changed.
        x: (B, ...) rows, at least 8; or the pair (x, y).
        y: (B, ...) targets.
        loss: (outputs, y) -> () or (B,); None: squared error for floating targets, cross-entropy for whole numbers and
            switches.
        members: passes with masks.
        seed: of masks and choices of rows.
        rows: most rows that are looked at; of more, so many are drawn by the seed.
        batch: rows of a minibatch, for the noise of the gradient.
        new: (x, y) of rows that the model was not trained on, for the generalisation gap.
        deep: with flatness, capacity and stability, which train copies or need many derivatives.
        columns: names of the columns of x (B, D).
        answer: outputs -> what counts as the prediction; None: probabilities for classes, else the outputs.
        tolerance: largest standard error of noise over signal that is accepted, as a share of the figure.

    Returns:
        An `Inspection`.

    Raises:
        NoMaskError: no dropout acts, or all rates are 0.
        MeasurementError: the loss is not finite, or the tolerance was not reached; it says how many rows would do.
        ShapeError: x and y are no tensors of as many rows, or of fewer than 8.
        OptionError: an option is outside its range.

    Example:
        >>> import torch, dropkit as dk
        >>> model = torch.nn.Sequential(dk.nn.Dropout(0.5), torch.nn.Linear(4, 1), dk.nn.Dropout(0.5))
        >>> x = torch.arange(80.0).view(20, 4).cos()
        >>> found = dk.inspect(model, x, x.sum(1), members=8)
        >>> found.findings[0].site, found.findings[0].rule
        ('2', 'last layer')
    """
    x, y = _pair(x, y, "x")
    check_whole("members", members, 4)
    check_seed(seed)
    check_whole("rows", rows, LEAST_ROWS, 1 << 40)
    check_whole("batch", batch, 1)
    check_rows(x, y, LEAST_ROWS)
    x, y = _some(x, y, rows, seed)
    subject = subject_of(model, x, y, loss)
    look = _Look(subject, members, seed, batch)
    gain = learned(subject)
    one = cast(nn.Module, subject)  # recorded once, for all instruments
    gradient = look.ask(
        "gradient_noise",
        lambda: gradient_noise(one, x, y, loss=loss, members=members, seed=seed, batch=batch),
    )
    noise = look.sites(gradient, answer or _prediction(y, loss))
    _check_tolerance(tolerance, noise, len(x))  # before what takes longest
    cost = look.ask("penalty", lambda: penalty(one, x, y, loss=loss, members=members, seed=seed))
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        look.ask("variance_shift", lambda: variance_shift(one, x, y, loss=loss, members=members, seed=seed))
    few_x, few_y, short = x[:FEW_ROWS], y[:FEW_ROWS], max(4, members // 2)
    few = one if len(x) <= FEW_ROWS else cast(nn.Module, subject_of(model, few_x, few_y, loss))
    look.ask(
        "gradient_bias",
        lambda: gradient_bias(few, few_x, few_y, loss=loss, members=short, seed=seed),
        len(few_x),
    )
    units = look.ask(
        "coadaptation",
        lambda: coadaptation(few, few_x, few_y, loss=loss, members=short, seed=seed),
        len(few_x),
    )
    memory = gap = None
    if any(part in type(module).__name__ for module in model.modules() for part in RECURRENT):
        memory = look.ask(
            "attenuation",
            lambda: attenuation(few, few_x, few_y, loss=loss, members=short, seed=seed),
            len(few_x),
        )
    if new is not None:
        new_x, new_y = _some(*_pair(new, None, "new"), rows, seed)
        gap = look.ask(
            "generalization_gap",
            lambda: generalization_gap(
                one, x, y, new_x=new_x, new_y=new_y, loss=loss, members=members, seed=seed
            ),
        )
    if deep:
        look.ask("flatness", lambda: flatness(model, x, y, loss=loss, seed=seed))
        look.ask("capacity", lambda: capacity(model, few_x, few_y, loss=loss, seed=seed), len(few_x))
        look.ask("stability", lambda: stability(model, few_x, few_y, loss=loss, seed=seed), len(few_x))
    seen = scan(model, subject.x[:LEAST_ROWS])
    sites = inspect_sites(subject, seen, noise, cost if noise else None, units, gain and gain[1], columns)
    figures = ModelFigures(
        loss=subject.loss.name,
        plain=subject.plain,
        constant=gain and gain[0],
        gain=gain and gain[1],
        penalty=None if cost is None else Estimate(float(cost.measured), float(cost.standard_error)),
        gradient=_inflation(gradient),
        batch=batch,
        gap=None if gap is None else Estimate(float(gap.measured), float(gap.standard_error)),
        power=None if memory is None else Estimate(float(memory.square[0]), float(memory.square_error[0])),
    )
    faults = tuple(
        Finding(w.trap, w.name, None, w.message, "dropkit.scan") for w in seen.warnings if w.trap in FAULTS
    )
    return Inspection(
        rows=len(x),
        members=members,
        seed=seed,
        figures=figures,
        sites=sites,
        findings=faults + advise(sites, figures),
        readings=tuple(look.readings),
        skipped=tuple(look.skipped),
    )


class _Look:
    """Instruments asked one after another; what they say and what they cannot."""

    def __init__(self, subject: Subject, members: int, seed: int, batch: int) -> None:
        self.subject, self.members, self.seed, self.batch = subject, members, seed, batch
        self.readings: list[Reading] = []
        self.skipped: list[Skipped] = []

    def ask(self, name: str, run: Callable[[], Found], rows: int | None = None) -> Found | None:
        """What an instrument found, or None and a line on why it found nothing."""
        try:
            found = run()
        except (MeasurementError, MissingPackageError, ShapeError, OptionError) as error:
            self.skipped.append(Skipped(name, " ".join(str(error).split())))
            return None
        self.readings.append(Reading(name, found.to_text(), found.formula, rows or len(self.subject.x)))
        return found

    def sites(self, gradient: GradientNoise | None, answer: Answer) -> tuple[NoiseFigures, ...]:
        """Figures of each site; none where the noise of this model is no argument of it."""
        noise = self.subject.noise
        if (
            noise is None or noise.hidden or noise.rough
        ):  # noise that is only compared has no mean to put in its place
            self.skipped.append(Skipped("figures of each site", self.subject.why))
            return ()
        plain = gradient.plain if gradient is not None else None
        return noise_figures(self.subject, self.members, self.seed, self.batch, plain, answer)


def _pair(x: Tensor | Data, y: Tensor | None, name: str) -> Data:
    """x and y, given as two or as a pair."""
    if y is None and isinstance(x, tuple | list) and len(x) == 2:
        return x[0], x[1]
    if y is None or isinstance(x, tuple | list):
        raise ShapeError(
            f"{name} of type {type(x).__name__} was given without targets; give x and y, or the pair (x, y)."
        )
    return x, y


def _some(x: Tensor, y: Tensor, rows: int, seed: int) -> Data:
    """At most so many rows, drawn without replacement, in their order."""
    check_rows(x, y)
    if len(x) <= rows:
        return x, y
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    chosen = torch.randperm(len(x), generator=generator)[:rows].sort().values
    return x[chosen.to(x.device)], y[chosen.to(y.device)]


def _prediction(y: Tensor, loss: LossFunction | None) -> Answer:
    if loss is not None or y.is_floating_point():
        return lambda outputs: outputs
    if y.dtype is torch.bool:
        return torch.sigmoid
    return lambda outputs: outputs.softmax(dim=-1)


def _inflation(gradient: GradientNoise | None) -> Estimate | None:
    if gradient is None or not gradient.plain > 0:
        return None
    return Estimate(gradient.inflation, float(gradient.standard_error) / gradient.plain)


def _check_tolerance(tolerance: float | None, found: tuple[NoiseFigures, ...], rows: int) -> None:
    """Say how many rows are needed where a figure of a layer is not known as well as was asked."""
    shares = [site.noise.error / site.noise.value for site in found if site.noise and site.noise.value > 0]
    check_error(tolerance, torch.tensor(max(shares, default=0.0)), rows, "rows")
