"""CO2: two views of an image must find the negatives alike, whichever of them asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import BUILT, Group, all_gather_rows, world_size
from fastssl.kernels.common import FirstOrder, ahead, finished, first_order, full_precision
from fastssl.kernels.common.chunks import row_spans
from fastssl.losses import _ahead
from fastssl.losses._checks import check_batch, check_positive, is_finite
from fastssl.losses._loss import Loss
from fastssl.losses._unit import unit
from fastssl.losses.queue import Banked, bank_of

_ROWS = 128  # at a time, at least: products of fewer are slow


class CO2Regularizer(Banked, Loss):
    """The symmetric divergence of what each view makes of the other view and the negatives.

        p_i = softmax([x_i . y_i, x_i . n] / t_consistency),   q_i likewise of y_i
        loss = alpha / 2 mean_i (KL(p_i, q_i) + KL(q_i, p_i))         rows of length one

    With a memory bank both meet the bank's keys n.  Without, x_i meets the other images' y and y_i
    the other images' x.  In training the bank then takes out1, as NTXentLoss's.

    Shapes   out0, out1 (B, D): the two views of the same B images, row by row; any float dtype.
             memory_bank_size: keys or (keys, D), D that of the first batch; 0 keys: no bank.
    Returns  scalar float32: the mean over this rank's rows; 0 <= loss.
    State    memory_bank: a `Queue`, in state_dict; None without keys.
    Memory   the two distributions of a block of rows at a time; the gradient is made with the loss.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             t_consistency not > 0; alpha not finite; a bank that is not keys or (keys, D).
    Ranks    each rank's rows meet the rows of all, and so the mean over ranks of value and gradient
             is the joined batch's.  gather_distributed=False: each rank's batch alone.
    Source   Wei et al. 2021, arXiv:2010.02217, eq. 4 and 5.
    Differs  from lightly.loss.regularizer.CO2Regularizer, whose value it has in one process: that
             is without any gradient (its result is copied by torch.tensor), and so regularizes
             nothing; and the bank takes out1 in an evaluation too.  Gathers by default; no kl_div
             and no log_target; the bank as NTXentLoss's.

    >>> x, y = torch.eye(3)[:2], torch.eye(3)[1:]  # y_0 is x_1
    >>> round(CO2Regularizer(t_consistency=1.0)(x, y).item(), 4), CO2Regularizer()(x, x).item()
    (0.1155, 0.0)
    """

    shown = ("alpha", "t_consistency", "gather_distributed")

    def __init__(
        self,
        alpha: float = 1,
        t_consistency: float = 0.05,
        memory_bank_size: int | Sequence[int] = 0,
        *,
        gather_distributed: bool = BUILT,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        if not is_finite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        check_positive(t_consistency=t_consistency)
        self.alpha, self.t_consistency = alpha, t_consistency
        self.memory_bank = bank_of(memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        group, bank = self.process_group, self.memory_bank
        if bank is None and _ahead.fits(group, out0, out1) and _ahead.one_tile(out0, len(out0)):
            low, high = _ahead.with_norms(out0, out1)[1].aminmax()
            if low >= 1e-9 and high <= 1e15:
                return ahead(self._alone, out0, out1)
        check_batch(group, out0=out0, out1=out1)
        x, y, scale = unit(out0), unit(out1), 1 / self.t_consistency
        learned = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        sides = None, None, None
        if bank is not None:
            bank.fit(out1)
            sides = bank.keys.to(x), None, (x * y).sum(1) * scale
        elif world_size(group) > 1:
            keys = all_gather_rows(torch.stack([y, x], 1), group, check=False)
            sides = (*keys.unbind(1), None)
        with full_precision(x.device):
            total = _Divergence.call(x, y, *sides, scale, learned)
        if bank is not None and out0.requires_grad and torch.is_grad_enabled():
            bank.push(out1, group, check=False)
        return total * (self.alpha / 2 / len(x))

    def _alone(self, views: Sequence[Tensor], need: Sequence[bool]) -> _ahead.Gradients:
        """Value and gradients of one process: what y_i makes of x_j is what x_j makes of y_i."""
        z, norms = _ahead.with_norms(*views)
        z = z.div_(norms)
        x, y = z.chunk(2)
        s, weight = torch.mm(x, y.T).div_(self.t_consistency), self.alpha / 2 / len(x)
        p_log, q_log = s.log_softmax(1), s.T.contiguous().log_softmax(1)
        d = q_log - p_log
        p, q = p_log.exp_(), q_log.exp_()
        value = (d * (q - p)).sum().mul_(weight)
        if not any(need):
            return value, views
        da, db = _slopes(p, q, d)
        ds = da.add_(db.T)
        g = torch.cat([torch.mm(ds, y), torch.mm(ds.T, x)]).mul_(weight / self.t_consistency)
        return value, _ahead.unit_backward_(g, z, norms).chunk(2)


def _slopes(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """da and db: see `_Divergence`."""
    da = torch.addcmul(p, p, torch.linalg.vecdot(p, d).unsqueeze(1) - d).sub_(q)
    db = torch.addcmul(q, q, d - torch.linalg.vecdot(q, d).unsqueeze(1)).sub_(p)
    return da, db


class _Divergence(FirstOrder):
    """sum_i sum_j (q_ij - p_ij)(log q_ij - log p_ij) of p_i = softmax_j(a_ij), q_i of b_ij.

    a_i = scale x_i . kx_j, b_i = scale y_i . ky_j: kx, ky of all ranks, or y and x where they are
    None; or, with first, which stands before the others in both, either the bank kx.
    With d = log q - log p: da = p (1 - d + p . d) - q and db = q (1 + d - q . d) - p.
    """

    @staticmethod
    def forward(ctx: Any, x, y, kx, ky, first, scale, learned):
        total = x.new_zeros(())
        own = kx is None
        keys = (y, x) if own else (kx, kx if ky is None else ky)
        sides = (x, keys[0]), (y, keys[1])
        dx, dy, dkx, dky, dfirst = (
            None if z is None or not learned else torch.zeros_like(z) for z in (x, y, kx, ky, first)
        )
        made = (dx, dy if own else dkx), (dy, dx if own else dky)
        for i in row_spans(x, 6 * len(keys[0]), _ROWS):
            scores = [torch.mm(z[i], k.T).mul_(scale) for z, k in sides]
            if first is not None:
                scores = [torch.cat([first[i, None], s], 1) for s in scores]
            p_log, q_log = (s.log_softmax(1) for s in scores)
            d = q_log - p_log
            p, q = p_log.exp_(), q_log.exp_()
            total += (d * (q - p)).sum()
            if not learned:
                continue
            da, db = _slopes(p, q, d)
            if dfirst is not None:
                dfirst[i] = da[:, 0] + db[:, 0]
                da, db = da[:, 1:], db[:, 1:]
            for (z, k), (dz, dk), g in zip(sides, made, (da, db), strict=True):
                dz[i] += torch.mm(g, k).mul_(scale)  # pyright: ignore
                if first is None:
                    dk.addmm_(g.T, z[i], alpha=scale)  # pyright: ignore
        ctx.save_for_backward(dx, dy, dkx, dky, dfirst)
        return finished(total)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor):
        made = (None if g is None else g * grad for g in ctx.saved_tensors)
        return *made, None, None


def co2_reference(
    out0: Tensor, out1: Tensor, alpha: float, t: float, keys: Tensor | None = None
) -> Tensor:
    """The formula, all scores at once, in one process; keys (K, D): the bank's."""
    x, y = unit(out0), unit(out1)
    if keys is None:
        a, b = x @ y.T / t, y @ x.T / t
    else:
        own = (x * y).sum(1, keepdim=True)
        a, b = (torch.cat([own, z @ keys.to(x).T], 1) / t for z in (x, y))
    p, q = a.log_softmax(1), b.log_softmax(1)
    return alpha / 2 * ((q.exp() - p.exp()) * (q - p)).sum(1).mean()
