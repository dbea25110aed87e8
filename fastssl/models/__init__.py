"""Encoders and heads: timm backbones by name, MaskedViT over a timm ViT, projection heads."""

from .backbones import backbone_arguments, build_backbone, channels_of, feature_dim, is_vit
from .directpred import DirectPred
from .ema import EMA
from .heads import BatchNorm1d, MAEDecoder, projection_head, widen_batch_norms
from .hypernetwork import HypernetworkPredictor
from .masked_vit import MaskedViT

__all__ = [
    "EMA",
    "BatchNorm1d",
    "DirectPred",
    "HypernetworkPredictor",
    "MAEDecoder",
    "MaskedViT",
    "backbone_arguments",
    "build_backbone",
    "channels_of",
    "feature_dim",
    "is_vit",
    "projection_head",
    "widen_batch_norms",
]
