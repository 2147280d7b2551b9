"""Sets of classes that hold the seen class as often as they say (split conformal prediction)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from dropkit.committee.calibrate import check_levels, conformal_rank, read_count, read_number, rows_needed
from dropkit.committee.information import check_class_probabilities
from dropkit.committee.prediction import ClassificationPrediction, check_rows, pick_class
from dropkit.committee.summary import ClassificationSummary
from dropkit.errors import ModelDirectoryError, OptionError, ShapeError
from dropkit.masks.address import masks
from dropkit.nn.uniform import uniform_numbers

Score = Literal["least", "adaptive"]
SITE = "dropkit.committee.conformal_sets"


@dataclass(frozen=True, slots=True)
class ClassSets:
    """A set of classes for each row.

    Attributes:
        included: (B, C) bool.
    """

    included: Tensor

    @property
    def size(self) -> Tensor:
        """(B,) int64, classes in each set; 0 where no class is likely enough ("least" only)."""
        return self.included.sum(dim=-1)

    def covers(self, y: Tensor) -> int:
        """How many rows' classes lie in their sets.

        Raises:
            ShapeError, OptionError: y is not (B,) class indices.
        """
        return int(pick_class(self.included, y).sum())


@dataclass(frozen=True, slots=True)
class ConformalSet:
    """Sets that hold the seen class with at least a chance of `level`, whatever the model's mistakes.

    A class is in the set where its score is at most the threshold: the k-th smallest score of the seen classes of n
    fitting rows, k = ceil((n + 1) * level). With p the calibrated probabilities:

        "least" (LAC):     s[c] = 1 - p[c];                  the smallest sets on average, some of them empty
        "adaptive" (APS):  s[c] = sum over k likelier than c of p[k] + u p[c];    hard rows get larger sets

    u is a number in (0, 1) from each row's own address where a seed is given; the coverage is then between level and
    level + 1 / (n + 1), and a very sure row's set may be empty. Without a seed u is 0: no chance, the likeliest class
    is always in the set, and where many rows tie at 0, being predicted rightly, sets cover more often than they say.
    The promise holds on average over fitting sets and new rows that were drawn alike, for all rows together, not for
    each class or kind of row by itself.

    Attributes:
        levels: for which levels, ascending.
        thresholds: one for each level.
        rows: n.
        score: "least" or "adaptive".
        seed: of the numbers u; None for u = 0.

    Source: Sadinle, Lei and Wasserman 2019, JASA 114, 223-234 (least ambiguous); Romano, Sesia and Candès 2020,
        arXiv:2006.02544 (adaptive).
    """

    levels: tuple[float, ...]
    thresholds: tuple[float, ...]
    rows: int
    score: Score = "adaptive"
    seed: int | None = None

    @classmethod
    def fit(
        cls,
        prediction: ClassificationPrediction | ClassificationSummary,
        y: Tensor,
        level: float | Sequence[float] = 0.9,
        *,
        score: Score = "adaptive",
        seed: int | None = None,
        ids: Tensor | None = None,
    ) -> ConformalSet:
        """Find the thresholds on rows that trained nothing and, strictly, chose no temperature.

        Args:
            prediction: of those rows, with the temperature it will have.
            y: (B,) class indices.
            level: one or several.
            score: "least" or "adaptive".
            seed: of the adaptive scores' numbers u.
            ids: (B,) int64 of the rows, for u; by default 0, 1, ... New rows must have other ids than these.

        Raises:
            ShapeError: y does not belong to the prediction.
            OptionError: a level is not inside (0, 1), there are too few rows for it, or an unknown score.
        """
        levels = check_levels(level)
        if score not in get_args(Score):
            raise OptionError(f"score={score!r} was given; it is one of {', '.join(get_args(Score))}.")
        probabilities = prediction.probabilities.detach().double()
        check_class_probabilities(probabilities, axes="B C")
        check_rows(y, probabilities.shape[:1])
        rows = len(y)
        if rows < rows_needed(levels[-1]):
            raise OptionError(
                f"{rows} rows were given; a conformal set at level {levels[-1]} takes {rows_needed(levels[-1])}."
            )
        scores = pick_class(class_scores(probabilities, score, seed, ids), y).sort().values
        thresholds = tuple(float(scores[conformal_rank(rows, v) - 1]) for v in levels)
        return cls(levels, thresholds, rows, score, seed)

    def threshold(self, level: float = 0.9) -> float:
        """The threshold fitted for this level.

        Raises:
            OptionError: it was not fitted for this level.
        """
        if level not in self.levels:
            raise OptionError(
                f"level={level!r} was given; this calibration was fitted for {list(self.levels)}."
            )
        return self.thresholds[self.levels.index(level)]

    def sets(
        self,
        prediction: ClassificationPrediction | ClassificationSummary,
        level: float = 0.9,
        *,
        ids: Tensor | None = None,
    ) -> ClassSets:
        """The sets of new rows.

        Args:
            prediction: of new rows, with the temperature of the fit.
            level: one of those fitted.
            ids: (B,) int64 of the rows, where there is a seed; by default they follow those of the fitting rows.

        Raises:
            OptionError: it was not fitted for this level.
        """
        probabilities = prediction.probabilities.detach().double()
        if ids is None:
            ids = torch.arange(self.rows, self.rows + len(probabilities))
        scores = class_scores(probabilities, self.score, self.seed, ids)
        return ClassSets(scores <= self.threshold(level))

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        data = asdict(self)
        return {**data, "levels": list(self.levels), "thresholds": list(self.thresholds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConformalSet:
        """From what `to_json` gave; the data is not trusted.

        Raises:
            ModelDirectoryError: a field is missing, of another type, or out of range.
        """
        levels, thresholds = (
            data.get(k) if isinstance(data, Mapping) else None for k in ("levels", "thresholds")
        )
        if (
            not isinstance(levels, list)
            or not isinstance(thresholds, list)
            or not 0 < len(levels) == len(thresholds)
        ):
            raise ModelDirectoryError("the sets' levels and thresholds are not two lists of one length.")
        numbers = tuple(read_number({"level": v}, "level", low=0.0, high=1.0) for v in levels)
        if list(numbers) != sorted(set(numbers)) or not 0.0 < numbers[0] or not numbers[-1] < 1.0:
            raise ModelDirectoryError(f"the sets' levels are {levels}; they ascend, between 0 and 1.")
        limits = tuple(read_number({"threshold": v}, "threshold", low=0.0, high=1.5) for v in thresholds)
        score, seed = data.get("score"), data.get("seed")
        if score not in get_args(Score):
            raise ModelDirectoryError(
                f"the sets' score={score!r}; it is one of {', '.join(get_args(Score))}."
            )
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64
        ):
            raise ModelDirectoryError(
                f"the sets' seed={seed!r}; a whole number from 0 to 2^64 - 1 or null was expected."
            )
        return cls(numbers, limits, read_count(data, "rows"), cast(Score, score), seed)


def class_scores(
    probabilities: Tensor, score: Score, seed: int | None = None, ids: Tensor | None = None
) -> Tensor:
    """How far down each class stands, as `ConformalSet` has it: the smaller, the sooner it is in the set.

    Args:
        probabilities: (B, C) float64. Equal ones are ordered by class.
        score: "least" or "adaptive".
        seed: of u; None for u = 0.
        ids: (B,) int64 row ids, for u; by default 0, 1, ...

    Returns:
        (B, C) float64, in [0, 1] but for rounding.
    """
    if score == "least":
        return 1.0 - probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    share: Tensor | float = 0.0
    if seed is not None:
        rows = torch.arange(len(probabilities)) if ids is None else ids.cpu()
        if rows.shape != (len(probabilities),):
            raise ShapeError(
                f"ids of shape {tuple(rows.shape)} were given for {len(probabilities)} rows; (B,)."
            )
        with masks(seed=seed, samples=rows):
            share = uniform_numbers((len(rows), 1), site=SITE).to(probabilities.device)
    # What stands above a class, plus its own share: not the sum less the rest, which would cancel.
    above = torch.cat((torch.zeros_like(ordered[:, :1]), ordered.cumsum(dim=-1)[:, :-1]), dim=-1)
    return torch.empty_like(ordered).scatter_(-1, order, above + share * ordered)
