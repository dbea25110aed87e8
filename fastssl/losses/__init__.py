"""Losses: thin modules over fastssl.kernels, exact across ranks.  They need torch alone."""

from .barlow_twins import BarlowTwinsLoss, MixedBarlowTwinsLoss
from .clip import CLIPLoss
from .dcl import DCLLoss, DCLWLoss
from .dense import DenseInfoNCELoss
from .groco import GroCoLoss
from .grouped import GroupedNTXentLoss
from .hcl import HCLLoss
from .isogclr import ISogCLRLoss
from .latents import ChamferLoss, ScaledCosineLoss
from .matryoshka import MatryoshkaLoss
from .mmcr import MMCRLoss
from .mochi import MoCHiLoss
from .moco import MoCoLoss, MoCoV3Loss
from .nnclr import NNCLRLoss
from .ntxent import NTXentLoss
from .reconstruction import MAELoss
from .sie import SIELoss
from .siglip import SigLIPLoss
from .ssl_ey import SSLEYLoss
from .supcon import SupConLoss
from .tico import TiCoLoss
from .vicreg import VICRegLoss
from .vicregl import VICRegLLoss

__all__ = [
    "BarlowTwinsLoss",
    "CLIPLoss",
    "ChamferLoss",
    "DCLLoss",
    "DCLWLoss",
    "DenseInfoNCELoss",
    "GroCoLoss",
    "GroupedNTXentLoss",
    "HCLLoss",
    "ISogCLRLoss",
    "MAELoss",
    "MMCRLoss",
    "MatryoshkaLoss",
    "MixedBarlowTwinsLoss",
    "MoCHiLoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "NNCLRLoss",
    "NTXentLoss",
    "SIELoss",
    "SSLEYLoss",
    "ScaledCosineLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TiCoLoss",
    "VICRegLLoss",
    "VICRegLoss",
]
