"""Losses: thin modules over fastssl.kernels, exact across ranks.  They need torch alone."""

from .dcl import DCLLoss, DCLWLoss
from .dense import DenseInfoNCELoss
from .grouped import GroupedNTXentLoss
from .hcl import HCLLoss
from .isogclr import ISogCLRLoss
from .matryoshka import MatryoshkaLoss
from .moco import MoCoLoss, MoCoV3Loss
from .ntxent import NTXentLoss
from .reconstruction import MAELoss
from .redundancy import BarlowTwinsLoss
from .supcon import SupConLoss

__all__ = [
    "BarlowTwinsLoss",
    "DCLLoss",
    "DCLWLoss",
    "DenseInfoNCELoss",
    "GroupedNTXentLoss",
    "HCLLoss",
    "ISogCLRLoss",
    "MAELoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "NTXentLoss",
    "SupConLoss",
]
