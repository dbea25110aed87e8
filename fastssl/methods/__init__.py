"""The methods, by name.  A new one is a file, its config in the union and a line in METHODS."""

from typing import Annotated

from pydantic import Field
from torch import nn

from .barlow_twins import BarlowTwins, BarlowTwinsConfig
from .base import Batch, Method, MethodConfig
from .clip import CLIP, CLIPConfig
from .cropmae import CropMAE, CropMAEConfig
from .data2vec import Data2Vec, Data2VecConfig
from .dcl import DCL, DCLConfig
from .gmml import GMML, GMMLConfig
from .ijepa import IJEPA, IJEPAConfig
from .mae import MAE, MAEConfig
from .mixed_barlow_twins import MixedBarlowTwins, MixedBarlowTwinsConfig
from .mocov3 import MoCoV3, MoCoV3Config
from .nnclr import NNCLR, NNCLRConfig
from .point_mae import PointMAE, PointMAEConfig
from .sie import SIE, SIEConfig
from .signal_mae import SignalMAE, SignalMAEConfig
from .simclr import SimCLR, SimCLRConfig
from .simmim import SimMIM, SimMIMConfig
from .tjepa import TJEPA, TJEPAConfig
from .vicreg import VICReg, VICRegConfig
from .videomae import VideoMAE, VideoMAEConfig

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "dcl": DCL,
    "mocov3": MoCoV3,
    "nnclr": NNCLR,
    "clip": CLIP,
    "barlow_twins": BarlowTwins,
    "mixed_barlow_twins": MixedBarlowTwins,
    "vicreg": VICReg,
    "sie": SIE,
    "mae": MAE,
    "simmim": SimMIM,
    "gmml": GMML,
    "cropmae": CropMAE,
    "ijepa": IJEPA,
    "data2vec": Data2Vec,
    "videomae": VideoMAE,
    "signal_mae": SignalMAE,
    "tjepa": TJEPA,
    "point_mae": PointMAE,
}
AnyMethodConfig = Annotated[
    SimCLRConfig
    | DCLConfig
    | MoCoV3Config
    | NNCLRConfig
    | CLIPConfig
    | BarlowTwinsConfig
    | MixedBarlowTwinsConfig
    | VICRegConfig
    | SIEConfig
    | MAEConfig
    | SimMIMConfig
    | GMMLConfig
    | CropMAEConfig
    | IJEPAConfig
    | Data2VecConfig
    | VideoMAEConfig
    | SignalMAEConfig
    | TJEPAConfig
    | PointMAEConfig,
    Field(discriminator="name"),
]


def build_method(encoder: nn.Module, cfg: AnyMethodConfig) -> Method:
    """The method `cfg.name` over `encoder`.  Raises ValueError for an encoder it cannot train."""
    return METHODS[cfg.name](encoder, cfg)  # type: ignore[call-arg]


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
