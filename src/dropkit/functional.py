"""The mathematics of every dropout kind, as functions; `dropkit.nn` has the layers around them."""

from dropkit.nn.alpha import alpha_dropout, feature_alpha_dropout
from dropkit.nn.attention import scaled_dot_product_attention
from dropkit.nn.batchwise import thinned_map
from dropkit.nn.block_rate import drop_block_gamma, drop_block_kept
from dropkit.nn.blocks import drop_block
from dropkit.nn.classic import classic_dropout
from dropkit.nn.concrete import concrete_dropout, concrete_regularisation
from dropkit.nn.cutout import cutout
from dropkit.nn.edges import drop_edge, drop_edge_path, edge_mask
from dropkit.nn.embedding import embedding_dropout
from dropkit.nn.features import dropout
from dropkit.nn.gaussian import exact_dropout, gaussian_dropout, uniform_dropout
from dropkit.nn.graphs import drop_feature, drop_message, drop_node
from dropkit.nn.heads import attention_dropout, drop_key, head_dropout
from dropkit.nn.images import channel_dropout
from dropkit.nn.masksembles import masksembles, overlapping_masks
from dropkit.nn.patches import kept_patches, patch_dropout, take_patches
from dropkit.nn.paths import drop_path, stochastic_depth
from dropkit.nn.residual import dropout_add, dropout_add_layer_norm, dropout_add_rms_norm
from dropkit.nn.sequences import locked_dropout, token_dropout, word_dropout
from dropkit.nn.shake_drop import shake_drop
from dropkit.nn.targeted import targeted_dropout
from dropkit.nn.variational import variational_divergence, variational_dropout
from dropkit.nn.weights import drop_connect, drop_connect_moments
from dropkit.nn.zoneout import zoneout

__all__ = [
    "alpha_dropout",
    "attention_dropout",
    "channel_dropout",
    "classic_dropout",
    "concrete_dropout",
    "concrete_regularisation",
    "cutout",
    "drop_block",
    "drop_block_gamma",
    "drop_block_kept",
    "drop_connect",
    "drop_connect_moments",
    "drop_edge",
    "drop_edge_path",
    "drop_feature",
    "drop_key",
    "drop_message",
    "drop_node",
    "drop_path",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "edge_mask",
    "embedding_dropout",
    "exact_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "head_dropout",
    "kept_patches",
    "locked_dropout",
    "masksembles",
    "overlapping_masks",
    "patch_dropout",
    "scaled_dot_product_attention",
    "shake_drop",
    "stochastic_depth",
    "take_patches",
    "targeted_dropout",
    "thinned_map",
    "token_dropout",
    "uniform_dropout",
    "variational_divergence",
    "variational_dropout",
    "word_dropout",
    "zoneout",
]
