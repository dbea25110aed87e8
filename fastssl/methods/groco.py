"""GroCo: an image's other view must sort above the views of other images that are most alike.

Source: Shvetsova et al. 2023, Learning by Sorting, arXiv:2301.02009, section 3.
"""

from torch import nn

from fastssl.losses import GroCoLoss

from .configs import GroCoConfig
from .simclr import SimCLR


class GroCo(SimCLR):
    """SimCLR's views and head."""

    def __init__(self, encoder: nn.Module, cfg: GroCoConfig):
        super().__init__(encoder, cfg)
        self.criterion = GroCoLoss(cfg.negatives, cfg.steepness)
