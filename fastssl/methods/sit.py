"""SiT: three tasks at once of corrupted images: restore them, tell how they are turned, contrast.

    x = a view, turned by k of four quarters      x~ = x with groups of patches replaced
    h = encoder(x~)     R = mean over patches, all or the replaced ones, of |head(h_l) - patch_l(x)|
    T = CE of k, from the last prefix token       C = NT-Xent of the two views' pooled features
    loss = e^-r R / 2 + e^-t T + e^-c C + (r + t + c) / 2           r, t, c: learned log-variances

Source: Atito, Awais & Kittler 2021, SiT, arXiv:2104.03602; weights by Kendall et al. 2018,
arXiv:1705.07115, begun at 1 as in the authors' code.  There turn and contrast have a token each, as
here with model.kwargs reg_tokens=1 and global_pool=token.  The corruption and the head are GMML's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.losses import NTXentLoss
from fastssl.random import hashes

from .base import Batch
from .configs import SiTConfig
from .gmml import GMML
from .turns import quarter_turns


class SiT(GMML):
    preset, views, couples_batch = "simclr", 2, True

    def __init__(self, encoder: nn.Module, cfg: SiTConfig):
        super().__init__(encoder, cfg)
        if not self.masked.prefix:
            raise ValueError("method.name=sit tells turns by a class token: the model has none")
        self.turn, self.project = (nn.Linear(self.masked.width, n) for n in (4, cfg.projection_dim))
        self.contrast = NTXentLoss(cfg.temperature)
        self.log_variances = nn.Parameter(torch.ones(3))

    def prepare(self, batch: Batch) -> Batch:
        """With "turns" (B, 2), the "clean" views turned by them, and what GMML makes of those."""
        draws, images = hashes(batch["seeds"], 4).mT, torch.cat(batch["views"])
        turns, places = draws[2:].flatten() & 3, torch.arange(len(images), device=images.device)
        clean = quarter_turns(images)[places, turns]
        parts = super().prepare({"views": [clean], "seeds": draws[:2].flatten()})
        parts = {"turns": turns, "clean": clean, **{k: parts[k] for k in ("corrupted", "hidden")}}
        return batch | {k: x.unflatten(0, (2, -1)).transpose(0, 1) for k, x in parts.items()}

    def encode(self, batch: Batch) -> list[Tensor]:
        """(B, 2, ...): the restored patches, the last prefix token and the pooled features."""
        h, P = self.masked(batch["corrupted"].flatten(0, 1)), self.masked.prefix
        restored = self.head(gather_tokens(h[:, P:], batch["hidden"].flatten(0, 1)))
        pooled = self.masked.vit.forward_head(h, pre_logits=True)  # type: ignore[operator]
        return [part.unflatten(0, (-1, 2)) for part in (restored, h[:, P - 1], pooled)]

    def loss(self, encoded: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        restored, token, pooled = encoded
        R = self.criterion(*(x.flatten(0, 1) for x in (restored, batch["clean"], batch["hidden"])))
        T = F.cross_entropy(self.turn(token).float().flatten(0, 1), batch["turns"].flatten())
        C, s = self.contrast(*self.project(pooled).unbind(1)), self.log_variances.float()
        loss = ((-s).exp() * torch.stack([R / 2, T, C])).sum() + s.sum() / 2
        return {"loss": loss, "restoration": R.detach(), "turn": T.detach(), "contrast": C.detach()}
