"""The committee as a BoTorch model, so that every acquisition function of BoTorch works over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropkit.committee import Committee
from dropkit.errors import MissingPackageError, ShapeError
from dropkit.masks import masks


def dropout_model(committee: Committee, *, outputs: int = 1) -> Any:
    """A `botorch.models.ensemble.EnsembleModel` whose members are the committee's.

    forward(X): (*batch, q, D) -> (*batch, M, q, outputs). A member is one function of X, so acquisition values are
    smooth where the network is, and can be climbed by their gradient.

    Args:
        committee: of a network that gives (B, K >= outputs), or (B,), numbers; the first `outputs` are objectives (for
            a mean and log variance: the mean).
        outputs: objectives.

    Raises:
        MissingPackageError: BoTorch is not installed.
        ShapeError: when it is asked, and the network gives fewer numbers.
    """
    try:
        from botorch.models.ensemble import EnsembleModel
    except ImportError:
        raise MissingPackageError('dropout_model needs BoTorch: pip install "dropkit[design]"') from None

    class DropoutModel(EnsembleModel):
        """Members of a committee as samples of a posterior."""

        def __init__(self) -> None:
            super().__init__()
            self.network = committee.network
            self._num_outputs = outputs

        def forward(self, X: Tensor) -> Tensor:
            """(*batch, q, D) -> (*batch, M, q, outputs)."""
            rows = X.reshape(-1, X.shape[-1])
            found = []
            for member in range(committee.members):
                with masks(seed=committee.seed, member=member):
                    answer = self.network(rows)
                answer = answer[:, None] if answer.ndim == 1 else answer
                if answer.ndim != 2 or answer.shape[1] < outputs:
                    raise ShapeError(
                        f"The network gives {tuple(answer.shape)}; it is (B rows, at least {outputs} outputs)."
                    )
                found.append(answer[:, :outputs].reshape(*X.shape[:-1], outputs))
            return torch.stack(found, dim=-3)

    return DropoutModel()
