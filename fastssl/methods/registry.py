"""The methods, by name.  A new one is a file, a config in configs.py and a line in METHODS."""

from torch import nn

from .barlow_twins import BarlowTwins
from .base import Method
from .clip import CLIP
from .configs import AnyMethodConfig
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
from .sie import SIE
from .signal_mae import SignalMAE
from .simclr import SimCLR
from .simmim import SimMIM
from .tjepa import TJEPA
from .vicreg import VICReg
from .videomae import VideoMAE

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


def build_method(encoder: nn.Module, cfg: AnyMethodConfig) -> Method:
    """The method `cfg.name` over `encoder`.  Raises ValueError for an encoder it cannot train."""
    return METHODS[cfg.name](encoder, cfg)  # type: ignore[call-arg]
