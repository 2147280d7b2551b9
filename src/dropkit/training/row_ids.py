"""Row ids from the sampler: a data set that says with each item which one it is.

A sampler, be it torch's own, a DistributedSampler or one that a trainer puts around it, deals out numbers of rows;
which worker gets which is its affair. Handed on beside the item, the number is all that a mask needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset, IterableDataset

from dropkit.errors import OptionError

Item = TypeVar("Item")


class WithRowIds(Dataset[tuple[int, Item]], Generic[Item]):
    """A data set whose items come with their numbers: (id, item).

    The usual collation makes an int64 tensor (B,) of the ids, ready for `dk.masks(samples=ids)`. Put it around the
    whole data set, before it is divided (`Subset`, `random_split`), so that a row keeps its id in whichever part it is.

    Args:
        dataset: with a length and items by number.

    Raises:
        OptionError: an IterableDataset, whose items have no numbers.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from dropkit.training import WithRowIds
        >>> rows = WithRowIds(TensorDataset(torch.randn(6, 3)))
        >>> loader = DataLoader(rows, batch_size=4, sampler=[5, 0, 3, 1, 2, 4])
        >>> [ids.tolist() for ids, (x,) in loader]
        [[5, 0, 3, 1], [2, 4]]
    """

    def __init__(self, dataset: Dataset[Item]) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise OptionError(
                f"a {type(dataset).__name__} was given, whose items have no numbers. Let it yield an id of its own "
                "with each item, the same in every run."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Item]:
        number = int(index)
        return number + len(self) if number < 0 else number, self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        """Several at once, as torch's loader asks; by the data set's own way where it has one."""
        several = getattr(self.dataset, "__getitems__", None)
        items = several(indices) if several is not None else [self.dataset[i] for i in indices]
        return list(zip(map(int, indices), items, strict=True))
