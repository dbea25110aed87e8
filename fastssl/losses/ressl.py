"""ReSSL: the student's similarities to a queue of keys are the teacher's, sharpened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.common import FirstOrder, accumulator, finished, first_order, full_precision
from fastssl.kernels.common.chunks import row_spans
from fastssl.losses._checks import check_embeddings, check_positive, check_temperature
from fastssl.losses._loss import Loss

_ROWS = 128  # at a time, at least: products of fewer are slow


class ReSSLLoss(Loss):
    """The cross-entropy of the student's distribution over a queue with the teacher's.

        loss = mean_i CE(softmax(k_i . n / temperature), softmax(q_i . n / student_temperature))

    Shapes   q, k (B, D): of the student and of the teacher; queue (K, D): the keys n; any float
             dtype, one for q and k.  Rows are taken as they are: the paper's have length one.  The
             gradient goes to q alone.
    Returns  scalar float32, in nats; 0 <= loss.
    Memory   the similarities of a block of rows at a time; the gradient is made with the loss.
    Raises   ValueError: other shapes, dtypes or devices; a temperature not > 0.
    Ranks    no collective: with as many rows and one queue on every rank, averaging is exact.
    Source   Zheng et al. 2021, arXiv:2107.09282, eq. 4 and 5; as solo-learn's ressl_loss_func.

    >>> z = torch.eye(4)
    >>> round(ReSSLLoss()(z, z, z).item(), 4)  # log(1 + 3 exp(-10))
    0.0001
    """

    shown = ("temperature", "student_temperature")

    def __init__(self, temperature: float = 0.04, *, student_temperature: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        check_positive(student_temperature=student_temperature)
        self.temperature, self.student_temperature = temperature, student_temperature

    def forward(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        check_embeddings("B, D", q=q, k=k)
        fits = queue.ndim == 2 and len(queue) and queue.shape[1] == q.shape[1]
        if not (fits and queue.is_floating_point() and queue.device == q.device):
            got = f"{tuple(queue.shape)} {queue.dtype} on {queue.device}"
            raise ValueError(f"queue must be (K, {q.shape[1]}) floats on {q.device}, got {got}")
        sharp = 1 / self.temperature, 1 / self.student_temperature
        learned = torch.is_grad_enabled() and q.requires_grad
        with full_precision(q.device):
            total = _Relations.call(q, k.detach(), queue.detach(), *sharp, learned)
        return total / len(q)


class _Relations(FirstOrder):
    """The sum of CE(softmax(sharp_k k n^T), softmax(sharp_q q n^T)) over rows; gradient to q."""

    @staticmethod
    def forward(ctx: Any, q, k, queue, sharp_k: float, sharp_q: float, learned: bool) -> Tensor:
        acc = accumulator(q.dtype)
        keys = queue.to(acc).T
        total, dq = q.new_zeros((), dtype=acc), torch.empty_like(q, dtype=acc) if learned else None
        for i in row_spans(q, 4 * len(queue), _ROWS):
            target = torch.mm(k[i].to(acc), keys).mul_(sharp_k).softmax(1)
            found = torch.mm(q[i].to(acc), keys).mul_(sharp_q).log_softmax(1)
            total -= torch.linalg.vecdot(target, found).sum()
            if dq is not None:
                torch.mm(found.exp_().sub_(target), keys.T, out=dq[i]).mul_(sharp_q)
        ctx.save_for_backward(dq)
        ctx.dtype = q.dtype
        return finished(total)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor):
        (dq,) = ctx.saved_tensors
        return (dq * grad).to(ctx.dtype), *(None,) * 5


def ressl_reference(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.04, student_temperature: float = 0.1
) -> Tensor:
    """The formula, all (B, K) similarities at once."""
    target = (k.detach() @ queue.T / temperature).softmax(1)
    found = (q @ queue.T / student_temperature).log_softmax(1)
    return -(target * found).sum(1).mean()
