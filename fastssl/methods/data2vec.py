"""data2vec: from the visible patches, predict a teacher's view of the hidden ones, layers averaged.

    t_l = 1/K sum over the last K blocks k of layer_norm(block_k(teacher(all patches))_l)
    p = decoder(student(visible patches))      loss = mean over hidden places and features of
                                               rho(p_l - t_l), rho the square or smooth L1

Targets are contextual: each t_l is made from the whole image.  M masks of an image share its one
teacher pass and one embedding of its patches, so the teacher's cost is that of 1/M of a pass each.
Source: Baevski et al. 2022, data2vec, arXiv:2202.03555, sections 3.2 to 3.4, and data2vec 2.0,
arXiv:2212.07525, section 3 (visible patches only, several masks, L2, a light decoder).  There the
decoder is convolutional and blocks are taken before their last residual; here it is a transformer,
for grids of any dimensions, and whole blocks are taken, each normalized token by token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.masking import Masking
from fastssl.models import EMA, MAEDecoder, MaskedViT
from fastssl.random import hashes
from fastssl.schedules.config import at

from .base import Batch, Method
from .configs import Data2VecConfig
from .places import DrawnOnce, MaskSchedule, draw_mask, of_one_size


class Data2Vec(Method):
    preset, views, couples_batch = "mae", 1, False

    def __init__(self, encoder: nn.Module, cfg: Data2VecConfig):
        super().__init__()
        self.cfg, self.places = cfg, DrawnOnce(self.mask)
        self.student = of_one_size(encoder, cfg.name)
        self.teacher = EMA(LayerMean(self.student, cfg.layers))
        L, width = self.student.num_patches, self.student.width
        self.schedule = MaskSchedule(cfg.mask_ratio, L)
        self.decoder = MAEDecoder(width, **cfg.decoder, patches=L, values=width)
        self.schedule.check(self.mask)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student.vit

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("masked.vit")
        return {"encoder": self.encoder, "teacher": teacher}

    def mask(self, seeds: Tensor, keep: int) -> Masking:
        """M masks of each sample, one after another: B M rows.  seeds (B,) int64."""
        drawn = hashes(seeds, self.cfg.masks).flatten()
        return draw_mask(self.cfg.masking, drawn, self.student.grid, keep)

    def encode(self, batch: Batch) -> Tensor:
        """Predicted features (B, M (L - K), E) float32, one mask's after another's."""
        (images,) = batch["views"]
        masking = self.places(batch["seeds"], self.schedule.keep)
        return self._by_sample(self.predict(images, masking).float())

    def targets(self, batch: Batch) -> Tensor:
        (images,) = batch["views"]
        masking = self.places(batch["seeds"], self.schedule.keep)
        return self._by_sample(self.teach(images, masking.masked))

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Tensor]:
        wanted = batch["targets"]
        rho = F.smooth_l1_loss if self.cfg.error == "smooth_l1" else F.mse_loss
        spread = wanted.unflatten(1, (self.cfg.masks, -1)).mean(2).flatten(0, 1)
        return {"loss": rho(encoded, wanted), "target_std": spread.std(0, correction=0).mean()}

    def _by_sample(self, rows: Tensor) -> Tensor:
        """Rows (B M, N, E) of each mask, as (B, M N, E)."""
        return rows.view(-1, self.cfg.masks * rows.shape[1], rows.shape[2])

    def predict(self, images: Tensor, masking: Masking) -> Tensor:
        """(B M, L - K, E): the features of each mask's hidden patches, from its visible ones."""
        visible = masking.visible
        if self.cfg.masks == 1:
            tokens = self.student.tokens(images, visible)
        else:
            embedded = self.student.tokens(images)
            chosen = gather_tokens(embedded, visible.reshape(len(images), -1))
            tokens = chosen.view(*visible.shape, -1)
        return self.decoder(self.student.encode(tokens, visible), masking)

    @torch.no_grad()
    def teach(self, images: Tensor, hidden: Tensor) -> Tensor:
        """What the teacher makes of the places hidden (B M, N): (B M, N, E) float32."""
        self.teacher.eval()  # no dropped paths
        whole = self.teacher(images)
        return gather_tokens(whole, hidden.reshape(len(images), -1)).view(*hidden.shape, -1)

    def on_step(self, keep: Any, progress: float) -> None:
        self.schedule.progress = progress
        self.teacher.update(self.student, at(self.cfg.momentum, progress))


class LayerMean(nn.Module):
    """images -> (B, L, E) float32: the mean of the last `layers` blocks, each layer-normed.

    Raises ValueError for more layers than the encoder has.
    """

    def __init__(self, masked: MaskedViT, layers: int):
        super().__init__()
        self.masked, self.layers = masked, layers
        depth = len(self.blocks)
        if layers > depth:
            raise ValueError(f"method.layers={layers} is more than the encoder's {depth}")

    @property
    def blocks(self) -> nn.Sequential:
        return self.masked.vit.blocks  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep(block: nn.Module, given: Any, out: Tensor) -> None:
            seen.append(out)

        hooks = [block.register_forward_hook(keep) for block in self.blocks[-self.layers :]]
        try:
            self.masked(images)
        finally:
            for hook in hooks:
                hook.remove()
        patches = (h[:, self.masked.prefix :].float() for h in seen)
        return torch.stack([F.layer_norm(h, h.shape[-1:]) for h in patches]).mean(0)
