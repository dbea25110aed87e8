"""PaKA: an image's patches are to one another as they are to the teacher, by kernel alignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_reduce_sum, require_all_even, world_size
from fastssl.kernels.common import (
    FirstOrder,
    accumulator,
    can_read_values,
    finished,
    first_order,
    full_precision,
)
from fastssl.kernels.common.chunks import row_spans
from fastssl.losses._checks import check_counts, check_embeddings
from fastssl.losses._loss import Loss

EPS = 1e-6  # of |K|^2, in whose place it stands below


class PatchKernelAlignmentLoss(Loss):
    """The mean over images of 1 - <K_s, K_t> / (|K_s| |K_t|), the centered kernel alignment.

    K = Z Z' of an image's patches Z less their mean.  The formula is
    `patch_kernel_alignment_reference`.

    Shapes   student_features, teacher_features (B, N, D), any float dtype, one for both; mask
             (B, N) bool: patches that are left out.  An image with fewer than two is too.
             max_tokens: of an image with more, so many drawn at random, left-out ones last.
    Returns  scalar float32 in 0..1; 0 where no image is left.  The gradient goes to the student
             alone.  A student very near the teacher has a loss with all its digits.
    Memory   patches twice, and the kernels (N, N) of a few images at a time.
    Raises   ValueError: shapes, dtypes or devices that disagree, or other ones on another rank; a
             mask that is no (B, N) bool; a max_tokens below 2.
    Ranks    the mean is over the images of all ranks that are not left out, however many a rank
             has of them; gather_distributed=False: each rank's own.
    Source   Patch-level kernel alignment (PaKA) 2025, arXiv:2509.05606; Kornblith et al. 2019,
             arXiv:1905.00414, eq. 3, of linear kernels.
    Differs  from lightly.loss.PatchKernelAlignmentLoss, whose value and gradient it has in one
             process: joins ranks, where lightly weighs a rank's images by how few they are.

    >>> x = torch.eye(3)[None]
    >>> loss = PatchKernelAlignmentLoss()
    >>> round(loss(x, 5 * x).item(), 4), round(loss(x[..., :1], x[..., 1:2]).item(), 4)  # 1 - 1/4
    (0.0, 0.75)
    """

    shown = ("max_tokens",)

    def __init__(
        self,
        max_tokens: int | None = None,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        if max_tokens is not None:
            check_counts(2, max_tokens=max_tokens)
        self.max_tokens = max_tokens

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        group, x, y = self.process_group, student_features, teacher_features.detach()
        require_all_even(group, student_features=x, teacher_features=y, mask=mask)
        check_embeddings("B, N, D", student_features=x, teacher_features=y)
        _check_mask(mask, x)
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else ~mask
        if self.max_tokens is not None and x.shape[1] > self.max_tokens:
            chance = torch.rand(x.shape[:2], device=x.device).masked_fill(~kept, torch.inf)
            at = chance.topk(self.max_tokens, dim=1, largest=False).indices
            x, y = (z.gather(1, at.unsqueeze(2).expand(-1, -1, z.shape[2])) for z in (x, y))
            kept = kept.gather(1, at)
        with full_precision(x.device):
            w = kept.to(accumulator(x.dtype)).unsqueeze(2)
            need = x.requires_grad and torch.is_grad_enabled()
            each = Misalignment.call(_centered(x, w), _centered(y, w), need)
            left = (w.sum((1, 2)) >= 2).to(each.dtype)
            count = all_reduce_sum(left.sum(), group).clamp_min(1)
            return (each * left).sum() * (world_size(group) / count)


class Misalignment(FirstOrder):
    """1 - CKA of each image's centered patches x, y (B, N, D): (B,).

    Of kernels of length one it is |X - Y|^2 / 2, which keeps the digits that 1 - <X, Y> loses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, need: bool) -> Tensor:
        value, slope = x.new_empty(len(x)), torch.empty_like(x) if need else None
        for i in row_spans(x, 4 * x.shape[1] ** 2):
            own, size = _shortened(x[i])
            k, length, full = _kernel(own, size)
            apart, _, y_full = _kernel(*_shortened(y[i]))
            torch.sub(k, apart, out=apart)
            far = torch.linalg.vector_norm(apart, dim=(1, 2)).square()
            value[i] = lost = far / 2 + (1 - (full + y_full) / 2)
            if slope is not None:
                # Where x's kernel is shorter than EPS its length is none of x's: only -Y is left.
                share = torch.where(full == 1, lost, 1)[:, None, None]
                slope[i] = apart.addcmul_(k, share, value=-1) @ own * (2 / (length * size))
        ctx.save_for_backward(slope)
        return finished(value)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad[:, None, None], None, None


