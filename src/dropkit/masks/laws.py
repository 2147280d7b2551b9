"""x times the noise of one law, at the address of the next draw: the one way from a layer to the kernels.

bernoulli   0 with chance p, else 1 / (1 - p)
gaussian    1 + sqrt(p / (1 - p)) eps,   eps ~ N(0, 1)
uniform     U(1 - w, 1 + w),             w = sqrt(3 p / (1 - p))
exact       0 for exactly round(p n) of the n elements of a mask, else n / (n - round(p n))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dropkit.errors import OptionError
from dropkit.masks import address, compiled, noise_ops, ops

LawName = Literal["bernoulli", "gaussian", "uniform", "exact"]


def multiply(
    law: LawName,
    x: Tensor,
    p: float | Tensor,
    shared: Sequence[int],
    site: str | None,
    owner: object | None,
) -> Tensor:
    """x times the law's noise, drawn from the open context or from torch's generator.

    Args:
        law: which noise.
        x: (B, *features).
        p: the rate, checked; a number, a 0-d tensor, or for Bernoulli noise one that broadcasts against x.
        shared: dims along which one value serves all; 0 is added where the context asks for a committee member.
        site, owner: as in `address.draw`.

    Returns:
        (B, *features); x itself where p is the number 0.

    Raises:
        OptionError: x holds whole numbers or switches.
        ShapeError: a shared dim that x does not have, or samples that are not one for each row.
        AddressError: the same address was drawn twice in one `masks` context.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise OptionError(f"x of {x.dtype} was given; noise needs a floating or complex dtype: x.float().")
    if torch.compiler.is_compiling():
        dims = ops.normalise_shared(shared, x.ndim)
        rate = torch.as_tensor(p, dtype=torch.float64)
        if law == "bernoulli":
            return compiled.dropout(x, rate, dims, site, owner is not None)
        return noise_ops.compiled_noise(x, rate, dims, law, site, owner is not None)
    where = address.draw(owner, site, address.NOISE if law == "bernoulli" else noise_ops.PURPOSES[law])
    if not isinstance(p, Tensor) and p == 0:
        return x  # as torch does; and under vmap a tensor that no mask touches stays unbatched
    if where.batch_shared and x.ndim:
        shared = (0, *shared)
    dims = ops.normalise_shared(shared, x.ndim)
    if law != "bernoulli":
        rate = torch.as_tensor(p, dtype=torch.float64)
        return noise_ops.noise(x, *where.tensors(), rate, *where[2:5], dims, law)
    return ops.dropout(x, where.key, where.member, p, *where[2:5], dims)
