"""Layers, one file for each thing that can be forgotten."""

from dropkit.nn import schedules
from dropkit.nn.alpha import AlphaDropout, FeatureAlphaDropout
from dropkit.nn.batchwise import BatchwiseDropout
from dropkit.nn.blocks import DropBlock1d, DropBlock2d, DropBlock3d
from dropkit.nn.classic import ClassicDropout, to_classic, to_inverted
from dropkit.nn.concrete import ConcreteDropout, ConcreteRegularisation
from dropkit.nn.convolution import Convolution
from dropkit.nn.cutout import Cutout
from dropkit.nn.edges import DropEdge, DropEdgePath
from dropkit.nn.embedding import EmbeddingDropout
from dropkit.nn.features import Dropout
from dropkit.nn.gaussian import ExactDropout, GaussianDropout, UniformDropout
from dropkit.nn.graphs import DropFeature, DropMessage, DropNode
from dropkit.nn.heads import AttentionDropout, DropKey, HeadDropout
from dropkit.nn.images import ChannelDropout, ChannelDropout1d, ChannelDropout2d, ChannelDropout3d
from dropkit.nn.layer import name_sites
from dropkit.nn.layer_drop import LayerDrop
from dropkit.nn.layer_rates import rates_of, set_rates
from dropkit.nn.masksembles import Masksembles
from dropkit.nn.multihead import MultiheadAttention
from dropkit.nn.multisample import MultiSampleDropout
from dropkit.nn.patches import PatchDropout
from dropkit.nn.paths import DropPath, StochasticDepth
from dropkit.nn.recurrent import GRU, LSTM
from dropkit.nn.schedules import Schedule
from dropkit.nn.sequences import LockedDropout, TokenDropout, WordDropout
from dropkit.nn.shake_drop import ShakeDrop
from dropkit.nn.targeted import TargetedDropout
from dropkit.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from dropkit.nn.variational import VariationalDropout
from dropkit.nn.weights import DropConnect
from dropkit.nn.zoneout import Zoneout

__all__ = [
    "GRU",
    "LSTM",
    "AlphaDropout",
    "AttentionDropout",
    "BatchwiseDropout",
    "ChannelDropout",
    "ChannelDropout1d",
    "ChannelDropout2d",
    "ChannelDropout3d",
    "ClassicDropout",
    "ConcreteDropout",
    "ConcreteRegularisation",
    "Convolution",
    "Cutout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropEdge",
    "DropEdgePath",
    "DropFeature",
    "DropKey",
    "DropMessage",
    "DropNode",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "ExactDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "HeadDropout",
    "LayerDrop",
    "LockedDropout",
    "Masksembles",
    "MultiSampleDropout",
    "MultiheadAttention",
    "PatchDropout",
    "Schedule",
    "ShakeDrop",
    "StochasticDepth",
    "TargetedDropout",
    "TokenDropout",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "UniformDropout",
    "VariationalDropout",
    "WordDropout",
    "Zoneout",
    "name_sites",
    "rates_of",
    "schedules",
    "set_rates",
    "to_classic",
    "to_inverted",
]
