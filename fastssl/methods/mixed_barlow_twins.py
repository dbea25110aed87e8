"""Mixed Barlow Twins: Barlow Twins, and a mixture of images has the mixture of their embeddings.

    x_M = alpha x_A + (1 - alpha) x_B[perm],  alpha ~ U(0, 1) for a batch

Source: Bandara et al. 2023, Guarding Barlow Twins Against Overfitting with Mixed Samples,
arXiv:2312.02151, algorithm 1.
"""

from torch import Tensor

from fastssl.losses import MixedBarlowTwinsLoss
from fastssl.random import uniform

from .barlow_twins import BarlowTwins
from .base import Batch
from .configs import MixedBarlowTwinsConfig


class MixedBarlowTwins(BarlowTwins):
    """Who is mixed with whom, and how much, come from the samples' seeds."""

    views = 2

    def __init__(self, encoder, cfg: MixedBarlowTwinsConfig):
        super().__init__(encoder, cfg)
        self.criterion = MixedBarlowTwinsLoss(cfg.lambda_param, cfg.mixup)

    def prepare(self, batch: Batch) -> Batch:
        """A third view, the mixture; "partner" (B,) int64 is perm, and "share" (B,) alpha."""
        x_a, x_b = batch["views"]
        draws = uniform(batch["seeds"], 2)
        alpha, perm = draws[0, 0], draws[:, 1].argsort()
        x_m = alpha * x_a + (1 - alpha) * x_b[perm]
        return {
            **batch,
            "views": [x_a, x_b, x_m],
            "partner": perm,
            "share": alpha.expand(len(perm)),
        }

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        z = map(self.head, encoded)
        return {"loss": self.criterion(*z, batch["partner"], batch["share"][0])}
