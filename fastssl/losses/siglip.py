"""SigLIP's loss: every image-text pair by itself is a match or is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import (
    Group,
    all_gather_nograd,
    all_gather_rows,
    rank,
    shift,
    world_size,
)
from fastssl.kernels import same_group
from fastssl.kernels.common import FirstOrder, first_order
from fastssl.kernels.pairwise import Masks, as_number, pairwise_sigmoid, pairwise_sigmoid_grads
from fastssl.kernels.pairwise import SigmoidNeed as Need
from fastssl.kernels.pairwise import SigmoidResults as Results
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch
from fastssl.losses._open_clip import ImageTextLoss, logits


class SigLIPLoss(ImageTextLoss):
    """Each image matches its own text, and none of all the others.

    The formula is `siglip_reference`, in nats, of the B images of this rank and all ranks' texts.

    Shapes   image_features, text_features (B, D): a pair in each row, any float dtype, used as they
             are: normalize them first.  logit_scale, logit_bias: numbers or tensors of one element,
             with gradients; the scale as it multiplies (the model learns its logarithm), the bias
             None for 0.  Recommended at the start: scale 10 (its logarithm ln 10), bias -10, so
             that the B - 1 negatives of a row do not outweigh its one positive.
    Returns  scalar float32 (float64 for float64); with output_dict=True as "contrastive_loss" of a
             dict.  0 <= loss; W B ln 2 on W ranks where scale and bias are 0.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; other
             strategies; a dist_impl that open_clip has not.  A non-finite input is no error: it
             gives a non-finite loss.
    Ranks    the mean over ranks of value and gradient is the joined batch's.  "gather": the
             texts are gathered once, in their own dtype.  "ring": they travel from rank to rank,
             each beside the gradient it collects, and no rank holds more than its own texts and two
             others' blocks; the gradients are made in the forward, so every rank must multiply its
             loss by the same factor before backward.
             process_group=LOCAL contrasts within each rank's batch.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Zhai et al. 2023, SigLIP, arXiv:2303.15343, section 3.2; the ring is of 3.3.
    Differs  from open_clip.loss.SigLipLoss, whose value and gradient it has: the group tells rank
             and world_size, and the strategy how texts travel, whatever is given for them and for
             dist_impl; labels are not cached, so that there are no labels and prev_num_logits;
             holds no (B, B) scores; sums in float32 whatever the dtype.  get_logits and
             get_ground_truth, for a subclass with a forward of its own, hold open_clip's.

    >>> x = torch.eye(2)
    >>> round(SigLIPLoss()(x, x, 10.0, -10.0).item(), 4)  # ln 2 and log1p(e^-10) a row
    0.6932
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        strategy: str = "gather",
        process_group: Group = None,
    ) -> None:
        super().__init__(cache_labels, strategy, process_group)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl must be one that open_clip has, got {dist_impl!r}")
        self.dist_impl = dist_impl or "bidir"

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """All (B, B) scores of images (rows) with texts, of this rank."""
        return logits(image_features, text_features, logit_scale, logit_bias)

    def get_ground_truth(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """1 where a pair matches and -1 elsewhere, of (B, B); negative_only: nowhere a match."""
        match = torch.eye(num_logits, device=device, dtype=dtype)
        return -torch.ones_like(match) if negative_only else 2 * match - 1

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        x, t, group = image_features, text_features, self.process_group
        ahead = labels is None and _ahead.fits(group, x, t)
        if not ahead:
            check_batch(group, ids={"labels": labels}, image_features=x, text_features=t)
        numbers = _number(logit_scale), 0.0 if logit_bias is None else _number(logit_bias)
        if ahead:
            scale, bias = numbers
            scale = as_number("logit_scale", scale, x)
            loss = _ahead.siglip(x, t, scale, as_number("logit_bias", bias, x))
            if loss is not None:
                return {"contrastive_loss": loss} if output_dict else loss
        ids = _ids(len(x), labels, group, x.device)
        if world_size(group) > 1 and self.strategy == "ring":
            total = _ring(x, t, *numbers, ids, group)
        else:
            texts = all_gather_rows(t, group, check=False)
            positive = same_group if len(texts) == len(x) and labels is None else same_group(*ids)
            total = pairwise_sigmoid(x, texts, *numbers, positive=positive)
        loss = total / len(x)
        return {"contrastive_loss": loss} if output_dict else loss


def _number(value: float | Tensor) -> float | Tensor:
    one = isinstance(value, Tensor) and value.ndim and value.numel() == 1
    return value.reshape(()) if one else value  # pyright: ignore[reportAttributeAccessIssue]


def _ids(
    b: int, labels: Tensor | None, group: Group, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of this rank's images, and of all ranks' texts: equal where a pair matches."""
    if labels is not None:
        return labels, all_gather_nograd(labels, group, check=False)
    texts = torch.arange(b * world_size(group), device=device)
    return texts[b * rank(group) : b * (rank(group) + 1)], texts


def _pairs_with(ids: tuple[Tensor, Tensor], owner: int) -> Masks:
    """Pairs of this rank's images and the texts of one rank."""
    images, texts = ids
    b = len(images)
    return same_group(images, texts[b * owner : b * (owner + 1)])


def _ring(
    x: Tensor, t: Tensor, scale: Any, bias: Any, ids: tuple[Tensor, Tensor], group: Group
) -> Tensor:
    learned = torch.is_grad_enabled()
    need = tuple(learned and isinstance(v, Tensor) and v.requires_grad for v in (x, t, scale, bias))
    return _Ring.call(x, t, scale, bias, need, ids, group)  # pyright: ignore[reportReturnType]


class _Ring(FirstOrder):
    """This rank's images against every rank's texts, a block of them at a time."""

    @staticmethod
    def forward(ctx: Any, x, t, scale, bias, need, ids, group):
        total, *grads = _travel(x, t, (scale, bias), need, ids, group)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [
            v.dtype if n else None for v, n in zip((x, t, scale, bias), need, strict=True)
        ]
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *((grad * g).to(dtype) if dtype else None for g, dtype in made), None, None, None


def _travel(
    x: Tensor,
    t: Tensor,
    numbers: tuple[Any, Any],
    need: Need,
    ids: tuple[Tensor, Tensor],
    group: Group,
) -> Results:
    """The sum over this rank's images and all texts, and the gradients of it.

    That of t is of all ranks' sums: each rank adds its part to the block's, which goes on with it
    and is at home after W hops, where the texts themselves make W - 1.
    """
    W, me = world_size(group), rank(group)
    block, back, dt = t.detach().contiguous(), None, x.new_empty(0)
    sums: list[Tensor] = []
    for hop in range(W):
        coming = shift([block], 1, group) if hop + 1 < W else None  # while products are made
        positive = _pairs_with(ids, (me - hop) % W)
        total, dx, dt, dscale, dbias = pairwise_sigmoid_grads(
            x, block, *numbers, positive=positive, need=need
        )
        if need[1]:
            back = shift([back()[0].add_(dt) if back else dt], 1, group)
        parts = [total, dx, dscale, dbias]
        sums = [a.add_(b) for a, b in zip(sums, parts, strict=True)] if sums else parts
        block = coming()[0] if coming else block
    return Results(*sums[:2], back()[0] if back else dt, *sums[2:])


def siglip_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """The formula, all (B, B) scores at once, in one process."""
    scores = logit_scale * image_features @ text_features.T + logit_bias
    labels = torch.arange(len(scores), device=scores.device) if labels is None else labels
    sign = 2 * (labels[:, None] == labels).to(scores.dtype) - 1
    return -F.logsigmoid(sign * scores).sum() / len(scores)
