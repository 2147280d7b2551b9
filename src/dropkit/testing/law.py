"""What a dropout promises: which elements share a mask, what becomes of those that stay and of those that go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LawName = Literal["inverted", "classic", "alpha"]
Kind = Literal["elementwise", "channels", "rows", "batch", "auto"]

SELU_FLOOR = -1.7580993408473766  # where SELU saturates: -scale * alpha of Klambauer et al. 2017


@dataclass(frozen=True, slots=True)
class Law:
    """The noise law at every rate.

    y = slope(p) * x + offset(p) where kept, dropped(p) where not.

    Attributes:
        name: "inverted": scaled by 1 / (1 - p) while training, the mean is kept;
            "classic": not scaled while training, the mean is (1 - p) x;
            "alpha": keeps mean 0 and variance 1 of a standard normal input (Klambauer et al. 2017).
    """

    name: LawName

    def slope(self, p: float) -> float:
        """Factor of a kept element."""
        if self.name == "inverted":
            return 1 / (1 - p)
        if self.name == "alpha":
            return 1 / math.sqrt((1 - p) * (1 + p * SELU_FLOOR**2))
        return 1.0

    def offset(self, p: float) -> float:
        """What is added to a kept element."""
        return -self.slope(p) * SELU_FLOOR * p if self.name == "alpha" else 0.0

    def dropped(self, p: float) -> float:
        """The value of a dropped element, whatever it was."""
        return self.slope(p) * SELU_FLOOR + self.offset(p) if self.name == "alpha" else 0.0

    def keep_of_ones(self, y: Tensor, p: float) -> Tensor:
        """Which elements of an input of ones were kept, bool."""
        if self.name == "alpha":
            return y > (self.slope(p) + self.offset(p) + self.dropped(p)) / 2
        return y != 0

    def apply(self, x: Tensor, keep: Tensor, p: float) -> Tensor:
        """What the layer should have returned for x under this mask."""
        kept = x * self.slope(p) + self.offset(p) if self.name == "alpha" else x * self.slope(p)
        return kept.masked_fill(~keep, self.dropped(p))

    def mean(self, x: Tensor, p: float) -> Tensor:
        """Mean over the masks."""
        return (1 - p) * (self.slope(p) * x + self.offset(p)) + p * self.dropped(p)
