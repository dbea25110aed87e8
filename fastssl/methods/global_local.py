"""Global and local contrast: an image finds its other views, and a place the same place in them.

    loss = SupCon(head(f_v)) + local_weight * mean over pairs of views and both directions of
           InfoNCE(place l of one view, the place of the other that shows what l shows), where the
           negatives are the other's other places

Source: Chaitanya et al. 2020, Contrastive learning of global and local features for medical image
segmentation with limited annotations, arXiv:2006.10511.  by_label is its G^D: images of one label,
there a place along the volume, attract as well.  Here both parts are learned at once, places meet
through the crops, and the decoder, which is not exported, reads the encoder's last map alone.
"""

from math import isqrt

import torch
from torch import Tensor, nn

from fastssl.losses import DenseInfoNCELoss, SupConLoss
from fastssl.models import feature_dim, features_and_map, map_decoder, projection_head

from .base import Batch, Method
from .configs import GlobalLocalConfig
from .sie import frame_change
from .views import pairs


class GlobalLocal(Method):
    preset, views, couples_batch, needs_view_params = "simclr", (2, None), True, True

    def __init__(self, encoder: nn.Module, cfg: GlobalLocalConfig):
        super().__init__()
        self.cfg, self.encoder, hidden, out = cfg, encoder, cfg.hidden_dim, cfg.projection_dim
        self.head = projection_head(feature_dim(encoder), hidden, out, 2, final_norm=True)
        self.decoder = map_decoder(encoder, cfg.local_dim, out, cfg.upsampled)
        self.globally = SupConLoss(cfg.temperature)
        self.locally = DenseInfoNCELoss(cfg.temperature, "image")

    def encode(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Of each view its features (B, F), and those of its places (B, L, D)."""
        both = [features_and_map(self.encoder, self.cast(view)) for view in batch["views"]]
        return [(f, self.decoder(x).flatten(2).transpose(1, 2)) for f, x in both]

    def loss(self, encoded: list[tuple[Tensor, Tensor]], batch: Batch) -> dict[str, Tensor]:
        """Beside the loss: its `global` and `local` parts."""
        z, y = torch.stack([self.head(f) for f, _ in encoded], 1), [places for _, places in encoded]
        whole = self.globally(z, batch["label"] if self.cfg.by_label else None)
        both = [way for v, w in pairs(batch["views"]) for way in ((v, w), (w, v))]
        sides, p = [isqrt(places.shape[1]) for places in y], batch["params"]
        met = {(v, w): same_places(p[v], p[w], sides[v], sides[w]) for v, w in both}
        part = torch.stack([self.locally(y[v], y[w], m) for (v, w), m in met.items()]).mean()
        total = whole + self.cfg.local_weight * part
        return {"loss": total, "global": whole.detach(), "local": part.detach()}


def same_places(first: Tensor, second: Tensor, n: int, m: int) -> Tensor:
    """(B, n n): of each place of the first view's grid, row by row, the place of the second's m x m
    in which its center lies; -1 outside.  first, second (B, P): the views' parameters."""
    M, d = frame_change(first, second)
    at = (torch.arange(n, device=M.device) + 0.5) / n - 0.5
    centers = torch.stack([at.repeat(n), at.repeat_interleave(n)], 1)
    x, y = ((centers @ M.mT + d.unsqueeze(1) + 0.5) * m).floor().long().unbind(2)
    inside = (x >= 0) & (x < m) & (y >= 0) & (y < m)
    return torch.where(inside, y * m + x, -1)
