"""T-JEPA: from some columns of a row, predict what a teacher makes of other columns.

    t = layer_norm(teacher(all columns))                   no gradient; E features a column
    p_m = predictor(student(context), columns of set m)    M target sets, each on its own
    loss = mean over sets, columns and features of (p_mj - t_j)^2

The context and every target set have no column in common; target sets may.  No augmentation is
needed: a row has none that keeps its meaning.  The [REG] tokens of both encoders belong to no
column, and are never predicted: they keep the features from collapsing.  `target_std`, the spread
of the targets over the rows, is logged to be watched.
Source: Thimonier et al. 2024, T-JEPA, arXiv:2410.05016, section 3.  There the sizes of the context
and of the targets are drawn for each batch, and targets are not normalized; here sizes are fixed,
and targets are layer-normed as I-JEPA's (arXiv:2301.08243) unless `norm_targets` is false.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels import gather_tokens
from fastssl.masking import Blocks, random_masking
from fastssl.models import EMA, LatentPredictor, TableTransformer
from fastssl.random import hashes
from fastssl.schedules.config import at

from .base import Batch, Method
from .configs import TJEPAConfig
from .places import DrawnOnce


class _Columns(nn.Module):
    """The encoder as a student or a teacher: rows (B, F), ids (B, K) -> (B, R + K, E)."""

    def __init__(self, table: TableTransformer):
        super().__init__()
        self.table = table

    def forward(self, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        return self.table.encode(self.table.tokens(rows, ids))


class TJEPA(Method):
    preset, views, couples_batch = "table", 1, False

    def __init__(self, encoder: nn.Module, cfg: TJEPAConfig):
        super().__init__()
        if not isinstance(encoder, TableTransformer):
            got = type(encoder).__name__
            raise ValueError(f"method.name=tjepa trains a table_transformer, got {got}")
        self.cfg, self.places = cfg, DrawnOnce(self.mask)
        self.student = _Columns(encoder)
        self.teacher = EMA(self.student)
        columns = encoder.columns
        self.context, self.target = (max(1, round(s * columns)) for s in (cfg.context, cfg.target))
        if self.context + self.target > columns:
            raise ValueError(
                f"method.context={cfg.context} and method.target={cfg.target} want "
                f"{self.context} and {self.target} of {columns} columns, with none in common"
            )
        width = encoder.width
        self.predictor = LatentPredictor(width, **cfg.decoder, patches=columns, values=width)

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        return self.student.table

    def networks(self) -> dict[str, nn.Module]:
        teacher = self.teacher.model.get_submodule("table")
        return {"encoder": self.encoder, "teacher": teacher}

    def mask(self, seeds: Tensor) -> Blocks:
        """Each row's context (B, C) and targets (B, M, T), ascending; seeds (B,) int64."""
        M, T, columns = self.cfg.blocks, self.target, self.student.table.columns
        context, others, _ = random_masking(seeds, columns, self.context)
        own = hashes(seeds, M).flatten()  # a seed for each set of a row
        places = random_masking(own, others.shape[1], T).visible
        return Blocks(
            context, others.repeat_interleave(M, 0).gather(1, places).unflatten(0, (-1, M))
        )

    def encode(self, batch: Batch) -> Tensor:
        """Predicted features (B, M, T, E) float32."""
        sets = self.places(batch["seeds"])
        context = self.student(self.cast(batch["views"][0]), sets.context)
        return self.predictor(context, sets.context, sets.targets).float()

    def targets(self, batch: Batch) -> Tensor:
        return self.teach(self.cast(batch["views"][0]), self.places(batch["seeds"]).targets)

    def loss(self, encoded: Tensor, batch: Batch) -> dict[str, Tensor]:
        wanted = batch["targets"]
        spread = wanted.flatten(1, 2).mean(1).std(0, correction=0).mean()
        return {"loss": F.mse_loss(encoded, wanted), "target_std": spread}

    @torch.no_grad()
    def teach(self, rows: Tensor, ids: Tensor) -> Tensor:
        """What the teacher makes of the columns ids (B, M, T): (B, M, T, E) float32."""
        self.teacher.eval()
        h = self.teacher(rows)[:, self.student.table.registers :].float()
        h = F.layer_norm(h, h.shape[-1:]) if self.cfg.norm_targets else h
        return gather_tokens(h, ids.flatten(1)).unflatten(1, ids.shape[1:])

    def on_step(self, keep: Any, progress: float) -> None:
        self.teacher.update(self.student, at(self.cfg.momentum, progress))
