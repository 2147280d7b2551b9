"""Make what a committee says agree with what was seen, on rows it was not trained on.

`Temperature` and `ConformalInterval` are fitted on held-out rows and applied to new ones; `reliability.py` measures
how far they get. Both are frozen records of plain numbers, ready for JSON.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from dropkit.committee.information import check_class_probabilities
from dropkit.committee.prediction import (
    ClassificationPrediction,
    Interval,
    RegressionPrediction,
    check_level,
    check_rows,
    pick_class,
    temper,
)
from dropkit.committee.summary import RegressionSummary
from dropkit.errors import ModelDirectoryError, OptionError, ShapeError

TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True, slots=True)
class Temperature:
    """One number that sharpens or flattens class probabilities until held-out rows are as likely as can be.

    The members' probabilities are averaged first and the average is tempered: q ** (1 / T), scaled to sum to 1.
    So no label changes, and the loss is convex in 1 / T: one minimum. (Members that were each calibrated
    would give an average that is not sure enough.)

    Attributes:
        temperature: T; above 1 the average was too sure, below 1 not sure enough. It stays 1 where the gain in
            likelihood is within one standard error (paired by row): few rows cannot tell T from 1.
        before: negative log-likelihood of the fitting rows at T = 1, nats per row.
        after: the same at T; never more than before.
        rows: how many rows it was fitted on.

    Source: Guo et al. 2017, arXiv:1706.04599, sec. 4.2; the order, average then temper:
        Rahaman and Thiery 2020, arXiv:2007.08792.
    """

    temperature: float
    before: float
    after: float
    rows: int

    @classmethod
    def fit(cls, prediction: ClassificationPrediction, y: Tensor) -> Temperature:
        """Find T in [0.05, 20] on rows the network was not trained on.

        Args:
            prediction: of those rows, uncalibrated.
            y: (B,) their class indices.

        Raises:
            ShapeError, OptionError: y does not belong to the prediction, there are no rows, or a temperature
                has been applied already.
        """
        if prediction.temperature != 1.0:
            raise OptionError(
                f"a prediction at temperature {prediction.temperature} was given; fit on one at 1."
            )
        mean = prediction.samples.detach().mean(dim=0, dtype=torch.float64)
        check_rows(y, mean.shape[:1])
        if y.numel() == 0:
            raise ShapeError("no rows were given; a temperature is fitted on at least one held-out row.")
        best = best_temperature(mean, y)
        before, after = (_negative_log_likelihoods(mean, y, t) for t in (1.0, best))
        gain = before - after
        # A gain within its own standard error is what chance gives: on few rows T would follow the noise.
        if len(gain) < 2 or not float(gain.mean()) > float(gain.std()) / len(gain) ** 0.5:
            best, after = 1.0, before
        return cls(best, float(before.mean()), float(after.mean()), rows=y.numel())

    def apply(self, prediction: ClassificationPrediction) -> ClassificationPrediction:
        """The same members with calibrated probabilities."""
        return replace(prediction, temperature=self.temperature)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Temperature:
        """From what `to_json` gave; the data is not trusted.

        Raises:
            ModelDirectoryError: a field is missing or out of range.
        """
        temperature = read_number(data, "temperature", low=TEMPERATURES[0], high=TEMPERATURES[1])
        before, after = (read_number(data, key, low=0.0) for key in ("before", "after"))
        return cls(temperature, before, after, rows=read_count(data, "rows"))


def best_temperature(probabilities: Tensor, y: Tensor) -> float:
    """The T in [0.05, 20] under which the seen classes are likeliest.

    With b = 1 / T:  d NLL / d b = mean over rows of (sum over c of p_b[c] log p[c]) - log p[y],
    which never falls as b rises, so halving finds its zero.

    Args:
        probabilities: (B, C), at T = 1.
        y: (B,) class indices.
    """
    check_class_probabilities(probabilities, axes="B C")
    log_p = probabilities.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    seen = pick_class(log_p, y).mean()

    def slope(b: float) -> float:
        return float((torch.softmax(log_p * b, dim=-1) * log_p).sum(dim=-1).mean() - seen)

    low, high = (1.0 / t for t in reversed(TEMPERATURES))
    if slope(low) >= 0.0:
        return TEMPERATURES[1]
    if slope(high) <= 0.0:
        return TEMPERATURES[0]
    for _ in range(40):  # of a range of e ** 6: to 5e-12
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0.0 else (middle, high)
    return min(max(1.0 / math.sqrt(low * high), TEMPERATURES[0]), TEMPERATURES[1])


@dataclass(frozen=True, slots=True)
class ConformalInterval:
    """Intervals that hold the seen value as often as they say, whatever the model's mistakes (split conformal).

    The fitting rows are scored by |y - mean| / std, with std the square root of `total`; an interval is
    mean +- factor * std with factor the k-th smallest score, k = ceil((n + 1) * level). Then

        level <= P(lower <= y <= upper) <= level + 1 / (n + 1)

    (the right side where scores are not tied), on average over fitting sets and new rows, on the condition that
    the fitting rows and the new row are exchangeable: drawn alike, none of them used to train or choose the model.
    It holds over all rows together, not for each kind of row by itself.

    Attributes:
        levels: for which levels, ascending.
        factors: one for each level; an interval's half width in units of `std`.
        rows: n.
        normalised: False where std was 0 on every fitting row; the factors are then in the output's unit.

    Source: Lei et al. 2018, arXiv:1604.04173, sec. 2.2 and 5.2.
    """

    levels: tuple[float, ...]
    factors: tuple[float, ...]
    rows: int
    normalised: bool = True

    @classmethod
    def fit(
        cls, prediction: RegressionPrediction, y: Tensor, level: float | Sequence[float] = 0.9
    ) -> ConformalInterval:
        """Find the factors on rows the network was not trained on.

        Args:
            prediction: of those rows; one output.
            y: (B,) or (B, 1) like the prediction's mean, in its unit.
            level: one or several.

        Raises:
            ShapeError: y does not belong to the prediction, or there are several outputs (fit one each).
            OptionError: a level is not inside (0, 1), or there are too few rows for it (see `rows_needed`).
        """
        levels = check_levels(level)
        mean, std = prediction.mean.detach().double(), prediction.std.detach().double()
        check_rows(y, mean.shape)
        rows = y.shape[0]
        if y.numel() != rows:
            raise ShapeError(
                f"{y.numel() // max(rows, 1)} outputs were given; a conformal interval is fitted for one."
            )
        needed = rows_needed(levels[-1])
        if rows < needed:
            best = f" {rows} rows allow levels up to {rows / (rows + 1):.3f}." if rows else ""
            raise OptionError(
                f"{rows} rows were given; a conformal interval at level {levels[-1]} takes {needed}.{best}"
            )
        normalised = bool((std > 0).any())
        residual = (y.detach().to(mean) - mean).abs().flatten()
        if not bool(torch.isfinite(residual).all()):
            raise OptionError(
                "a value or a prediction that is not finite was given; scores are finite numbers."
            )
        # 0 / 0 is a row predicted exactly and surely: its score is 0.
        scores = torch.where(residual == 0, 0.0, residual / std.flatten()) if normalised else residual
        ordered = scores.sort().values
        factors = tuple(float(ordered[conformal_rank(rows, v) - 1]) for v in levels)
        return cls(levels=levels, factors=factors, rows=rows, normalised=normalised)

    def factor(self, level: float = 0.9) -> float:
        """The factor fitted for this level.

        Raises:
            OptionError: it was not fitted for this level.
        """
        if level not in self.levels:
            raise OptionError(
                f"level={level!r} was given; this calibration was fitted for {list(self.levels)}."
            )
        return self.factors[self.levels.index(level)]

    def interval(self, prediction: RegressionPrediction | RegressionSummary, level: float = 0.9) -> Interval:
        """mean +- factor * std for new rows, in the unit of the output.

        Raises:
            OptionError: it was not fitted for this level.
        """
        factor = self.factor(level)
        if self.normalised:
            return prediction.interval(factor=factor)
        mean = prediction.mean
        return Interval(mean - factor, mean + factor)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain numbers; an infinite factor is written as null."""
        data = asdict(self)
        data["levels"] = list(self.levels)
        data["factors"] = [f if math.isfinite(f) else None for f in self.factors]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConformalInterval:
        """From what `to_json` gave; the data is not trusted.

        Raises:
            ModelDirectoryError: a field is missing, of another type, or out of range.
        """
        if not isinstance(data, Mapping):
            raise ModelDirectoryError(f"the intervals are {type(data).__name__}; a mapping was expected.")
        levels, factors, normalised = (data.get(key) for key in ("levels", "factors", "normalised"))
        if (
            not isinstance(levels, list)
            or not isinstance(factors, list)
            or len(levels) != len(factors)
            or not levels
        ):
            raise ModelDirectoryError("the intervals' levels and factors are not two lists of one length.")
        if not isinstance(normalised, bool):
            raise ModelDirectoryError(f"the intervals' normalised={normalised!r}; it is true or false.")
        checked = tuple(read_number({"level": v}, "level", low=0.0, high=1.0) for v in levels)
        if list(checked) != sorted(set(checked)) or not 0.0 < checked[0] or not checked[-1] < 1.0:
            raise ModelDirectoryError(f"the intervals' levels are {levels}; they ascend, between 0 and 1.")
        numbers = tuple(
            math.inf if f is None else read_number({"factor": f}, "factor", low=0.0) for f in factors
        )
        return cls(checked, numbers, rows=read_count(data, "rows"), normalised=normalised)


