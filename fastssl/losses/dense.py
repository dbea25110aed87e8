"""Contrast between positions: each local feature must find its match among the other places."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group, all_reduce_sum, require_all_even, world_size
from fastssl.kernels import exclude_self
from fastssl.kernels.common import FirstOrder, first_order, full_precision
from fastssl.losses._checks import check_embeddings, check_ids
from fastssl.losses._contrastive import ContrastiveLoss, info_nce, joined_ids
from fastssl.losses._sharded import Rule, sharded_lse
from fastssl.losses._unit import unit

SCORES = 2**22  # how many scores are held at a time, 16 MB; or those of one image, if more


class DenseInfoNCELoss(ContrastiveLoss):
    """InfoNCE of local features: position l of one view must find its match m(l) in the other.

    The formula is `dense_info_nce_reference`, in nats; negatives are the other positions of the
    image (negatives="image"), or of all images ("batch").  One direction: the symmetric loss is
    loss(z0, z1) + loss(z1, z0), with either's match.

    Shapes   z0 (B, L, D), z1 (B, M, D): local features of two views of the same B images; any float
             dtype.  match (B, L): integers, the position in z1 of the same image that shows what
             l shows; one below 0 or past M - 1: none, and l is left out.  None: m(l) = l, L = M.
    Returns  scalar float32: the mean over this rank's matched positions, weighed so that the mean
             over ranks is that over all matched ones; 0 when there is none.  0 <= loss; when all
             features agree ln M ("image") or ln(B M) ("batch").
    Memory   "image": the L x M scores of a few images at a time, made again for backward: 16 MB in
             float32, or one image's if more.  "batch": no scores are held.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; a match
             left out with L != M; negatives that are neither; temperature not > 0.
    Ranks    "batch" meets the positions of all ranks (strategy: "gather" or "ring").  The mean over
             ranks of value and gradient is the joined batch's.
    Source   Chaitanya et al. 2020, arXiv:2006.10511 ("image"); Wang et al. 2021, DenseCL,
             arXiv:2011.09157, with the batch's keys in the queue's place ("batch").

    >>> z = torch.eye(4).expand(2, 4, 4)
    >>> round(DenseInfoNCELoss(temperature=0.5)(z, z).item(), 4)  # ln(e^2 + 3) - 2
    0.3408
    """

    def __init__(
        self,
        temperature: float = 0.1,
        negatives: str = "image",
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, process_group=process_group, strategy=strategy)
        if negatives not in ("image", "batch"):
            raise ValueError(f"negatives must be 'image' or 'batch', got {negatives!r}")
        self.negatives = negatives

    def forward(self, z0: Tensor, z1: Tensor, match: Tensor | None = None) -> Tensor:
        group = self.process_group
        require_all_even(group, z0=z0, z1=z1, match=match)
        _check(z0, z1, match)
        q, k = unit(z0), unit(z1)
        B, L, _ = q.shape
        M = k.shape[1]
        match = torch.arange(L, device=q.device).expand(B, L) if match is None else match.long()
        matched = (match >= 0) & (match < M)
        match = match.clamp(0, M - 1)
        # By index, not gather: the sum of its backward has one order.
        keys = k.flatten(0, 1)[torch.arange(B, device=k.device).unsqueeze(1) * M + match]
        positive = (q * keys).sum(-1) / self.temperature
        across = self._across if self.negatives == "batch" else self._within
        losses = torch.where(matched, info_nce(positive, across(q, k, match, z0.dtype)), 0)
        count = all_reduce_sum(matched.sum(), group)
        return losses.sum() * world_size(group) / count.clamp(min=1)

    def _within(self, q: Tensor, k: Tensor, match: Tensor, _: torch.dtype) -> Tensor:
        """(B, L) log-sum-exps of an image's other positions."""
        return _ImageLSE.call(q, k, match, 1 / self.temperature)  # pyright: ignore[reportReturnType]

    def _across(self, q: Tensor, k: Tensor, match: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L) log-sum-exps of all other positions of the joined batch.  dtype: see TwoViews."""
        B, M = k.shape[:2]
        ids = joined_ids(B * M, self.process_group, k.device)
        own = (ids[::M].unsqueeze(1) + match).flatten()
        options = {"process_group": self.process_group, "strategy": self.strategy}
        rows, keys = (x.flatten(0, 1).to(dtype) for x in (q, k))
        rules = (Rule(exclude_self, own, ids),)
        lse, _ = sharded_lse(rows, keys, 1 / self.temperature, rules=rules, **options)
        return lse.view(match.shape)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, negatives={self.negatives!r}"


class _ImageLSE(FirstOrder):
    """Log-sum-exp over an image's positions but the match, of a few images at a time.

    Kept are each row's maximum m and sum l apart; a row without others is -inf.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, match: Tensor, scale: float) -> Tensor:
        m, total = q.new_empty(2, *match.shape)
        for i in _parts(q, k):
            s = _scores(q[i], k[i], match[i], scale)
            m[i] = s.amax(-1).clamp_(min=torch.finfo(s.dtype).min)
            total[i] = s.sub_(m[i].unsqueeze(-1)).exp_().sum(-1)
        ctx.save_for_backward(q, k, match, m, total)
        ctx.scale = scale
        return m + total.log()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, match, m, total = ctx.saved_tensors
        weight = torch.where(total > 0, grad * ctx.scale / total, 0)
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        for i in _parts(q, k):
            s = _scores(q[i], k[i], match[i], ctx.scale)
            w = s.sub_(m[i].unsqueeze(-1)).exp_().mul_(weight[i].unsqueeze(-1))
            dq[i], dk[i] = w @ k[i], w.mT @ q[i]
        return dq, dk, None, None


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    images = max(1, SCORES // (q.shape[1] * k.shape[1]))
    return [slice(start, start + images) for start in range(0, len(q), images)]


def _scores(q: Tensor, k: Tensor, match: Tensor, scale: float) -> Tensor:
    """(images, L, M), the matches at -inf."""
    with full_precision(q.device):
        return ((q * scale) @ k.mT).scatter_(2, match.unsqueeze(-1), -torch.inf)


def _check(z0: Tensor, z1: Tensor, match: Tensor | None) -> None:
    check_embeddings("B, L, D", z0=z0)
    check_embeddings("B, M, D", z1=z1)
    if (len(z0), z0.shape[2]) != (len(z1), z1.shape[2]):
        got = f"{tuple(z0.shape)} and {tuple(z1.shape)}"
        raise ValueError(f"z0 and z1 must be (B, L, D) and (B, M, D), got {got}")
    if z0.dtype != z1.dtype or z0.device != z1.device:
        got = f"{z0.dtype} on {z0.device} and {z1.dtype} on {z1.device}"
        raise ValueError(f"z0 and z1 must share dtype and device, got {got}")
    if match is None and z0.shape[1] != z1.shape[1]:
        raise ValueError(f"without match L must be M, got {z0.shape[1]} and {z1.shape[1]}")
    if match is not None:
        check_ids("match", match, z0, axes=2)


def dense_info_nce_reference(
    z0: Tensor, z1: Tensor, match: Tensor, temperature: float, negatives: str
) -> Tensor:
    """The formula, all scores at once, in one process."""
    (B, M, _), q, k = z1.shape, unit(z0), unit(z1)
    matched = (match >= 0) & (match < M)
    if negatives == "image":
        scores, target = torch.einsum("bld,bmd->blm", q, k), match
    else:
        scores = torch.einsum("bld,nd->bln", q, k.flatten(0, 1))
        target = match + M * torch.arange(B, device=k.device)[:, None]
    return F.cross_entropy(scores[matched] / temperature, target[matched].long())
