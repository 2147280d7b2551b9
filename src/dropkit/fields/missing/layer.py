"""The layer that takes rows with holes, and in training makes more of them by a mechanism."""

from __future__ import annotations

import torch
from torch import Tensor

from dropkit.errors import ShapeError
from dropkit.fields.missing.mechanisms import Mechanism
from dropkit.functional import dropout
from dropkit.nn.layer import StochasticLayer


class MissingInputs(StochasticLayer):
    """Fill what is missing, say where it was, and in training remove cells as a mechanism would.

    missing[b, j] = isnan(x[b, j]) or, in training, ~ Bernoulli(chance of the mechanism)
    y[b] = (x filled, missing as 0 and 1)

    Kept values are not scaled up: a missing cell at prediction time is not made good by the others either. With MCAR
    and without indicators this is classic feature dropout. Evaluation removes nothing, members included: their
    disagreement comes from the model's own masks.

    Args:
        fill: (D,) what stands in a hole; 0, the mean of standardised columns, where None.
        mechanism: by which cells go missing in training; None: only holes that are there.
        indicators: whether D columns of 0 and 1 follow, which say what was missing.

    Example:
        >>> layer = MissingInputs()
        >>> layer(torch.tensor([[1.5, float("nan")]]))
        tensor([[1.5000, 0.0000, 0.0000, 1.0000]])
    """

    fill: Tensor | None

    def __init__(
        self, fill: Tensor | None = None, mechanism: Mechanism | None = None, *, indicators: bool = True
    ) -> None:
        super().__init__()
        self.register_buffer("fill", fill)
        self.mechanism, self.indicators = mechanism, indicators

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, 2 D), or (B, D) without indicators.

        Raises:
            ShapeError: x has not the columns that the fill or the mechanism has.
        """
        if self.fill is not None and x.shape[-1:] != self.fill.shape:
            raise ShapeError(f"x of shape {tuple(x.shape)} was given; fill has {len(self.fill)} columns.")
        missing = torch.isnan(x)
        if self.training and self.mechanism is not None:
            chances = self.mechanism.chances(x)
            missing = missing | (dropout(torch.ones_like(x), chances, site=self.site, owner=self) == 0)
        fill = x.new_zeros(()) if self.fill is None else self.fill.to(x.dtype)
        filled = torch.where(missing, fill, x)
        return torch.cat((filled, missing.to(x.dtype)), dim=-1) if self.indicators else filled

    def extra_repr(self) -> str:
        """The mechanism and what is put out."""
        kind = None if self.mechanism is None else self.mechanism.kind
        return f"mechanism={kind}, indicators={self.indicators}"
