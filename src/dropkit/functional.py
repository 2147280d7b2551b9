"""The mathematics of every dropout kind, as functions; `dropkit.nn` has the layers around them."""

from dropkit.nn.features import dropout

__all__ = ["dropout"]
