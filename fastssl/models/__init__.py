"""Encoders and heads: timm backbones by name, MaskedViT over a timm ViT, projection heads."""

from .backbones import (
    OWN,
    backbone_arguments,
    build_backbone,
    channels_of,
    feature_dim,
    is_vit,
    probe,
)
from .decoders import CrossDecoder, LatentPredictor, MAEDecoder
from .directpred import DirectPred
from .ema import EMA
from .heads import (
    BatchNorm1d,
    average_running_statistics,
    projection_head,
    synchronize_batch_norms,
    widen_batch_norms,
)
from .hypernetwork import HypernetworkPredictor
from .masked_vit import MaskedViT
from .patch_embed import PatchEmbed1d, PatchEmbed3d, sincos_positions, vit_signal, vit_video
from .point import PointDecoder, PointTransformer
from .tabular import TableTransformer

__all__ = [
    "EMA",
    "OWN",
    "BatchNorm1d",
    "CrossDecoder",
    "DirectPred",
    "HypernetworkPredictor",
    "LatentPredictor",
    "MAEDecoder",
    "MaskedViT",
    "PatchEmbed1d",
    "PatchEmbed3d",
    "PointDecoder",
    "PointTransformer",
    "TableTransformer",
    "average_running_statistics",
    "backbone_arguments",
    "build_backbone",
    "channels_of",
    "feature_dim",
    "is_vit",
    "probe",
    "projection_head",
    "sincos_positions",
    "synchronize_batch_norms",
    "vit_signal",
    "vit_video",
    "widen_batch_norms",
]
