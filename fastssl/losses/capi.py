"""CAPI: patches are told which cluster the teacher assigned them, evenly at each position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import Group, require_all_even
from fastssl.kernels import sinkhorn, soft_cross_entropy
from fastssl.kernels.common import accumulator, ahead, can_read_values, full_precision
from fastssl.kernels.common.checks import check_ids
from fastssl.kernels.common.chunks import row_spans
from fastssl.losses._ahead import Gradients
from fastssl.losses._checks import check_counts, check_temperature
from fastssl.losses._loss import Loss


class CAPILoss(Loss):
    """The mean over predicted patches of CE(q, softmax(student / student_temperature)).

    q assigns the teacher's patches to clusters by Sinkhorn's iterations, all clusters used alike at
    every position of the grid by itself, so that none of them can stand for a position.  The
    formula is `capi_reference`.

    Shapes   teacher_logits (B, P, K) of all patches; student_logits (B, M, K) of the predicted
             ones, and teacher_index (B, M) int64, which places they have in P; without it M = P,
             in the same order.  Any float dtype each.
    Returns  scalar float32, in nats, 0 <= loss.  The gradient goes to student_logits alone; the
             teacher's clusters learn by a second call with its logits on the student's side.
    Memory   a number a position and cluster, and the gradient; no assignments but of a chunk (on a
             GPU: the predicted patches' teacher logits in float32).
    Raises   ValueError: shapes that disagree, an index that is not a place in P, temperatures not
             > 0, sinkhorn_iterations < 1.
    Ranks    gather_distributed: clusters are used alike over all ranks' patches, and the mean over
             ranks of value and gradient is the joined batch's; else each rank's own.
    Source   Darcet et al. 2025, CAPI, arXiv:2502.08769, sections 3.2 and 3.3.
    Differs  from lightly.loss.CAPILoss, whose value and gradient it has: assigned in the log domain
             without an epsilon, so that a patch far below all others keeps its weight; refuses
             sinkhorn_iterations=0, and other shapes on other ranks.

    >>> x = 9 * torch.eye(2)[:, None]  # two images, one position, two clusters
    >>> round(CAPILoss()(x, x).item(), 4), round(CAPILoss()(x, 0 * x).item(), 4)  # ln 2
    (0.0, 0.6931)
    """

    shown = ("teacher_temperature", "student_temperature", "sinkhorn_iterations")

    def __init__(
        self,
        teacher_temperature: float = 0.06,
        student_temperature: float = 0.12,
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = False,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(gather_distributed, process_group)
        for name, value in (
            ("teacher_temperature", teacher_temperature),
            ("student_temperature", student_temperature),
        ):
            check_temperature(value, name)
        check_counts(sinkhorn_iterations=sinkhorn_iterations)
        self.teacher_temperature = teacher_temperature
        self.student_temperature = student_temperature
        self.sinkhorn_iterations = sinkhorn_iterations

    def forward(
        self, teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor | None = None
    ) -> Tensor:
        t, s = teacher_logits.detach(), student_logits
        require_all_even(
            self.process_group,
            teacher_logits=t,
            student_logits=s,
            teacher_index=teacher_index,
        )
        _check_logits(t, s, teacher_index)
        center = sinkhorn(
            t.transpose(0, 1),
            self.teacher_temperature,
            iterations=self.sinkhorn_iterations,
            process_group=self.process_group,
        )
        B, P, K = t.shape
        at = torch.arange(P, device=t.device).expand(B, P)
        at = (at if teacher_index is None else teacher_index).reshape(-1)
        image = torch.arange(B, device=t.device).repeat_interleave(s.shape[1])
        rows = s.reshape(-1, K)
        temps = {"student_temp": self.student_temperature, "teacher_temp": self.teacher_temperature}
        if not can_read_values(s) or not s.is_cpu:
            with full_precision(s.device):
                aims = t[image, at].to(center.dtype) - center[at]
            return soft_cross_entropy(rows, aims, **temps).mean()

        def run(tensors: Sequence[Tensor], need: Sequence[bool]) -> Gradients:
            """A chunk of rows at a time, the gradient with the value."""
            (rows,) = tensors
            out, value = torch.empty_like(rows), center.new_zeros(())
            for i in row_spans(center.new_empty(len(rows), 0), 4 * K):
                q = t[image[i], at[i]].to(center.dtype).sub_(center[at[i]])
                q = q.div_(self.teacher_temperature).softmax(1)
                x = rows[i].to(accumulator(rows.dtype)).div(self.student_temperature)
                log_p = x.log_softmax(1)
                value -= (q * log_p).sum() / len(rows)
                if need[0]:
                    out[i] = log_p.exp_().sub_(q).div_(self.student_temperature * len(rows))
            return value, [out]

        return ahead(run, rows)


def _check_logits(t: Tensor, s: Tensor, index: Tensor | None) -> None:
    for name, x in (("teacher_logits", t), ("student_logits", s)):
        if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name} must be (B, P, K), none of them empty, floats, got {got}")
    want = (len(t), s.shape[1] if index is not None else t.shape[1], t.shape[2])
    if s.shape != want or s.device != t.device:
        got = f"{tuple(s.shape)} on {s.device}"
        raise ValueError(f"student_logits must be {want} on {t.device}, got {got}")
    if index is None:
        return
    if index.shape != s.shape[:2] or index.dtype != torch.int64 or index.device != s.device:
        got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
        want = f"{tuple(s.shape[:2])} int64 on {s.device}"
        raise ValueError(f"teacher_index must be {want}, got {got}")
    check_ids(index, t.shape[1], "teacher_index", repeats=True)


def capi_reference(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_temperature: float = 0.06,
    student_temperature: float = 0.12,
    iterations: int = 3,
) -> Tensor:
    """The formula in one process, of student logits of all patches, by the assignments whole."""
    q = (teacher_logits.detach() / teacher_temperature).transpose(0, 1)  # (P, B, K)
    for _ in range(iterations):
        q = q - q.logsumexp(1, keepdim=True)
        q = q - q.logsumexp(2, keepdim=True)
    log_p = (student_logits / student_temperature).log_softmax(2)
    return -(q.exp().transpose(0, 1) * log_p).sum(2).mean()
