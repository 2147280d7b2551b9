"""Other noise on single features: Gaussian and uniform of the variance that dropout has, and an exact count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from dropkit.errors import ProbabilityError, check_probability
from dropkit.masks import noise_ops
from dropkit.masks.laws import LawName, multiply
from dropkit.nn.layer import RateLayer
from dropkit.nn.schedules import Schedule


def _noisy(
    law: LawName,
    x: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    shared: Sequence[int],
    site: str | None,
    owner: object | None,
) -> Tensor:
    """One of the laws that multiply x, at the address of this call."""
    p = _one_rate(p)
    if not isinstance(p, Tensor):
        p = check_probability(p)
        if law != "exact":
            noise_ops.spread(p, law)  # refuses p = 1
    if not training:
        return x
    result = multiply(law, x, p, shared, site, owner)
    return x.copy_(result) if inplace else result


def _one_rate(p: float | Tensor) -> float | Tensor:
    """Return the rate if it is one; these laws have no rate for each feature."""
    if isinstance(p, Tensor) and p.ndim:
        raise ProbabilityError(
            f"p of shape {tuple(p.shape)} was given; this noise has one rate for all elements. Give a number or a 0-d "
            "tensor, or take dropkit.nn.Dropout, which has a rate for each feature."
        )
    return p


def gaussian_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Multiply by Gaussian noise of mean 1 and the variance that dropout's mask has.

    y[b, e] = x[b, e] * (1 + sqrt(p / (1 - p)) * eps[b, e]),    eps[b, e] ~ N(0, 1)

    The noise is made in float64 by the method of Box and Muller from the bits of the address, the same to the last bit
    on every machine; the factor is rounded to the dtype of x (float32 for half precision), then multiplied.

    Args:
        x: (B, *features), any floating or complex dtype; dim 0 counts the rows.
        p: the rate of the dropout whose variance this has, in [0, 1); a number, or a 0-d tensor.
        training: False gives x back.
        inplace: write the result into x.
        shared: dims along which one value serves all; with 0 among them, all rows.
        site: name of this place in the model; by default its order in the pass.
        owner: the layer that asks, which may ask more than once in a pass.

    Returns:
        (B, *features), dtype, device and memory format of x.

    Raises:
        ProbabilityError: p is outside [0, 1); at 1 the variance is infinite.
        ShapeError: a shared dim that x does not have, or samples that are not one for each row.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: Srivastava et al. 2014, JMLR 15, section 10 (there p is the chance to keep); Wang and Manning 2013, ICML.
    """
    return _noisy("gaussian", x, p, training, inplace, shared, site, owner)


def uniform_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Multiply by uniform noise of mean 1 and the variance that dropout's mask has.

    y[b, e] = x[b, e] * u[b, e],    u[b, e] ~ U(1 - w, 1 + w),    w = sqrt(3 p / (1 - p))

    Above p = 1/4 the factor may be negative.

    Args:
        x, p, training, inplace, shared, site, owner: as in `gaussian_dropout`.

    Returns:
        (B, *features), dtype, device and memory format of x.

    Raises:
        ProbabilityError: p is outside [0, 1); at 1 the variance is infinite.
        ShapeError: a shared dim that x does not have, or samples that are not one for each row.
        AddressError: the same address was drawn twice in one `masks` context.

    Source: the uniform case of multiplicative noise, Srivastava et al. 2014, JMLR 15, section 10.
    """
    return _noisy("uniform", x, p, training, inplace, shared, site, owner)


def exact_dropout(
    x: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    shared: Sequence[int] = (),
    site: str | None = None,
    owner: object | None = None,
) -> Tensor:
    """Drop exactly k = round(p n) of the n elements of each row's mask, and scale what stays so that the mean is kept.

    y[b, e] = x[b, e] * keep[b, e] * n / (n - k),    keep[b] uniform over the masks with n - k ones

    Every set of k elements is equally likely, so each element is dropped with chance k / n. A half is rounded to the
    even number. With all dropped, the result is 0. A dropped NaN or infinity is 0, and its gradient is 0.

    Args:
        x, training, inplace, shared, site, owner: as in `gaussian_dropout`; n counts the elements of one row's mask,
            so shared dims count once, and for a committee member the mask of all rows is one.
        p: share to drop, in [0, 1]; a number, or a 0-d tensor.

    Returns:
        (B, *features), dtype, device and memory format of x.

    Raises:
        ProbabilityError: p is outside [0, 1].
        ShapeError: a shared dim that x does not have, or samples that are not one for each row.
        AddressError: the same address was drawn twice in one `masks` context.
    """
    return _noisy("exact", x, p, training, inplace, shared, site, owner)


class _NoiseLayer(RateLayer):
    """Parent of the three layers below; never built itself."""

    law: ClassVar[LawName]

    def __init__(self, p: float | Tensor | Schedule = 0.5, inplace: bool = False) -> None:
        super().__init__(p if isinstance(p, Schedule) else _one_rate(p), inplace)
        if self.law != "exact":
            for rate in p.rates if isinstance(p, Schedule) else (p,):
                noise_ops.spread(float(rate), self.law)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *features) -> the same shape."""
        return _noisy(self.law, x, self.rate, self.active, self.inplace, (), self.site, self)


class GaussianDropout(_NoiseLayer):
    """Layer around `gaussian_dropout`; the identity while nobody asks for noise.

    Args:
        p: the rate of the dropout whose variance the noise has, in [0, 1).
        inplace: write the result into the input.
    """

    law = "gaussian"


class UniformDropout(_NoiseLayer):
    """Layer around `uniform_dropout`; the identity while nobody asks for noise.

    Args:
        p: the rate of the dropout whose variance the noise has, in [0, 1).
        inplace: write the result into the input.
    """

    law = "uniform"


class ExactDropout(_NoiseLayer):
    """Layer around `exact_dropout`: exactly round(p n) of a row's n elements fall.

    Args:
        p: share to drop, in [0, 1].
        inplace: write the result into the input.
    """

    law = "exact"
