"""iSogCLR: SimCLR where each sample has a temperature of its own, which is learned with it.

A sample that many others resemble comes to a higher temperature, so that its kin are pushed away
less; a rare one to a lower.  A sample is known by its place in the training data, batch["index"].
Source: Qiu et al. 2023, Not All Semantics are Created Equal, arXiv:2305.11965, algorithm 1; the
defaults are those of the authors' run on CIFAR-100.
"""

from typing import Any

from torch import Tensor, nn

from fastssl.losses import ISogCLRLoss

from .base import Batch
from .configs import ISogCLRConfig
from .simclr import SimCLR


class ISogCLR(SimCLR):
    views = 2
    criterion: ISogCLRLoss  # type: ignore[assignment]

    def __init__(self, encoder: nn.Module, cfg: ISogCLRConfig):
        super().__init__(encoder, cfg)
        if cfg.size is None:
            raise ValueError("method.size=null waits for the training data: give their number")
        self.criterion = ISogCLRLoss(
            cfg.size, cfg.temperature, cfg.temperature_range, cfg.rho, cfg.eta, sharded=False
        )

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Any]:
        z_0, z_1 = map(self.head, encoded)
        loss, state = self.criterion.measure(z_0, z_1, batch["index"])
        keep = {"index": batch["index"], "state": state}
        return {"loss": loss, "temperature": state[:, 0].mean(), "keep": keep}

    def on_step(self, keep: dict[str, Tensor], progress: float) -> None:
        self.criterion.remember(**keep)