def rows_needed(level: float) -> int:
    """Least number of fitting rows for a finite conformal interval: the smallest n with ceil((n + 1) * level) <= n."""
    exact = Fraction(str(check_level(level)))
    return math.ceil(exact / (1 - exact))


def check_levels(level: float | Sequence[float]) -> tuple[float, ...]:
    """One level or several, ascending.

    Raises:
        OptionError: there is none, or one is not inside (0, 1).
    """
    levels = tuple(sorted({check_level(v) for v in ([level] if isinstance(level, int | float) else level)}))
    if not levels:
        raise OptionError("no level was given; give at least one, as in level=0.9.")
    return levels


def conformal_rank(rows: int, level: float) -> int:
    """Which of n scores, from the smallest, is the threshold: ceil((n + 1) * level)."""
    # 0.07 * 100 is 7.000000000000001 in floating point and would be rounded up to 8; the level as written is exact.
    return math.ceil((rows + 1) * Fraction(str(level)))


def _negative_log_likelihoods(mean: Tensor, y: Tensor, temperature: float) -> Tensor:
    chosen = pick_class(temper(mean, temperature), y)
    return -chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log()


def read_number(
    data: Mapping[str, Any], key: str, low: float = 0.0, high: float = sys.float_info.max
) -> float:
    """A number of a calibration's JSON, or what is wrong with it.

    Raises:
        ModelDirectoryError: it is missing, no number, or outside [low, high].
    """
    value = data.get(key) if isinstance(data, Mapping) else None
    # The bounds are finite, so infinities, NaN and whole numbers beyond any float fail too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ModelDirectoryError(
            f"the calibration's {key}={value!r}; a number from {low:g} to {high:g} was expected."
        )
    return float(value)


def read_count(data: Mapping[str, Any], key: str) -> int:
    """A whole number from 1 on of a calibration's JSON; raises like `read_number`."""
    value = read_number(data, key, low=1)
    if value != int(value):
        raise ModelDirectoryError(f"the calibration's {key}={value!r}; a whole number was expected.")
    return int(value)
