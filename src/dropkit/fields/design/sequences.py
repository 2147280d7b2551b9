"""Sequences of letters as rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dropkit.errors import OptionError, ShapeError

ALPHABETS = {"dna": "ACGT", "rna": "ACGU", "protein": "ACDEFGHIKLMNPQRSTVWY"}


def one_hot(sequences: Sequence[str], alphabet: str = "dna") -> NDArray[np.float32]:
    """Each letter as a 1 among zeros.

    Args:
        sequences: N texts of one length L; capitals and small letters are one.
        alphabet: "dna", "rna", "protein", or the letters themselves.

    Returns:
        (N, L * letters) float32.

    Raises:
        ShapeError: no sequence, or lengths that differ.
        OptionError: a letter that the alphabet does not have.

    Example:
        >>> one_hot(["AC"]).tolist()
        [[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
    """
    letters = ALPHABETS.get(alphabet, alphabet)
    lengths = {len(s) for s in sequences}
    if len(lengths) != 1 or 0 in lengths:
        raise ShapeError(
            f"Sequences of lengths {sorted(lengths)} were given; all have one length, at least 1."
        )
    whole = "".join(sequences).upper()
    strange = sorted(set(whole) - set(letters))
    if strange:
        raise OptionError(f"The letters {''.join(strange)!r:.60} were given; the alphabet is {letters!r}.")
    number = {letter: i for i, letter in enumerate(letters)}
    codes = np.array([number[letter] for letter in whole], np.int64)
    return np.eye(len(letters), dtype=np.float32)[codes].reshape(len(sequences), -1)
