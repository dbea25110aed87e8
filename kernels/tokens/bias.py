"""The attention bias of visible tokens.

    gather_bias_bhij = bias_(h, ids_bi, ids_bj)      dbias_hpq = sum of the g_bhij of that pair

B sequences with K visible places of L; H heads; bias is that of all pairs of places, as a table of
relative positions gives it.
Why: eager gathers rows of (B, H, L, L) copies, then columns; its backward scatters with atomics.
Here the result is written once; the gradient is read by the inverse of ids, summed over the batch
in float32, without atomics in Triton: the same bits each run.
Traffic: the result once, and bias from L2; backward its gradient.  Memory-bound.  In place:
nothing.
Source: Bao et al. 2022, BEiT, arXiv:2106.08254, section 2.1 (shared relative positions), on the
visible tokens of He et al. 2021, MAE, arXiv:2111.06377.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, finished, first_order
from ..common.checks import check_ids, check_index, require_float
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.operators import launches


def gather_bias_reference(bias, ids):
    """The formula, eager: an index of all pairs."""
    return bias[:, ids[:, :, None], ids[:, None, :]].movedim(0, 1)


def _pick(bias: Tensor, ids: Tensor) -> Tensor:
    """bias_(h, ids_bi, ids_bj): (B, H, K, K)."""
    (H, L, _), (B, K) = bias.shape, ids.shape
    out, flat = bias.new_empty(B, H, K * K), bias.reshape(H, L * L)
    for i in row_spans(out, H * K * K):
        pairs = _pairs(ids[i], L)[:, None].expand(-1, H, -1)
        out[i] = flat.expand(len(pairs), -1, -1).gather(2, pairs)
    return out.view(B, H, K, K)


def _pairs(ids: Tensor, length: int) -> Tensor:
    """The places of all pairs in a flat table: (B, K * K)."""
    return (ids[:, :, None] * length + ids[:, None, :]).flatten(1)


def _unpick(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    """The gradient of `gather_bias` to the bias: (H, L, L) float32."""
    B, H, K, _ = grad.shape
    total = grad.new_zeros(H, length * length, dtype=accumulator(grad.dtype))
    for i in row_spans(grad, H * K * K):
        pairs = _pairs(ids[i], length).flatten().expand(H, -1)
        total.scatter_add_(1, pairs, grad[i].movedim(1, 0).flatten(1).to(total.dtype))
    return total.view(H, length, length)


def _fake_pick(bias, ids):
    B, K = ids.shape
    return bias.new_empty(B, bias.shape[0], K, K)


_TORCH = SimpleNamespace(pick=_pick, unpick=_unpick)
_TRITON = launches(
    f"{__package__}.bias_triton",
    _TORCH,
    pick=_fake_pick,
    unpick=lambda grad, ids, length: grad.new_empty(
        grad.shape[1], length, length, dtype=torch.float32
    ),
)
backends = {"torch": _TORCH, "triton": _TRITON}


class _GatherBias(FirstOrder):
    @staticmethod
    def forward(ctx: Any, bias, ids, impl):
        ctx.save_for_backward(ids)
        ctx.length, ctx.dtype, ctx.impl = bias.shape[1], bias.dtype, impl
        return finished(backends[impl].pick(bias, ids))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        (ids,) = ctx.saved_tensors
        return backends[ctx.impl].unpick(grad, ids, ctx.length).to(ctx.dtype), None, None


_BIAS = declare("gather_bias", _GatherBias.call, gather_bias_reference)


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
    check_index("ids", ids, "(B, K)", bias=bias)
    check_ids(ids, bias.shape[1])
    return _BIAS(impl, bias, ids, inputs={"bias": bias})
