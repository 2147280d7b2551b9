"""What a layer takes, said with axes by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dropkit.errors import OptionError, ShapeError

SPACE = {1: "L", 2: "H W", 3: "D H W"}  # the names of the dims of space, as torch.nn has them


def image_axes(space: int, channels_last: bool = False, batched: bool = True) -> str:
    """The axes of maps with so many dims of space, such as "B C H W"."""
    if space not in SPACE:
        raise OptionError(f"space={space!r} was given; 1, 2 or 3 dims of space are known.")
    inner = f"{SPACE[space]} C" if channels_last else f"C {SPACE[space]}"
    return f"B {inner}" if batched else inner


def check_axes(x: Tensor, *allowed: str, hint: str = "") -> None:
    """Say what is wrong with a tensor whose dims or dtype do not fit.

    Args:
        x: what was given.
        allowed: axes, one letter or word a dim: "B C H W". "..." stands for any number of dims.
        hint: what to do where the dims do not fit.

    Raises:
        ShapeError: another number of dims.
        OptionError: whole numbers or switches, which noise cannot scale.
    """
    counts = [(len(axes.split()), "..." in axes) for axes in allowed]
    if not any(x.ndim >= n - 1 if is_open else x.ndim == n for n, is_open in counts):
        wanted = " or ".join(f"({', '.join(axes.split())})" for axes in allowed)
        raise ShapeError(f"x of shape {tuple(x.shape)} was given; allowed: {wanted}. {hint}".rstrip())
    if not (x.is_floating_point() or x.is_complex()):
        raise OptionError(f"x of {x.dtype} was given; noise needs a floating or complex dtype: x.float().")


def check_size(size: int, name: str = "size") -> int:
    """Return a side length in pixels, or say what is wrong with it.

    Raises:
        OptionError: not a whole number from 1 on.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise OptionError(f"{name}={size!r} was given; a side is a whole number of pixels from 1 on.")
    return size


def spatial_sizes(sizes: int | Sequence[int], space: int, name: str) -> tuple[int, ...]:
    """One side for each dim of space.

    Raises:
        OptionError: not a whole number from 1 on, or not one for each dim.
    """
    many = (sizes,) * space if isinstance(sizes, int) else tuple(sizes)
    if len(many) != space:
        raise OptionError(
            f"{name}={sizes!r} was given; one number, or one for each of {space} dims, is needed."
        )
    return tuple(check_size(size, name) for size in many)
