"""The cross-entropy from features and prototypes in torch, some rows' logits at a time.

Those rows' logits are all there, so that each softmax is exact, and the gradient needs no second
pass where the upstream gradient is known.  What it is for stands in linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.chunks import row_spans, rows_in_budget, spans
from ..common.gpu import on_gpu
from ..common.matmul import add_product, product
from .soft import Pairs, mixture, pairs_by_view

PART = 8  # a chunk's logits are at most this part of w, where the budget is less
FINE = 1024.0  # what float16's slopes, at most 1, are multiplied by: a prototype may have 1e-7


class Sides(NamedTuple):
    """x (V, R, D), w (K, D), the teacher's (T, R, E) and (K, E), center (1 | T, K) or None;
    pairs: V T numbers; sharp: 1 / temperature."""

    x: Tensor
    w: Tensor
    teacher_x: Tensor
    teacher_w: Tensor
    center: Tensor | None
    pairs: list[float]
    sharp_s: float
    sharp_t: float


def is_narrow(x: Tensor, acc: torch.dtype) -> bool:
    """Whether x is multiplied in its own 16 bits."""
    return on_gpu(x.device) and x.dtype in (torch.bfloat16, torch.float16) and acc == torch.float32


class Logits:
    """sharp (x w^T - center), some rows at a time, in the dtype of sums.

    x (V, R, D), w (K, D), center (1 | V, K) or None.
    """

    def __init__(
        self, x: Tensor, w: Tensor, center: Tensor | None, sharp: float, acc: torch.dtype
    ) -> None:
        self.narrow = is_narrow(x, acc)
        self.w = w if self.narrow else w.to(acc)
        self.x = x if self.narrow else x.to(acc) * sharp
        self.center = None if center is None else center.to(acc) * -sharp
        self.sharp = sharp

    def __call__(self, v: int, i: slice, out: Tensor) -> Tensor:
        """Those of view v's rows i, in the memory of out's first rows."""
        out, x = out[: i.stop - i.start], self.x[v, i]
        center = None if self.center is None else self.center[v % len(self.center)]
        if self.narrow:
            made = product(x, self.w.T).mul_(self.sharp)
            return made if center is None else made.add_(center)
        if center is None:
            return torch.mm(x, self.w.T, out=out)
        return torch.addmm(center, x, self.w.T, out=out)


def rows_at_once(x: Tensor, w: Tensor, tensors: int) -> int:
    """How many rows' logits are made at once, of so many tensors: as the budget has room for, and
    a PART of w, whose own passes would otherwise take longer than the products."""
    return max(rows_in_budget(x, tensors * len(w)), w.shape[1] // PART, 1)


def _value(s: Tensor, mix: Tensor, mass: float, slope: bool) -> Tensor:
    """mass lse(s) - mix . s of each row; s becomes mass softmax(s) - mix, if that is asked for."""
    s.sub_(s.amax(-1, keepdim=True))  # so that a match keeps its digits
    far = torch.linalg.vecdot(s, mix)
    total = s.exp_().sum(-1)
    if slope:
        s.mul_((mass / total).unsqueeze(-1)).sub_(mix)
    return far.neg_().add_(total.log_(), alpha=mass)


class Slopes:
    """Sums up what the slopes of rows, mass p - mix, make of the gradients.

    grad (V, R): the upstream gradient.  x: (V, R, D) or empty; w: (K, D) or empty.
    """

    def __init__(self, of: Sides, grad: Tensor, need: Sequence[bool]) -> None:
        acc = accumulator(of.x.dtype)
        self.of, self.narrow = of, is_narrow(of.x, acc)
        self.x = of.x.new_empty(of.x.shape if need[0] else 0, dtype=acc)
        self.w = of.w.new_zeros(of.w.shape if need[1] else 0, dtype=acc)
        self.keys = of.w if self.narrow else of.w.to(acc)
        self.by_row = (grad.to(acc) * of.sharp_s).unsqueeze(-1)
        self.fine = self.largest = 1.0
        if self.narrow:
            self.largest = self.by_row.abs().amax().clamp_min(torch.finfo(acc).tiny)
        if self.narrow and of.x.dtype == torch.float16:
            self.fine = FINE / max(1.0, *(sum(map(abs, row)) for row in _rows_of(of)))

    def add(self, v: int, i: slice, slope: Tensor) -> None:
        """Those of view v's rows i."""
        by_row, x = self.by_row[v, i], self.of.x[v, i]
        if self.narrow:
            slope = slope.mul_(self.fine).to(x.dtype)
        if self.x.numel():
            self.x[v, i] = product(slope, self.keys) * (by_row / self.fine)
        if self.w.numel():
            weighed = (x * (by_row / self.largest)).to(slope.dtype)
            add_product(self.w, slope.T, weighed)

    def done(self) -> tuple[Tensor, Tensor]:
        """The gradients to x and w, in the dtype of sums."""
        return self.x, self.w.mul_(self.largest / self.fine) if self.narrow else self.w


def _rows_of(of: Sides) -> Pairs:
    return pairs_by_view(of.pairs, len(of.x))


def sweep(of: Sides, loss: Tensor | None, slopes: Slopes | None = None) -> None:
    """Fill loss (V, R) and hand the slopes on, as far as each is asked for."""
    acc = accumulator(of.x.dtype)
    student = Logits(of.x, of.w, None, of.sharp_s, acc)
    teacher = Logits(of.teacher_x, of.teacher_w, of.center, of.sharp_t, acc)
    (_, R, _), T, K = of.x.shape, len(of.teacher_x), len(of.w)
    n = min(R, rows_at_once(of.x, of.w, 4))
    room = of.x.new_empty(1 + T, n, K, dtype=acc)
    for i in spans(R, n or 1):
        of_teacher = [teacher(t, i, room[1 + t]) for t in range(T)]
        for q in of_teacher:
            for j in row_spans(q, 4 * K):
                q[j] = q[j].softmax(-1)
        for v, weights in enumerate(_rows_of(of)):
            s = student(v, i, room[0])
            for j in row_spans(s, 4 * K):
                mix = mixture([q[j] for q in of_teacher], weights)
                value = _value(s[j], mix, sum(weights), slopes is not None)
                if loss is not None:
                    loss[v, i.start + j.start : i.start + j.stop] = value
            if slopes is not None:
                slopes.add(v, i, s)


def cross_entropies(
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    center: Tensor | None,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> tuple[Tensor, Tensor]:
    """The losses (V, R), and what the gradients are helped by: of the kernels (2, 2, R)."""
    loss = x.new_empty(x.shape[:2], dtype=accumulator(x.dtype))
    sweep(Sides(x, w, teacher_x, teacher_w, center, pairs, sharp_s, sharp_t), loss)
    return loss, x.new_empty(0)


def gradients(
    grad: Tensor,
    stats: Tensor,
    need_x: bool,
    need_w: bool,
    x: Tensor,
    w: Tensor,
    teacher_x: Tensor,
    teacher_w: Tensor,
    center: Tensor | None,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> tuple[Tensor, Tensor]:
    """The gradients to x and w in the dtype of sums; without elements, where not needed."""
    of = Sides(x, w, teacher_x, teacher_w, center, pairs, sharp_s, sharp_t)
    slopes = Slopes(of, grad, (need_x, need_w))
    sweep(of, None, slopes)
    return slopes.done()
