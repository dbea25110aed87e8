"""Patches in plain PyTorch: chunks of a batch that stay in cache.  patches.py says what it is.

    x (b, K, C, Q): the chosen patches of a chunk, channel after channel as they lie in memory
    error = pred - y,  y (b, K, Q, C) the target; slope = d loss / d pred, but for 1 / P
            l2: loss e^2, slope e (and a factor 2)      l1: |e|, sign(e)
            smooth_l1: e^2 / 2 inside -1..1, |e| - 1/2 outside; e cut to -1..1

A patch in memory is C * pt * ph runs of pw neighbors (in channels-last images pt * ph runs of
pw * C), and a run is copied whole: an index for each pixel costs three times as much.  Moments
know no order, so they are taken, by one fused call, before the channels are interleaved.  The
unbiased variance is the biased one's P / (P - 1): with eps and the result scaled to match, the two
normalizations are the same.  A patch's first value is taken off first, which leaves nothing to
cancel where the mean is far from zero.
For backward the slope is kept in pred's place, as many elements, which leaves one product.
Memory: the results and one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import row_spans

KINDS = ("l2", "l1", "smooth_l1")  # kernels know each by its place
Patch = tuple[int, int, int]  # pt, ph, pw


class Spec(NamedTuple):
    """What `error` computes.  eps: that of the normalization; None where pixels are left as is."""

    patch: Patch
    eps: float | None
    kind: str


def grid_view(images: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, T, H, W) as (B, gt, gh, gw, pt, ph, pw, C), without a copy whatever the strides."""
    for axis, side in zip((4, 3, 2), reversed(patch), strict=True):
        images = images.unflatten(axis, (-1, side))
    return images.permute(0, 2, 4, 6, 3, 5, 7, 1)


