"""The attention bias of visible tokens.

    gather_bias_bhij = bias_(h, ids_bi, ids_bj)      dbias_hpq = sum of the g_bhij of that pair

B sequences with K visible places of L; H heads; bias is that of all pairs of places, as a table of
relative positions gives it.
Why: eager gathers rows of (B, H, L, L) copies, then columns; its backward scatters with atomics.
Here the result is written once; the gradient is read by the inverse of ids, summed over the batch
in float32, without atomics in Triton: the same bits each run.
Traffic: the result; backward its gradient.  Memory-bound.  In place: nothing.
Source: Bao et al. 2022, BEiT, arXiv:2106.08254, section 2.1 (shared relative positions), on the
visible tokens of He et al. 2021, MAE, arXiv:2111.06377.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_ids
from ..common.dispatch import declare, finished, first_order, require_float
from ..correlation.moments import by_engine, implementation
from ..pairwise.masks import twins
from . import bias_torch

engines: dict[str, Any] = {"torch": bias_torch}
if twins is not None:
    from . import bias_ops

    engines["triton"] = bias_ops


def gather_bias_reference(bias, ids):
    """The formula, eager: an index of all pairs."""
    return bias[:, ids[:, :, None], ids[:, None, :]].movedim(0, 1)


class _GatherBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias, ids, impl):
        ctx.save_for_backward(ids)
        ctx.length, ctx.dtype, ctx.impl = bias.shape[1], bias.dtype, impl
        return finished(engines[impl].picked(bias, ids))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        (ids,) = ctx.saved_tensors
        return engines[ctx.impl].unpicked(grad, ids, ctx.length).to(ctx.dtype), None, None


_BIAS = declare("gather_bias", **by_engine(_GatherBias.apply, gather_bias_reference))


def gather_bias(bias: Tensor, ids: Tensor, *, impl: str = "auto") -> Tensor:
    """The bias of every pair of visible tokens: (B, H, K, K), in bias's dtype.

    bias (H, L, L) float; ids (B, K) int64 in 0..L-1, a place at most once in a row.
    The gradient to bias is summed over the batch in float32; first order only.
    impl: "auto", "triton", "torch" or "reference".
    Raises ValueError for shapes or dtypes that disagree, ids out of range or repeated (looked at on
    a CPU, elsewhere with FASTSSL_CHECK=1) and an unknown impl.

    >>> bias = torch.arange(9.0).view(1, 3, 3)
    >>> gather_bias(bias, torch.tensor([[2, 0]])).tolist()
    [[[[8.0, 6.0], [2.0, 0.0]]]]
    """
    require_float(bias=bias)
    if bias.ndim != 3 or bias.shape[1] != bias.shape[2]:
        raise ValueError(f"bias must be (H, L, L), got {tuple(bias.shape)}")
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be (B, K) int64, got {tuple(ids.shape)} {ids.dtype}")
    if ids.device != bias.device:
        raise ValueError(f"ids must be on {bias.device} with the bias, got {ids.device}")
    check_ids(ids, bias.shape[1])
    return _BIAS(implementation(impl, "bias", bias), bias.device, bias, ids)
