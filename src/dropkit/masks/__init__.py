"""Addressable masks: the ground floor. A mask is a pure function of its address."""

from dropkit.masks import anywhere, gpu  # noqa: F401  # they register the operators for other devices than the CPU
from dropkit.masks.address import masks

__all__ = ["masks"]
