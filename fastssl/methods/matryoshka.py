"""Matryoshka: SimCLR whose features serve whole, and as well by their first 8, 16, 32 ... numbers.

    loss = sum over the prefixes' lengths m of w_m NT-Xent(f_0[:m], f_1[:m])

Nested is what is used: the features themselves, by no projection head, as the paper has it where
it contrasts (ALIGN); `fastssl embed` gives what can be cut.  Each number is first standardized over
the batch, as by the last norm of SimCLR's head, which is all that is left of it here and keeps
prefixes prefixes; then each prefix is normalized on its own.  They are taken in one sweep over the
pairs: see MatryoshkaLoss.
Source: Kusupati et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147, section 3.
"""

from torch import Tensor, nn

from fastssl.losses import MatryoshkaLoss, NTXentLoss
from fastssl.models import BatchNorm1d, feature_dim

from .base import Batch, Method
from .configs import MatryoshkaConfig


class Matryoshka(Method):
    preset, views, couples_batch = "simclr", 2, True

    def __init__(self, encoder: nn.Module, cfg: MatryoshkaConfig):
        super().__init__()
        self.encoder, width = encoder, feature_dim(encoder)
        dims = cfg.dims or (*(m for m in (2**i for i in range(3, 31)) if m < width), width)
        if dims[-1] > width:
            raise ValueError(f"method.dims={dims} reach past the encoder's {width} features")
        self.norm = BatchNorm1d(width, affine=False)
        loss = NTXentLoss(cfg.temperature)
        self.criterion = MatryoshkaLoss(loss, dims, cfg.weights or None)

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.criterion(*map(self.norm, encoded))}
