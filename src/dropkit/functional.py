"""The mathematics of every dropout kind, as functions; `dropkit.nn` has the layers around them."""

from dropkit.nn.alpha import alpha_dropout, feature_alpha_dropout
from dropkit.nn.attention import scaled_dot_product_attention
from dropkit.nn.features import dropout
from dropkit.nn.gaussian import exact_dropout, gaussian_dropout, uniform_dropout
from dropkit.nn.residual import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm

__all__ = [
    "alpha_dropout",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "exact_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "scaled_dot_product_attention",
    "uniform_dropout",
]
