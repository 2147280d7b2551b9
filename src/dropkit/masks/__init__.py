"""Addressable masks: the ground floor. A mask is a pure function of its address."""

from dropkit.masks.address import masks

__all__ = ["masks"]
