"""DCL: SimCLR with the positive pair taken out of the denominator, so that small batches do.

Source: Yeh et al. 2021, Decoupled Contrastive Learning, arXiv:2110.06848.
"""

from torch import nn

from fastssl.losses import DCLLoss, DCLWLoss

from .configs import DCLConfig
from .simclr import SimCLR


class DCL(SimCLR):
    def __init__(self, encoder: nn.Module, cfg: DCLConfig):
        super().__init__(encoder, cfg)
        self.criterion = (DCLWLoss if cfg.weighted else DCLLoss)(cfg.temperature)  # type: ignore[assignment]
