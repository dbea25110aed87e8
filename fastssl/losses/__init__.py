"""Losses: thin modules over fastssl.kernels, exact across ranks.  They need torch alone."""

from .contrastive import NTXentLoss
from .reconstruction import MAELoss
from .redundancy import BarlowTwinsLoss

__all__ = ["BarlowTwinsLoss", "MAELoss", "NTXentLoss"]
