"""iBOT: DINO on class tokens, and the same on hidden patches, through one head.

DINOv2 without its spread, and with prototypes of length 1: see dinov2.py.
Source: Zhou et al. 2022, iBOT, arXiv:2111.07832, section 3.2.
"""

from .dinov2 import DINOv2


class IBOT(DINOv2):
    preset = "ibot"
