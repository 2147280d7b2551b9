"""What an inspection says: of each site, of the model, and what to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from dropkit.measure.site_figures import Estimate
from dropkit.records import finite


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, and what to do.

    Attributes:
        rule: its name.
        site: where; empty for the model as a whole.
        weight: how many times its limit the figure surely is, at the near end of three standard errors; None where
            no figure is needed, as the model's structure shows it.
        message: what it is and what to do.
        source: who says so.
    """

    rule: str
    site: str
    weight: float | None
    message: str
    source: str


@dataclass(frozen=True, slots=True)
class SiteInspection:
    """One place where a mask acts. Figures are None where they cannot be had; `Inspection.skipped` says why.

    Attributes:
        site: its name.
        what: the class or function.
        where: file and line of a call; else empty.
        mode: "train" or "eval", of the module as it was given.
        rate: chance to drop.
        width: mask values of one row; None where the pass has not shown them.
        noise: at the layer, variance of noise over variance of signal.
        offset: at the layer, mean square over variance: 1 where the values are centred.
        reach: variance that its masks give the prediction, over the variance between rows.
        share: of the variance of the prediction under all masks.
        penalty: what its masks add to the loss.
        predicted: the same by formula.
        undone: penalty over what the model has learned.
        loud: features that pay more than three times the mean of the site, most first.
        loudest: share of the first of them.
        gradient: what its masks add to the variance of the minibatch gradient, over that without masks.
        bias: how far its masks move the mean gradient, over the plain one's length.
        norm: BatchNorm behind it that changes most; empty where there is none.
        shift: variance of what that BatchNorm reads in training over that in evaluation.
        dearest: unit whose loss costs most.
        cost: what it costs, in the loss.
        correlation: mean size of the correlation between two units.
        tied: whether all rows share the mask.
        reads_x: whether it stands on the model's input.
    """

    site: str
    what: str
    where: str
    mode: str
    rate: float | None
    width: int | None = None
    noise: Estimate | None = None
    offset: Estimate | None = None
    reach: Estimate | None = None
    share: Estimate | None = None
    penalty: Estimate | None = None
    predicted: float | None = None
    undone: Estimate | None = None
    loud: tuple[str, ...] = ()
    loudest: float | None = None
    gradient: Estimate | None = None
    bias: float | None = None
    norm: str = ""
    shift: Estimate | None = None
    dearest: str = ""
    cost: Estimate | None = None
    correlation: float | None = None
    tied: bool = False
    reads_x: bool = False


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """What concerns the model as a whole.

    Attributes:
        loss: name of the loss.
        plain: the loss without masks.
        constant: the loss of the best answer that is the same for all rows; None where there is none.
        gain: constant minus plain, error over rows; None likewise.
        penalty: what all masks together add to the loss.
        gradient: variance of the minibatch gradient over that without masks.
        batch: rows of that minibatch.
        gap: loss on new rows minus loss on these; None where no new rows were given.
        power: of the signal of the first time step that masks leave; None where nothing recurs.
    """

    loss: str
    plain: float
    constant: float | None
    gain: Estimate | None
    penalty: Estimate | None
    gradient: Estimate | None
    batch: int
    gap: Estimate | None
    power: Estimate | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What one instrument said.

    Attributes:
        instrument: its name in `dropkit.measure`.
        text: in words.
        formula: of its prediction, or why there is none.
        rows: how many it looked at.
    """

    instrument: str
    text: str
    formula: str
    rows: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """An instrument that does not apply to this model, or could not run, and why."""

    instrument: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What dropout does to one model on some rows, and what to do about it.

    Attributes:
        rows: how many were looked at.
        members: passes with masks.
        seed: of masks and choices of rows.
        figures: of the model as a whole.
        sites: site by site, in the order of the pass; those at rate 0 last.
        findings: what is wrong, weightiest first; empty where nothing is.
        readings: what the instruments said.
        skipped: what was not measured, and why.
    """

    rows: int
    members: int
    seed: int
    figures: ModelFigures
    sites: tuple[SiteInspection, ...]
    findings: tuple[Finding, ...]
    readings: tuple[Reading, ...]
    skipped: tuple[Skipped, ...]

    def to_text(self) -> str:
        """The page for a terminal."""
        from dropkit.measure.inspection_text import to_text

        return to_text(self)

    def to_json(self) -> str:
        """The record as JSON; null for what is not finite."""
        return json.dumps(finite(asdict(self)), indent=2, ensure_ascii=False)
