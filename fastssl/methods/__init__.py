"""The methods, by name (`registry`), and what each can be told (`configs`).

The methods, and with them the encoders of timm, are imported when one is first asked for.
"""

from typing import TYPE_CHECKING, Any

from .configs import AnyMethodConfig, MethodConfig

if TYPE_CHECKING:
    from .barlow_twins import BarlowTwins
    from .base import Batch, Method
    from .clip import CLIP
    from .cropmae import CropMAE
    from .data2vec import Data2Vec
    from .dcl import DCL
    from .gmml import GMML
    from .ijepa import IJEPA
    from .mae import MAE
    from .mixed_barlow_twins import MixedBarlowTwins
    from .mocov3 import MoCoV3
    from .nnclr import NNCLR
    from .point_mae import PointMAE
    from .registry import METHODS, build_method
    from .sie import SIE
    from .signal_mae import SignalMAE
    from .simclr import SimCLR
    from .simmim import SimMIM
    from .tjepa import TJEPA
    from .vicreg import VICReg
    from .videomae import VideoMAE

__all__ = [
    "CLIP",
    "DCL",
    "GMML",
    "IJEPA",
    "MAE",
    "METHODS",
    "AnyMethodConfig",
    "BarlowTwins",
    "Batch",
    "CropMAE",
    "Data2Vec",
    "Method",
    "MethodConfig",
    "MixedBarlowTwins",
    "MoCoV3",
    "NNCLR",
    "PointMAE",
    "SIE",
    "TJEPA",
    "SimCLR",
    "SignalMAE",
    "SimMIM",
    "VICReg",
    "VideoMAE",
    "build_method",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import base, registry

    return getattr(base if name == "Batch" else registry, name)
