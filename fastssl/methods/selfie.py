"""Selfie: of an image's hidden patches, tell which one belongs at each hidden place.

    u = encoder(visible patches), pooled              L places of a grid, T of them hidden
    v_l = f(u + e_l)        e_l a position embedding          c_m = g(embed(patch_m)), no position
    loss = mean over hidden places l of CE(softmax over hidden patches m of v_l . c_m, l)

A place's distractors are the image's other hidden patches; nothing is painted, so no pixel has to
be right.  A candidate must not know its place, or the task could be done without looking.
Source: Trinh, Luong & Le 2019, Selfie, arXiv:1906.02940, section 3.  There a ResNet's first blocks
read each patch and transformer layers pool those of the context; here both are the encoder, a ViT,
whose patch embedding reads the candidates, behind it the MLP g.  f is there the identity: then
v_l . c_m = u . c_m + e_l . c_m, and no place's choice depends on the context; here it is a MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.masking import Masking

from .base import Batch
from .configs import SelfieConfig
from .places import MaskedMethod, MaskSchedule, draw_mask


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Selfie(MaskedMethod):
    preset, views, couples_batch = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: SelfieConfig):
        super().__init__(encoder, cfg)
        L, width = self.masked.num_patches, self.masked.width
        self.schedule = MaskSchedule(cfg.mask_ratio, L)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(L, width), std=0.02))
        self.place, self.candidate = mlp(width, cfg.hidden_dim), mlp(width, cfg.hidden_dim)
        self.schedule.check(self.mask)

    def mask(self, seeds: Tensor, keep: int) -> Masking:
        return draw_mask(self.cfg.masking, seeds, self.masked.grid, keep)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """v and c of the hidden places: (B, T, E)."""
        (images,), hidden = batch["views"], self.mask(batch["seeds"], self.schedule.keep)
        context = self.masked(images, hidden.visible)
        u = self.masked.vit.forward_head(context, pre_logits=True)  # type: ignore[operator]
        v = self.place(u[:, None] + gather_tokens(self.pos_embed, hidden.masked))
        return v, self.candidate(self.masked.tokens(images, hidden.masked))

    def loss(self, encoded: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Beside the loss the share of places whose patch is found."""
        v, c = (x.float() for x in encoded)
        scores = v @ c.mT
        own = torch.arange(v.shape[1], device=v.device).expand(v.shape[:2])
        right = (scores.argmax(2) == own).float().mean()
        return {"loss": F.cross_entropy(scores.flatten(0, 1), own.flatten()), "accuracy": right}
