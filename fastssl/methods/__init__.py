"""The methods, by name, and what each can be told (`configs`).

The methods, and with them the encoders of timm, are imported when one is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .configs import METHODS, AnyMethodConfig, MethodConfig

if TYPE_CHECKING:
    from torch import nn

    from .barlow_twins import BarlowTwins
    from .base import Batch, Encoded, Method
    from .byol import BYOL
    from .cae import CAE
    from .clip import CLIP
    from .cmc import CMC
    from .cropmae import CropMAE
    from .data2vec import Data2Vec
    from .dcl import DCL
    from .dino import DINO
    from .dinov2 import DINOv2
    from .dinov3 import DINOv3
    from .directpred import DirectPred
    from .distill import Distill
    from .global_local import GlobalLocal
    from .gmml import GMML
    from .groco import GroCo
    from .ibot import IBOT
    from .ijepa import IJEPA
    from .isogclr import ISogCLR
    from .mae import MAE
    from .mask_distill import MaskDistill
    from .matryoshka import Matryoshka
    from .mixed_barlow_twins import MixedBarlowTwins
    from .mochi import MoCHi
    from .mocov2 import MoCoV2
    from .mocov3 import MoCoV3
    from .msn import MSN
    from .nnclr import NNCLR
    from .point_cmae import PointCMAE
    from .point_mae import PointMAE
    from .seed import SEED
    from .selfie import Selfie
    from .sie import SIE
    from .signal_mae import SignalMAE
    from .simclr import SimCLR
    from .simmim import SimMIM
    from .simsiam import SimSiam
    from .sit import SiT
    from .sla import SLA
    from .ssl_ey import SSLEY
    from .swav import SwAV
    from .tjepa import TJEPA
    from .vicreg import VICReg
    from .videomae import VideoMAE

__all__ = [
    "BYOL",
    "CAE",
    "CLIP",
    "CMC",
    "DCL",
    "DINO",
    "DINOv2",
    "DINOv3",
    "GMML",
    "GlobalLocal",
    "GroCo",
    "IBOT",
    "IJEPA",
    "MAE",
    "METHODS",
    "MSN",
    "AnyMethodConfig",
    "BarlowTwins",
    "Batch",
    "CropMAE",
    "Data2Vec",
    "DirectPred",
    "Distill",
    "Encoded",
    "ISogCLR",
    "MaskDistill",
    "Matryoshka",
    "Method",
    "MethodConfig",
    "MixedBarlowTwins",
    "MoCHi",
    "MoCoV2",
    "MoCoV3",
    "NNCLR",
    "PointCMAE",
    "PointMAE",
    "SEED",
    "SIE",
    "SLA",
    "SSLEY",
    "TJEPA",
    "Selfie",
    "SiT",
    "SimCLR",
    "SignalMAE",
    "SimMIM",
    "SimSiam",
    "SwAV",
    "VICReg",
    "VideoMAE",
    "build_method",
    "register_method",
]


def build_method(
    encoder: "nn.Module | dict[str, nn.Module]",
    cfg: MethodConfig,
    teacher: "nn.Module | None" = None,
) -> "Method":
    """The method `cfg.name` over `encoder`, or one a stream by name where it reads several.

    teacher: the frozen network that a method of `has_teacher` learns from.
    Raises ValueError for an encoder it cannot train, or a teacher that it cannot learn from.
    """
    given = () if teacher is None else (teacher,)
    return METHODS[cfg.name](encoder, cfg, *given)  # type: ignore[call-arg]


def register_method(config: type[MethodConfig]) -> Any:
    """A class decorator: a `Method`, built as Class(encoder, cfg), is called what its config is.

    config: a `MethodConfig` whose field `name` is a Literal with itself as default; its other
    fields are the method's keys in a configuration, described by Field(description=...).
    Raises PluginError where there is a method of that name.

        class MineConfig(MethodConfig):
            name: Literal["mine"] = "mine"
            temperature: float = Field(0.1, gt=0, description="Divides the cosine similarities.")

        @register_method(MineConfig)
        class Mine(Method): ...
    """

    def add(method: "type[Method]") -> "type[Method]":
        METHODS.add(config.model_fields["name"].default, method, config)
        return method

    return add


_CLASSES = dict(entry.made.split(":")[::-1] for entry in METHODS.entries.values())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_CLASSES.get(name, "fastssl.methods.base")), name)
