"""Whether units are useful on their own: what it costs to take single ones and random ones away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropkit.errors import MeasurementError
from dropkit.masks import masks
from dropkit.masks.laws import multiply
from dropkit.measure.curvature import EXACT_WIDTH, noise_curvatures, with_derivatives
from dropkit.measure.generalization_gap import row_losses
from dropkit.measure.losses import LossFunction
from dropkit.measure.records import Measurement
from dropkit.measure.sampling import check_error, check_seed, check_whole, mean_and_error
from dropkit.measure.subject import Subject, check_finite, subject_of

SHARES = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class SiteAblation:
    """The units behind one mask.

    Attributes:
        site: its name.
        predicted: (U,), rise of the loss when a unit is taken away, to second order.
        measured, standard_error: (U,), the same, measured; the error is over rows.
        correlation: mean size of the correlation between two units over rows; NaN where fewer than two units vary.
    """

    site: str
    predicted: Tensor | None
    measured: Tensor
    standard_error: Tensor
    correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coadaptation(Measurement):
    """Rise of the loss when single units are taken away (set to 0, nothing scaled), all sites' units one after another.

    Attributes:
        plain: the loss of the whole network.
        sites: site by site.
        shares: of the units of all sites, removed at random.
        removed, removed_error: loss with that share removed, (len(shares),).
    """

    plain: float
    sites: tuple[SiteAblation, ...]
    shares: tuple[float, ...]
    removed: Tensor
    removed_error: Tensor

    def to_text(self) -> str:
        """How the loss grows as units go, and how alike they are."""
        worst = max(float(site.measured.max()) for site in self.sites)
        half = self.shares.index(0.5)
        alike = ", ".join(f"{site.correlation:.3g} at {site.site!r}" for site in self.sites)
        return (
            f"The {self.loss} is {self.plain:.4g}; without half of the units it is {float(self.removed[half]):.4g} ± "
            f"{float(self.removed_error[half]):.2g}; the dearest single unit costs {worst:.4g}. "
            f"Mean correlation between "
            f"units: {alike} ({self.formula})."
        )


def coadaptation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossFunction | None = None,
    members: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> Coadaptation:
    """What units are worth on their own: the loss without one, without many, and how alike they are.

    L(without j) - L ~ -dL/de_j + 1/2 d2L/de_j^2,    all rows together

    Args:
        model, x, y, loss: as in `penalty`. Units are the values that a mask drops for a row; sites with more than 128
            of them are left out of the single removals.
        members: random removals for each share.
        seed: which removals.
        tolerance: largest standard error of a single removal that is accepted; the error says how many rows would do.

    Returns:
        A `Coadaptation`.

    Raises:
        NoMaskError, MeasurementError, ShapeError, OptionError: as in `penalty`.

    Source: Srivastava et al. 2014, JMLR 15, sec. 7.1; LeCun, Denker and Solla 1990 (the second-order form).
    """
    check_whole("members", members)
    check_seed(seed)
    subject = subject_of(model, x, y, loss)
    noise = subject.noise
    if noise is None:
        raise MeasurementError(f"units of this model cannot be reached one by one: {subject.why}.")
    places = [i for i, site in enumerate(noise.sites) if site.width <= EXACT_WIDTH]
    if not places:
        raise MeasurementError(
            f"every mask of this model has more than {EXACT_WIDTH} values a row. Measure a narrower part of it."
        )
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    start, inputs = noise.none(like), noise.inputs(subject.x)
    whole = row_losses(subject, subject.x, subject.y)
    predicted = (
        with_derivatives(subject, lambda: _predicted(subject, seed)) if subject.smooth is not None else {}
    )
    found = []
    for i in places:
        site = noise.sites[i]
        rises = []
        for unit in range(site.width):
            e = torch.zeros_like(start[i])
            e.view(1 if site.tied else len(e), -1)[:, unit] = -1
            with torch.no_grad():
                outputs = noise(subject.x, (*start[:i], e, *start[i + 1 :]))
            rises.append(_row_losses(subject, outputs) - whole)
        measured, error = mean_and_error(torch.stack(rises, dim=1))
        check_finite(measured, f"the loss without a unit of {site.name!r}")
        check_error(tolerance, error, len(whole), "rows")
        found.append(
            SiteAblation(site.name, predicted.get(i), measured, error, _correlation(inputs[i], site.width))
        )
    curve = [_removed(subject, share, members, seed) for share in SHARES]
    parts = [site.predicted for site in found if site.predicted is not None]
    return Coadaptation(
        predicted=torch.cat(parts) if len(parts) == len(found) else None,
        measured=torch.cat([site.measured for site in found]),
        standard_error=torch.cat([site.standard_error for site in found]),
        formula=f"no formula: {subject.why}" if subject.smooth is None else "single removals to second order",
        loss=subject.loss.name,
        plain=subject.plain,
        sites=tuple(found),
        shares=SHARES,
        removed=torch.stack([mean for mean, _ in curve]),
        removed_error=torch.stack([error for _, error in curve]),
    )


def _row_losses(subject: Subject, outputs: Tensor) -> Tensor:
    losses = [subject.loss(outputs[i : i + 1], subject.y[i : i + 1]) for i in range(len(outputs))]
    return torch.stack(losses).double()


def _predicted(subject: Subject, seed: int) -> dict[int, Tensor]:
    noise = subject.smooth
    assert noise is not None
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    start = tuple(part.requires_grad_() for part in noise.none(like))
    slopes = torch.autograd.grad(
        subject.loss_of(noise(subject.x, start)), start, materialize_grads=True, allow_unused=True
    )
    curvatures = noise_curvatures(noise, subject.loss_of, subject.x, seed)
    found = {}
    for i, (site, slope, curvature) in enumerate(zip(noise.sites, slopes, curvatures, strict=True)):
        if site.width <= EXACT_WIDTH:
            first = slope.double() if site.tied else slope.double().sum(dim=0)
            found[i] = (0.5 * curvature.features - first).flatten()
    return found


def _removed(subject: Subject, share: float, members: int, seed: int) -> tuple[Tensor, Tensor]:
    """Loss with a share of all units set to 0, the same for all rows, and its error over members."""
    noise = subject.noise
    assert noise is not None
    like = subject.x if subject.x.is_floating_point() else torch.zeros(())
    losses = []
    with torch.no_grad():
        for k in range(members):
            drawn = []
            for site in noise.sites:
                one = (1, *site.shape[1:]) if not site.tied else site.shape
                with masks(seed=seed, member=k):
                    kept = multiply(
                        "bernoulli", torch.ones(one, dtype=torch.float64), share, (), site.name, None
                    ) * (1 - share)
                drawn.append((kept - 1).expand(site.shape).to(like))
            losses.append(subject.loss_of(noise(subject.x, drawn)).double())
    return mean_and_error(torch.stack(losses))


def _correlation(values: Tensor, width: int) -> float:
    """Mean size of the correlation between two units over rows; units that do not vary are left out."""
    if values.numel() != len(values) * width:
        values = values.flatten(2).mean(dim=2) if values.ndim > 2 and values.shape[1] == width else values
    units = values.double().flatten(1)
    if len(units) < 2:  # one value for all rows
        return float("nan")
    units = units[:, units.std(dim=0) > 0]
    if units.shape[1] < 2:
        return float("nan")
    matrix = torch.corrcoef(units.T).abs()
    count = len(matrix)
    return float((matrix.sum() - count) / (count * (count - 1)))
