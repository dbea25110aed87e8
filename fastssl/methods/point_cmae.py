"""Point-CMAE: Point-MAE under two masks of a cloud at once, whose decoders are to agree.

    loss = chamfer_1 + chamfer_2 + contrast * mean over clouds of d
    d = mean over the groups g that both masks hide of 1 - cos(x_1g, x_2g), 0 without such groups

One encoder reads what each mask leaves visible; of two decoders alike each describes the hidden
groups, x, and predicts their points as Point-MAE does.  No other view and no other cloud takes
part: what differs between the two is what was hidden.
Source: Ren et al. 2024, Point-CMAE, arXiv:2407.05862.  The default weight is that of the authors'
code, which there also draws a description to those of the cloud's other groups; their paper, and
this, to that of the same group.  Theirs is before the decoder's last norm, and weighs every hidden
pair of a batch alike; here a cloud's loss is its own.
"""

from typing import Any

from torch import Tensor, nn

from fastssl.kernels import chamfer, scaled_cosine_error
from fastssl.models import PointDecoder
from fastssl.random import finish

from .base import Batch
from .configs import PointCMAEConfig
from .point_mae import PointMAE, chosen


class PointCMAE(PointMAE):
    def __init__(self, encoder: nn.Module, cfg: PointCMAEConfig):
        super().__init__(encoder, cfg)
        self.contrast = cfg.contrast
        width, size = self.encoder.width, self.encoder.group_size
        self.second = PointDecoder(width, **cfg.decoder, size=size)  # type: ignore[arg-type]

    def encode(self, batch: Batch) -> dict[str, Any]:
        """The points predicted under each mask, those that are there, and the descriptions' d."""
        (clouds,) = batch["views"]
        groups = self.encoder.group(clouds)  # type: ignore[operator]
        found, points, described, hidden = [], [], [], []
        for decoder, seeds in (
            (self.decoder, batch["seeds"]),
            (self.second, finish(batch["seeds"])),
        ):
            tokens, masking = self.encode_visible(groups, seeds)
            predicted, x = decoder(tokens, groups.centers, masking)
            found.append(predicted)
            points.append(chosen(groups.points, masking.masked))
            described.append(x)
            hidden.append(masking.restore >= masking.visible.shape[1])
        both = hidden[0] & hidden[1]
        apart = scaled_cosine_error(*described, gamma=1.0) * both
        return {"found": found, "points": points, "apart": apart.sum(1) / both.sum(1).clamp(min=1)}

    def loss(self, encoded: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
        pairs = zip(encoded["found"], encoded["points"], strict=True)
        errors = [chamfer(a.flatten(0, 1), b.flatten(0, 1)).mean() for a, b in pairs]
        distance, apart = errors[0] + errors[1], encoded["apart"].mean()
        return {"loss": distance + self.contrast * apart, "chamfer": distance, "apart": apart}
