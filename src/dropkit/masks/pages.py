"""Large pages for large results: the first touch of fresh memory is what a pass over it costs most."""

from __future__ import annotations

import ctypes
import mmap
import sys

# From about here on memory comes fresh from the system each time, in pages that must be made.
FRESH_BYTES = 1 << 24
_MADV_HUGEPAGE = 14
_PAGE = mmap.PAGESIZE
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def prefer_large_pages(address: int, size: int) -> None:
    """Ask the system to back fresh memory with large pages, whose first touch costs a tenth; it need not obey."""
    if _madvise is not None:
        first, last = -(-address // _PAGE) * _PAGE, (address + size) // _PAGE * _PAGE
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
