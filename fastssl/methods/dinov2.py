"""DINOv2: what a teacher says of other views, and of patches that the student does not see.

    dino   mean over g != v and images of CE(q_g, p_v)                      of the class tokens
    ibot   mean over global views of the mean over their hidden patches of CE(q_l, p_l)
    koleo  - mean over images of log min distance, summed over the global views
    loss = dino_weight dino + ibot_weight ibot + koleo_weight koleo

    q = softmax((t - c) / teacher_temp)     p = softmax(s / student_temp)

Of a sample's global views the share `mask_share` have a mask, whose size is uniform in
`mask_range`: a mask token stands for each hidden patch, and the teacher sees them all.  A view
without a mask counts as 0 in ibot.  Scores are made of hidden patches alone.
Source: Oquab et al. 2023, DINOv2, arXiv:2304.07193, section 4, and its source.  There the sizes are
one of each stratum of a rank's batch; here each sample draws its own, whatever the batch.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.kernels.common import can_read_values
from fastssl.losses import KoLeoLoss
from fastssl.losses.dino import cross_entropies
from fastssl.masking import some_blocks
from fastssl.models import EMA, DINOHead, MaskedViT, drop_samples, still
from fastssl.random import hashes, uniform
from fastssl.schedules.config import at

from . import watch
from .base import Batch, Encoded, Method
from .configs import DINOv2Config
from .teachers import Clock, Targets, class_tokens, packed, watched
from .views import encode_views, global_views, others


class DINOv2(Method):
    preset: ClassVar[str] = "dinov2"
    views, couples_batch = (2, None), True  # by Sinkhorn, or the spread

    def __init__(self, encoder: nn.Module, cfg: DINOv2Config):
        super().__init__()
        self.cfg, self.clock = cfg, Clock()
        masked = class_tokens(encoder, cfg.name)
        self.student = nn.ModuleDict({"masked": masked, "head": DINOHead(**cfg.head(masked.width))})
        K = cfg.prototypes
        if cfg.patch_prototypes is not None:
            K, width = cfg.patch_prototypes, cfg.patch_bottleneck_dim or cfg.bottleneck_dim
            own: dict[str, Any] = cfg.head(masked.width) | {"prototypes": K, "bottleneck": width}
            self.student["patch_head"] = DINOHead(**own)
        self.mask_token = nn.Parameter(torch.zeros(masked.width))
        self.teacher = EMA(self.student)
        still(self.teacher)
        drop_samples(encoder, cfg.drop_path)
        self.assign = Targets(cfg.prototypes, cfg.assignment, cfg.center_momentum)
        self.assign_patches = Targets(K, cfg.assignment, cfg.center_momentum)
        self.koleo = KoLeoLoss()
        self.couples_batch = cfg.assignment == "sinkhorn" or cfg.koleo_weight > 0
        self.most = max(1, int(masked.num_patches * cfg.mask_range[1]))

    @property
    def masked(self) -> MaskedViT:
        """The student's."""
        return self.student["masked"]  # type: ignore[return-value]

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.masked.vit

    def networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher.model.get_submodule("masked.vit"), "student": self.encoder}

    def features(self, images: Tensor) -> Tensor:
        """The teacher's class tokens."""
        return self.networks()["teacher"](self.cast(images)).float()

    def prepare(self, batch: Batch) -> Batch:
        """With the masks of the global views: "hidden" (B, G, L) bool; "places" (B, G, M) int64,
        of which the first "count" (B, G) are the hidden ones."""
        G = len(global_views(self.compared(batch)))
        hidden = self.mask(batch["seeds"], G)
        places = hidden.byte().argsort(dim=2, descending=True, stable=True)[..., : self.most]
        return {**batch, "hidden": hidden, "places": places, "count": hidden.sum(2)}

    def mask(self, seeds: Tensor, G: int) -> Tensor:
        """Which patches of each of G views the student does not see: (B, G, L) bool."""
        grid, (low, high) = self.masked.grid, self.cfg.mask_range
        drawn = hashes(seeds, 2 * G + 2)
        masked = (self.cfg.mask_share * G + uniform(drawn[:, -1], 1)).long()  # how many views are
        chosen = drawn[:, :G].argsort(dim=1, stable=True).argsort(dim=1, stable=True) < masked
        size = low + (high - low) * uniform(drawn[:, -2], G)
        count = (size * self.masked.num_patches).long().clamp_(1, self.most) * chosen
        hidden = some_blocks(drawn[:, G : 2 * G].flatten(), grid, count.flatten())
        return hidden.unflatten(0, (len(seeds), G))

    def bound(self, count: Tensor) -> int:
        """More hidden patches than views (B, G) have, but once in a thousand million batches."""
        (B, G), (low, high) = count.shape, self.cfg.mask_range
        whole, rest = divmod(self.cfg.mask_share * G, 1)
        L = self.masked.num_patches
        mean, spread = L * (low + high) / 2, (L * (high - low)) ** 2 / 12
        variance = (whole + rest) * spread + rest * (1 - rest) * mean**2
        return int(B * (whole + rest) * mean + 6 * (B * variance) ** 0.5) + 1

    def encode(self, batch: Batch) -> Encoded:
        """{"views": the class tokens (B, E) of each; "patches": the hidden ones (B, G M, E)}."""
        views, masked = [self.cast(view) for view in self.compared(batch)], self.masked
        chosen, hidden = global_views(views), batch["hidden"]
        joined = torch.cat([views[g] for g in chosen])
        tokens = masked.tokens(joined)
        where = hidden.transpose(0, 1).flatten(0, 1)[..., None]
        tokens = torch.where(where, self.mask_token.to(tokens.dtype), tokens)
        h = masked.encode(tokens, grid=masked.grid_of(joined))
        rest = [v for v in range(len(views)) if v not in chosen]
        local = encode_views(lambda view: masked(view)[:, 0], [views[v] for v in rest])
        tokens = dict(zip([*chosen, *rest], [*h[:, 0].chunk(len(chosen)), *local], strict=True))
        every = [tokens[v] for v in range(len(views))]
        return {"views": every, "patches": self._hidden(h, batch["places"]), **self.beside(h)}

    def targets(self, batch: Batch) -> Encoded:
        """The teacher's, of global views."""
        views, masked = self.compared(batch), self.teacher.model.get_submodule("masked")
        chosen = global_views(views)
        h = masked(torch.cat([self.cast(views[g]) for g in chosen]))
        return {"views": [*h[:, 0].chunk(len(chosen))], "patches": self._hidden(h, batch["places"])}

    def compared(self, batch: Batch) -> list[Tensor]:
        """The views that class tokens are of."""
        return batch["views"]

    def beside(self, h: Tensor) -> dict[str, Tensor]:
        """What else of the student's tokens h (G B, P + L, E) of global views the loss needs."""
        return {}

    def _hidden(self, h: Tensor, places: Tensor) -> Tensor:
        """The patches at places (B, G, M) of h (G B, P + L, E), view after view: (B, G M, E)."""
        (B, G, M), prefix = places.shape, self.masked.prefix
        of = gather_tokens(h[:, prefix:], places.transpose(0, 1).reshape(G * B, M))
        return of.view(G, B, M, -1).transpose(0, 1).flatten(1, 2)

    def loss(self, encoded: Encoded, batch: Batch) -> dict[str, Any]:
        cfg, temp = self.cfg, at(self.cfg.teacher_temp, self.clock.progress)
        temps, teacher = (cfg.student_temp, temp), self.teacher.model
        student = encode_views(self.student["head"], encoded["views"])
        with torch.no_grad():
            taught = encode_views(teacher.get_submodule("head"), batch["targets"]["views"])
        views = self.compared(batch)
        centers, pairs = [self.assign.of(taught, temp)], self.pairs(views)
        terms = sum(map(sum, others(views)))
        dino = cross_entropies(student, taught, centers[0], pairs, temps) / terms

        count = batch["count"]
        rows, weight = packed(
            count, self.most, None if can_read_values(count) else self.bound(count)
        )
        head = "patch_head" if "patch_head" in self.student else "head"
        some = encoded["patches"].flatten(0, 1)[rows]
        patches = self.student[head](some)
        with torch.no_grad():
            there = (weight > 0).to(some)
            wanted = batch["targets"]["patches"].flatten(0, 1)[rows]
            wanted = teacher.get_submodule(head)(wanted) * there[:, None]
        centers += [self.assign_patches.of([wanted], temp, there)]
        ibot = cross_entropies([patches], [wanted], centers[1], [[1.0]], temps, weight)

        koleo = dino.new_zeros(())
        for g in global_views(views) if cfg.koleo_weight else ():
            koleo = koleo + self.koleo(encoded["views"][g])
        loss = cfg.dino_weight * dino + cfg.ibot_weight * ibot + cfg.koleo_weight * koleo
        losses = {"loss": loss, "dino_loss": dino, "ibot_loss": ibot, "koleo_loss": koleo}
        told = watched(encoded["views"][:1], taught[0], temp, centers[0])
        of_patches = watch.of_teacher(wanted[: watch.ROWS], temp, centers[1])
        told = {**watch.prefixed("dino", told), **watch.prefixed("patch", of_patches)}
        kept = [self.assign.kept(taught), self.assign_patches.kept([wanted], there.sum())]
        return {**losses, **told, "keep": kept}

    def pairs(self, views: list[Tensor]) -> list[list[float]]:
        """The weight of each view's cross-entropy with each global view."""
        return others(views)

    def on_step(self, keep: Any, progress: float) -> None:
        self.clock.progress = progress
        self.assign.move(keep[0])
        self.assign_patches.move(keep[1])
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