def _shortened(x: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of at most about length one, and by what they were divided, (b, 1, 1): at least 1.

    Of longer ones the fourth powers are no numbers.
    """
    size = torch.linalg.vector_norm(x, torch.inf, dim=(1, 2), keepdim=True).clamp_min_(1)
    return x / size, size


def _kernel(x: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x x' over its length, the length (b, 1, 1), and the square of what is then left of it (b,):
    1, or less of one whose square, of size x, is below EPS."""
    k, least = x @ x.mT, EPS / size.flatten() ** 4
    square = torch.linalg.vector_norm(k, dim=(1, 2)).square_()
    whole = torch.maximum(square, least)
    length = whole.sqrt()[:, None, None]
    return k.div_(length), length, square / whole


def _centered(x: Tensor, w: Tensor) -> Tensor:
    """Patches less the mean of those of weight 1; 0 of the others."""
    x = x.to(w.dtype)
    return (x - (x * w).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp_min(1)) * w


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is not None and (
        mask.shape != x.shape[:2] or mask.dtype != torch.bool or mask.device != x.device
    ):
        got = f"{tuple(mask.shape)} {mask.dtype} on {mask.device}"
        raise ValueError(f"mask must be {tuple(x.shape[:2])} bool on {x.device}, got {got}")


def patch_kernel_alignment_reference(x: Tensor, y: Tensor) -> Tensor:
    """The formula for images without a mask, in one process, with all kernels (B, N, N)."""
    if x.shape[1] < 2:
        return (0 * x).sum()
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y.detach()))
    k, other = x @ x.mT, y @ y.mT
    length = [z.square().sum((1, 2)).clamp_min(EPS).sqrt() for z in (k, other)]
    return (1 - (k * other).sum((1, 2)) / (length[0] * length[1])).mean()


def roi_resample_to_grid(feature_map: Tensor, boxes: Tensor, out_h: int, out_w: int) -> Tensor:
    """A box of each image's features on a grid of out_h x out_w, as patches (B, out_h out_w, C).

    feature_map (B, C, H, W), any float dtype; boxes (B, 4): x0, y0, x1, y1 in the map's places, x
    in 0..W and y in 0..H.  Every place of the grid is the mean of as many bilinear samples a side
    as it covers places of the map, as torchvision's roi_align (aligned) has them; a gradient goes
    to feature_map.  Two crops of an image, each with the box that they share, become comparable.
    Raises ValueError for other shapes, sizes below 1, and on a CPU for boxes that are not in the
    map.
    Differs from lightly's: by two small products an image, without torchvision.

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> roi_resample_to_grid(x, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), 2, 2).flatten()
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    if feature_map.ndim != 4 or 0 in feature_map.shape or not feature_map.is_floating_point():
        got = f"{tuple(feature_map.shape)} {feature_map.dtype}"
        raise ValueError(f"feature_map must be (B, C, H, W) floats, none empty, got {got}")
    B, _, H, W = feature_map.shape
    if boxes.shape != (B, 4) or boxes.device != feature_map.device:
        got = f"{tuple(boxes.shape)} on {boxes.device}"
        raise ValueError(f"boxes must be ({B}, 4) on {feature_map.device}, got {got}")
    check_counts(out_h=out_h, out_w=out_w)
    boxes = boxes.detach().to(accumulator(feature_map.dtype))
    if can_read_values(boxes):
        most = boxes.new_tensor([W, H])
        low, high = boxes[:, :2], boxes[:, 2:]
        if not ((low >= 0) & (low <= high) & (high <= most)).all():
            raise ValueError(f"boxes must be x0 <= x1 in 0..{W}, y0 <= y1 in 0..{H}, got {boxes}")
    with full_precision(feature_map.device):
        down = _bilinear(boxes[:, 1], boxes[:, 3], out_h, H)
        along = _bilinear(boxes[:, 0], boxes[:, 2], out_w, W)
        wide = feature_map.to(boxes.dtype)
        grid = torch.einsum("bph,bchw,bqw->bpqc", down, wide, along)
        return grid.flatten(1, 2).to(feature_map.dtype)


def _bilinear(low: Tensor, high: Tensor, bins: int, size: int) -> Tensor:
    """(B, bins, size): how much of each place is in each of the bins from low to high."""
    each = (high - low).view(-1, 1, 1) / bins
    counts, most = each.ceil(), -(-size // bins)
    i = torch.arange(most, device=low.device, dtype=low.dtype)
    p = torch.arange(bins, device=low.device, dtype=low.dtype).view(1, -1, 1)
    at = low.view(-1, 1, 1) - 0.5 + (p + (i + 0.5) / counts.clamp_min(1)) * each
    places = torch.arange(size, device=low.device, dtype=low.dtype)
    weight = (1 - (at.clamp(0, size - 1).unsqueeze(3) - places).abs()).clamp_min_(0)
    weight *= (i < counts).unsqueeze(3)
    return weight.sum(2) / counts.clamp_min(1)
