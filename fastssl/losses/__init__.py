"""Losses: thin modules over fastssl.kernels, exact across ranks.  They need torch alone."""

from .barlow_twins import BarlowTwinsLoss as BarlowTwinsLoss
from .barlow_twins import MixedBarlowTwinsLoss as MixedBarlowTwinsLoss
from .clip import CLIPLoss as CLIPLoss
from .clip import CLIPLoss as ClipLoss  # noqa: F401  open_clip's name of it
from .cosine import NegativeCosineSimilarity as NegativeCosineSimilarity
from .dcl import DCLLoss as DCLLoss
from .dcl import DCLWLoss as DCLWLoss
from .dense import DenseInfoNCELoss as DenseInfoNCELoss
from .dino import DINOLoss as DINOLoss
from .groco import GroCoLoss as GroCoLoss
from .grouped import GroupedNTXentLoss as GroupedNTXentLoss
from .hcl import HCLLoss as HCLLoss
from .ibot import IBOTPatchLoss as IBOTPatchLoss
from .ibot import IBOTPlusPlusPatchLoss as IBOTPlusPlusPatchLoss
from .ibot import LinearIBOTPatchLoss as LinearIBOTPatchLoss
from .isogclr import ISogCLRLoss as ISogCLRLoss
from .koleo import KoLeoLoss as KoLeoLoss
from .latents import ChamferLoss as ChamferLoss
from .latents import ScaledCosineLoss as ScaledCosineLoss
from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
from .mmcr import MMCRLoss as MMCRLoss
from .mochi import MoCHiLoss as MoCHiLoss
from .moco import MoCoLoss as MoCoLoss
from .moco import MoCoV3Loss as MoCoV3Loss
from .msn import MSNLoss as MSNLoss
from .msn import PMSNCustomLoss as PMSNCustomLoss
from .msn import PMSNLoss as PMSNLoss
from .nnclr import NNCLRLoss as NNCLRLoss
from .ntxent import NTXentLoss as NTXentLoss
from .reconstruction import MAELoss as MAELoss
from .sie import SIELoss as SIELoss
from .siglip import SigLIPLoss as SigLIPLoss
from .siglip import SigLIPLoss as SigLipLoss  # noqa: F401  open_clip's name of it
from .ssl_ey import SSLEYLoss as SSLEYLoss
from .supcon import SupConLoss as SupConLoss
from .swav import SwaVLoss as SwaVLoss
from .tico import TiCoLoss as TiCoLoss
from .vicreg import VICRegLoss as VICRegLoss
from .vicregl import VICRegLLoss as VICRegLLoss