def _places(ids: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of image, and grid place in time, height and width, of each chosen patch."""
    image = torch.arange(len(ids), device=ids.device)[:, None]
    row = ids.div(columns, rounding_mode="floor")
    return image, row.div(rows, rounding_mode="floor"), row % rows, ids % columns


class _Pixels:
    """Images, as their memory lies: channels-last ones are wide images of one channel."""

    def __init__(self, images: Tensor, norm: Tensor | None, patch: Sequence[int]) -> None:
        (C, T, H, W), (pt, ph, pw) = images.shape[1:], patch
        last = images.permute(0, 2, 3, 4, 1)
        if not images.is_contiguous() and last.is_contiguous():
            images, patch = last.reshape(-1, 1, T, H, W * C), (pt, ph, pw * C)
            norm = None if norm is None else norm.repeat(1, pt * ph * pw)[:, None]
        elif norm is not None:
            norm = norm[..., None]
        self.images, self.norm, self.patch = images, norm, patch

    def width(self, chosen: int) -> int:
        """How many pixels a chunk holds of each image, of which `chosen` patches are read."""
        C, *size = self.images.shape[1:]
        read = chosen * C * math.prod(self.patch)
        return read if self.images.is_contiguous() else max(read, C * math.prod(size))

    def read(self, i: slice, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The patches ids (b, K) of images i: new memory (b, K, C, Q)."""
        x, pw = self.images[i].contiguous(), self.patch[2]
        runs = F.embedding(self._runs(ids), x.view(-1, pw)).view(
            *ids.shape, x.shape[1], math.prod(self.patch)
        )
        runs = runs.to(dtype)
        return runs if self.norm is None else runs.sub_(self.norm[0]).mul_(self.norm[1])

    def _runs(self, ids: Tensor) -> Tensor:
        """Where the runs of each patch stand, in runs of pw pixels: one dimension."""
        (C, T, H, W), (pt, ph, pw) = self.images.shape[1:], self.patch
        columns, device = W // pw, ids.device
        row = ids.div(columns, rounding_mode="floor")
        first = ids + row * ((ph - 1) * columns)
        if T > pt:
            time = row.div(H // ph, rounding_mode="floor")
            first += time * ((pt - 1) * H * columns)
        first += torch.arange(len(ids), device=device)[:, None] * (C * T * H * columns)
        plane = torch.arange(C, device=device)[:, None] * T + torch.arange(pt, device=device)
        line = plane[..., None] * H + torch.arange(ph, device=device)
        return (first[..., None] + line.flatten() * columns).flatten()


def _interleaved(x: Tensor) -> Tensor:
    """(b, K, C, Q) as (b, K, Q, C), a patch's values side by side."""
    b, K, C, Q = x.shape
    if C == 1 or x.device.type != "cpu" or not x.is_floating_point():
        return x.transpose(2, 3)
    rows = x.view(1, b * K, 1, C * Q).permute(0, 3, 1, 2)  # torch's own fast transposition
    return torch.channel_shuffle(rows, C).permute(0, 2, 3, 1).reshape(b, K, Q, C)


def gather(
    images: Tensor, norm: Tensor | None, ids: Tensor, patch: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """(B, K, P) in `dtype`; norm (2, C) or None: x becomes (x - norm_0c) * norm_1c."""
    pixels, P = _Pixels(images, norm, patch), images.shape[1] * math.prod(patch)
    out = torch.empty(*ids.shape, P, dtype=dtype, device=images.device)
    inner = images.dtype if norm is None else norm.dtype
    for i in row_spans(out, pixels.width(ids.shape[1])):
        x = pixels.read(i, ids[i], inner)
        out[i] = x.transpose(2, 3).flatten(2)
    return out


def spread(
    grad: Tensor,
    norm: Tensor | None,
    ids: Tensor,
    patch: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of `gather` to images of that shape and dtype: repeats add up in float32."""
    d_images = torch.zeros(shape, dtype=accumulator(grad.dtype), device=grad.device)
    grid = grid_view(d_images, patch)
    values = grad.to(d_images.dtype).unflatten(2, grid.shape[4:])
    if norm is not None:
        values = values * norm[1]
    grid.index_put_(_places(ids, *grid.shape[2:4]), values, accumulate=True)
    return d_images.to(dtype)


def error(
    pred: Tensor, images: Tensor, norm: Tensor | None, ids: Tensor, spec: Spec, keep: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss of each patch, (B, K), and what `gradient` needs, where that is to be kept."""
    pixels, acc = _Pixels(images, norm, spec.patch), accumulator(pred.dtype)
    loss = pred.new_empty(ids.shape, dtype=acc)
    slope = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device) if keep else None
    in_place = acc == pred.dtype and spec.kind == "l2"  # the error is the slope
    in_cache = 4 * pixels.width(ids.shape[1])  # pixels, target, prediction and error at once
    for i in row_spans(loss, in_cache):
        x = pixels.read(i, ids[i], acc)
        if spec.eps is not None:
            x = _normalized(x, spec.eps)
        y = _interleaved(x).flatten(2)
        e = torch.sub(pred[i], y, out=slope[i] if slope is not None and in_place else None)
        loss[i], e = _judged(e, spec.kind)
        if slope is not None and not in_place:
            slope[i] = e
    return loss, (slope,)


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Each patch of x (b, K, C, Q), which is this chunk's own, at mean 0 and deviation 1."""
    rows = x.flatten(0, 1).flatten(1)
    P = rows.shape[1]
    share = (P - 1) / P
    rows.sub_(rows[:, :1].clone())
    weight = rows.new_full((P,), math.sqrt(share))
    return F.layer_norm(rows, (P,), weight, None, eps * share).view(x.shape)


def _judged(e: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The mean loss of errors (b, K, P), (b, K), and the slopes."""
    P = e.shape[2]
    if kind == "l2":
        return torch.linalg.vector_norm(e, dim=2).square_().div_(P), e
    if kind == "l1":
        return torch.linalg.vector_norm(e, ord=1, dim=2).div_(P), e.sign_()
    cut = e.clamp(-1, 1)
    return (e.sub_(cut, alpha=0.5).mul_(cut)).mean(2), cut


def gradient(grad: Tensor, saved: tuple[Tensor | None, ...], spec: Spec) -> Tensor:
    """The gradient to pred, given that of each patch's loss."""
    (slope,) = saved
    assert slope is not None
    P, acc = slope.shape[2], accumulator(slope.dtype)
    factor = (grad * ((2 if spec.kind == "l2" else 1) / P))[..., None]
    if slope.dtype == acc:
        return slope * factor
    d_pred = torch.empty_like(slope)
    for i in row_spans(factor, slope.shape[1] * P):
        d_pred[i] = slope[i] * factor[i]
    return d_pred
