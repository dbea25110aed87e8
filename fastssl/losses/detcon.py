"""DetCon: regions of an image, pooled by a segmentation, find themselves in the other view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, require_all_even
from fastssl.kernels import exclude_self
from fastssl.kernels.common import accumulator, ahead, full_precision
from fastssl.kernels.pairwise import Pairs, lse_ahead
from fastssl.losses import _ahead
from fastssl.losses._checks import check_embeddings, check_ids
from fastssl.losses._contrastive import ContrastiveLoss, joined_ids
from fastssl.losses._sharded import Rule, sharded_lse
from fastssl.losses._unit import unit


class DetConBLoss(ContrastiveLoss):
    """Each predicted region must find its targets of the other view among all targets.

    The formula is `detcon_reference`, in nats.  Targets of the same view, image and mask are left
    out; the mean over the positives stands outside the logarithm, so that a region meets their
    mean; a mask that fills k places of an image counts once, not k times.

    Shapes   pred_view0, pred_view1, target_view0, target_view1 (B, M, D): M regions of B images;
             any float dtype, one for all.  mask_view0, mask_view1 (B, M): which mask of its image
             a region is of, integers of any size.  The gradient goes to targets too: detach them.
    Returns  scalar float32: the sum over the views of the mean over this rank's B M regions; one
             without a positive counts 0.
    Memory   one log-sum-exp over (2 B M)^2 pairs, streamed; where predictions and targets are the
             same tensors, each pair once.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; masks that
             are not (B, M) integers; temperature not > 0.
    Ranks    as NTXentLoss: each rank's regions meet the targets of all.
    On a CPU in one process the gradient is made with the loss, and backward only multiplies.
    Source   Henaff et al. 2021, arXiv:2103.10957, eq. 1 to 3; weights as in the authors' code.
    Differs  from lightly.loss.DetConBLoss, whose value and gradient it has in one process:
             normalizes and sums in float32 whatever the dtype; temperature > 0; no eps.

    >>> z, mask = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [0, 1]])
    >>> round(DetConBLoss(0.5)(z, z, z, z, mask, mask).item(), 4)  # 2 ln(e^2 + 6) - 4
    1.1889
    """

    def __init__(
        self,
        temperature: float = 0.1,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        preds = {"pred_view0": pred_view0, "pred_view1": pred_view1}
        targets = {"target_view0": target_view0, "target_view1": target_view1}
        masks = {"mask_view0": mask_view0, "mask_view1": mask_view1}
        return _detcon(self, preds, targets, masks)


class DetConSLoss(ContrastiveLoss):
    """DetConBLoss of views that are their own targets: SimCLR's form.

    Shapes, returns and what is raised: DetConBLoss, with view0 and view1 (B, M, D).
    Source   Henaff et al. 2021, arXiv:2103.10957, eq. 1 to 3.
    Differs  from lightly.loss.DetConSLoss as DetConBLoss from lightly's; no detconbloss within.

    >>> z, mask = torch.eye(4).view(2, 2, 4), torch.tensor([[0, 1], [0, 1]])
    >>> round(DetConSLoss(0.5)(z, z, mask, mask).item(), 4)
    1.1889
    """

    def __init__(
        self,
        temperature: float = 0.1,
        gather_distributed: bool = BUILT,
        *,
        process_group: Group = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(temperature, gather_distributed, process_group, strategy)

    def forward(
        self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor
    ) -> Tensor:
        views = {"view0": view0, "view1": view1}
        masks = {"mask_view0": mask_view0, "mask_view1": mask_view1}
        return _detcon(self, views, views, masks)


def _detcon(
    loss: ContrastiveLoss,
    preds: dict[str, Tensor],
    targets: dict[str, Tensor],
    masks: dict[str, Tensor],
) -> Tensor:
    group, named = loss.process_group, preds | targets
    require_all_even(group, **named, **masks)
    check_embeddings("B, M, D", **named)
    first = next(iter(named.values()))
    for name, mask in masks.items():
        check_ids(name, mask, first, axes=2)
    B, M, _ = first.shape
    alike = all(x is y for x, y in zip(preds.values(), targets.values(), strict=True))
    mask = torch.stack([x.long() for x in masks.values()])  # (2, B, M)
    own = mask.unsqueeze(-1) == mask.unsqueeze(-2)
    across = mask.unsqueeze(-1) == mask.flip(0).unsqueeze(-2)
    # A region's id is the place of the first one of its view, image and mask.
    places = joined_ids(2 * B * M, group, first.device).view_as(mask)
    ids = places.gather(-1, own.int().argmax(-1)).flatten()
    found, acc = across.sum(-1), accumulator(first.dtype)
    share = (across / found.clamp(min=1).unsqueeze(-1)).to(acc)
    weight = (found > 0) / (own.sum(-1).to(acc) * (B * M))
    if _ahead.fits(group, first, axes=3):
        views = [*preds.values()] if alike else [*preds.values(), *targets.values()]
        made = _alone(views, ids, share, weight, loss.temperature)
        if made is not None:
            return made
    rows = _side(preds)
    keys = rows if alike else _side(targets)
    scale, rules = 1 / loss.temperature, (Rule(exclude_self, ids, ids),)
    lse, _ = sharded_lse(
        rows, keys, scale, rules=rules, process_group=group, strategy=loss.strategy
    )
    with full_precision(rows.device):
        p, t = (x.to(acc).view(2, B, M, -1) for x in (rows, keys))
        positive = (p * (share @ t.flip(0))).sum(-1) * scale
        return (weight * (lse.view_as(mask) - positive)).sum()


def _alone(
    views: Sequence[Tensor], ids: Tensor, share: Tensor, weight: Tensor, temperature: float
) -> Tensor | None:
    """The loss of one process, its gradient made with it; None where `_ahead.nt_xent` is.

    views: the predictions and, where they are others, the targets.  share (2, B, M, M): of each
    target of the other view among a region's positives; weight (2, B, M): of a region.
    """
    fresh = [_with_norms(views)]
    low, high = fresh[0][1].aminmax()
    if not (low >= 1e-9 and high <= 1e15):
        return None
    masks, flat = exclude_self(ids), weight.flatten()

    def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        wide, norms = fresh.pop() if fresh else _with_norms(tensors)
        y, (B, M, D) = wide.div_(norms), tensors[0].shape
        sides = y.to(tensors[0].dtype).chunk(len(tensors) // 2)
        rows, keys = sides[0], sides[-1]
        scale, value = y.new_full((), 1 / temperature), y

        def upstream(lse: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal value
            value = torch.dot(lse, flat)
            return flat, none

        pairs = Pairs(rows, keys, scale, None, *masks.ids(), masks.key, rows is keys)
        wanted = any(need[:2]), any(need[2:]), False, False
        made = lse_ahead(pairs, False, upstream, wanted, 1 / temperature)
        p, t = (x.to(y.dtype).view(2 * B, M, D) for x in (rows, keys))
        by = share.view(2 * B, M, M)
        t = t.view(2, B, M, D).flip(0).view(2 * B, M, D)  # the other view's
        pull = torch.bmm(by, t).mul_(weight.view(2 * B, M, 1) * scale)
        value = value - (p * pull).sum()
        if not any(need):
            return value, tensors
        sides = [made.q.sub_(pull.view(-1, D)) if wanted[0] else y.chunk(len(sides))[0]]
        if rows is keys or wanted[1]:
            back = torch.bmm(by.mT, p * (weight.view(2 * B, M, 1) * scale))
            back = back.view(2, B, M, D).flip(0).reshape(-1, D)
            sides += [(made.q if rows is keys else made.k).sub_(back)]
        g = sides[0] if rows is keys else torch.cat([sides[0], sides[-1]])
        return value, _ahead.unit_backward_(g, y, norms).view(-1, B, M, D).unbind()

    return ahead(run, *views)


def _with_norms(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of all views, one after the other, and their lengths."""
    z = torch.stack([x.detach() for x in views]).flatten(0, 2)
    wide = z.to(accumulator(z.dtype))
    return wide, torch.linalg.vector_norm(wide, dim=1, keepdim=True)


def _side(views: dict[str, Tensor]) -> Tensor:
    """(2 B M, D) rows of length one, view after view, in the views' dtype: see TwoViews."""
    z = torch.stack(tuple(views.values()))
    return unit(z).to(z.dtype).flatten(0, 2)


def detcon_reference(
    preds: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    masks: tuple[Tensor, Tensor],
    temperature: float,
) -> Tensor:
    """The formula, region by region, in one process."""
    total = preds[0].new_zeros(())
    p, t = ([unit(x) for x in side] for side in (preds, targets))
    B, M = masks[0].shape
    for v in (0, 1):
        for i in range(B):
            for r in range(M):
                scores = [p[v][i, r] @ x.flatten(0, 1).T / temperature for x in t]
                same = masks[v][i] == masks[v][i, r]
                scores[v].view(B, M)[i].masked_fill_(same, -torch.inf)
                share = scores[1 - v] - torch.cat(scores).logsumexp(0)
                found = share.view(B, M)[i][masks[1 - v][i] == masks[v][i, r]]
                if len(found):
                    total = total - found.mean() / same.sum()
    return total / (B * M)
