"""Row log-sum-exp of scaled, masked similarities, streamed over tiles.

    s_ij = scale * q_i . k_j                 M rows, N columns, D features
    lse_i = log sum_{j kept} exp(s_ij)       [nats]
    p_ij = exp(s_ij - lse_i)                 g = dloss / dlse, (M,)
    dq_i = scale * g_i sum_j p_ij k_j    dk_j = scale * sum_i g_i p_ij q_i
    dscale = sum_ij g_i p_ij q_i . k_j

Why: eager keeps the (M, N) scores for backward, several times over.  This holds one tile of them
at a time, keeps two floats a row (the maximum and the sum apart: at scale 100 their log-sum-exp
has lost what one float32 rounding of 100 costs), and computes each tile again for backward.
When q is k the scores are symmetric: each unordered pair of tiles is visited once and feeds both
rows' sums, which halves the products: 2 units of N^2 D forward and backward, where eager has 3.
Traffic: the tiles stay in cache; q and k are read once per row of tiles.  Compute-bound.
Memory: O((M + N) D).  In place: nothing.  A row with no pair left is -inf, with gradient zero.
Here is the reference and the implementation in torch; pairwise_fused.py has the Triton kernels.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867, for the running maximum and sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._chunks import spans, tile_shape
from ._dispatch import accumulator, declare, first_order, require_float

fused: Any = None
different: Any = None
if find_spec("triton"):
    from . import pairwise_ops as fused
    from .pairwise_fused import different


@dataclass(frozen=True)
class PairMask:
    """Which pairs take part: keep(row_ids, col_ids) is a bool tensor, broadcasting the two.

    symmetric: keep(a, b) == keep(b, a) for all ids, so that a pair may be judged from either side.
    triton: the same judgement for the Triton kernels, a @triton.jit function of the row and the
    column ids: blocks (R, 1) and (1, C) or (1, R) and (C, 1), of int64 where ids are given, else
    of int32 positions.  Its module must import triton.language, and it may read nothing but the
    ids.  Without one the mask runs in torch.
    Raises ValueError when triton is something else.
    """

    name: str
    keep: Callable[[Tensor, Tensor], Tensor]
    symmetric: bool = False
    triton: Any = None
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = "" if self.triton is None or fused is None else fused.enrol(self.name, self.triton)
        object.__setattr__(self, "key", key)

    def __deepcopy__(self, memo: Any) -> PairMask:
        return self  # nothing in it changes, and Triton's functions cannot be copied


def _different(row_ids: Tensor, col_ids: Tensor) -> Tensor:
    return row_ids != col_ids


exclude_self = PairMask("exclude_self", _different, symmetric=True, triton=different)


def pairwise_lse_reference(q, k, scale, mask, row_ids, col_ids):
    """The formula, eager, in the dtype it is given: the tests' oracle.  Holds (M, N) scores."""
    s_MN = scale * (q @ k.T)
    if mask is not None:
        row_ids, col_ids = _ids(q, k, row_ids, col_ids)
        s_MN = s_MN.masked_fill(~mask.keep(row_ids[:, None], col_ids[None, :]), -math.inf)
    return s_MN.logsumexp(1)


def scores(x: Tensor, k: Tensor, rows: Tensor, cols: Tensor, mask: PairMask | None) -> Tensor:
    """One tile of scores, a dropped pair at -inf."""
    s = x @ k.T
    if mask is not None:
        s.masked_fill_(~mask.keep(rows[:, None], cols[None, :]), -math.inf)
    return s


def _fold(m: Tensor, total: Tensor, s: Tensor, dim: int) -> None:
    """Fold a tile of scores into the running maxima and the sums of exp(s - maximum)."""
    peak = torch.maximum(m, s.amax(dim))
    total.mul_((m - peak).exp_()).add_((s - peak.unsqueeze(dim)).exp_().sum(dim))
    m.copy_(peak)


def _empty_stats(rows: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # The least finite number, not -inf: a row with nothing left must not meet -inf - -inf.
    return x.new_full((rows,), torch.finfo(x.dtype).min), x.new_zeros(rows)


def _weights(grad: Tensor, total: Tensor) -> Tensor:
    """g / sum, so that a pair's weight is exp(s - max) times it; zero for a row with no pair."""
    return torch.where(total > 0, grad.to(total.dtype) / total, 0)


class _RowLSE(torch.autograd.Function):
    """Rows of q against all of k."""

    @staticmethod
    def forward(ctx: Any, q, k, scale, row_ids, col_ids, mask):
        acc = accumulator(q.dtype)
        x, keys = q.to(acc) * scale.to(acc), k.to(acc)
        m, total = _empty_stats(len(x), x)
        R, C = tile_shape(len(x), len(keys), x)
        for i in spans(len(x), R):
            for j in spans(len(keys), C):
                _fold(m[i], total[i], scores(x[i], keys[j], row_ids[i], col_ids[j], mask), 1)
        ctx.save_for_backward(q, k, scale, row_ids, col_ids, m, total)
        ctx.mask = mask
        return m + total.log()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        q, k, scale, row_ids, col_ids, m, total = ctx.saved_tensors
        need_q, need_k, need_scale = ctx.needs_input_grad[:3]
        acc = m.dtype
        x, keys, w = q.to(acc) * scale.to(acc), k.to(acc), _weights(grad, total)
        u = torch.zeros_like(x)  # sum_j g_i p_ij k_j
        dk = torch.zeros_like(keys) if need_k else None
        R, C = tile_shape(len(x), len(keys), x)
        for i in spans(len(x), R):
            for j in spans(len(keys), C):
                p = scores(x[i], keys[j], row_ids[i], col_ids[j], ctx.mask)
                p.sub_(m[i, None]).exp_().mul_(w[i, None])
                if need_q or need_scale:
                    u[i].addmm_(p, keys[j])
                if dk is not None:
                    dk[j].addmm_(p.T, x[i])
        dq = (u * scale.to(acc)).to(q.dtype) if need_q else None
        dscale = (q.to(acc) * u).sum().to(scale.dtype) if need_scale else None
        return dq, None if dk is None else dk.to(k.dtype), dscale, None, None, None


class _SelfLSE(torch.autograd.Function):
    """Rows of z against z: tiles on and above the diagonal only, each read from both sides."""

    @staticmethod
    def forward(ctx: Any, z, scale, ids, mask):
        x, keys = _scaled(z, scale)
        m, total = _empty_stats(len(x), x)
        for i, j in _upper_tiles(x):
            s = scores(x[i], keys[j], ids[i], ids[j], mask)
            _fold(m[i], total[i], s, 1)
            if i != j:
                _fold(m[j], total[j], s, 0)
        ctx.save_for_backward(z, scale, ids, m, total)
        ctx.mask = mask
        return m + total.log()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        z, scale, ids, m, total = ctx.saved_tensors
        x, keys = _scaled(z, scale)
        w = _weights(grad, total)
        u = torch.zeros_like(x)  # sum_j (g_i p_ij + g_j p_ji) z_j
        for i, j in _upper_tiles(x):
            s = scores(x[i], keys[j], ids[i], ids[j], ctx.mask)
            p = (s - m[i, None]).exp_().mul_(w[i, None])
            p += s.sub_(m[j]).exp_().mul_(w[j])
            u[i].addmm_(p, keys[j])
            if i != j:
                u[j].addmm_(p.T, keys[i])
        # Each pair stands in u twice, once from either side, and in dloss / dscale once.
        dscale = (keys * u).sum().div(2).to(scale.dtype) if ctx.needs_input_grad[1] else None
        return (u * scale.to(u.dtype)).to(z.dtype), dscale, None, None


def _scaled(z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    keys = z.to(accumulator(z.dtype))
    return keys * scale.to(keys.dtype), keys


def _upper_tiles(x: Tensor) -> list[tuple[slice, slice]]:
    side = min(tile_shape(len(x), len(x), x))
    blocks = list(spans(len(x), side))
    return [(i, j) for a, i in enumerate(blocks) for j in blocks[a:]]


def _same(q, k, mask, row_ids, col_ids) -> bool:
    """Whether the scores are one tensor's with itself, alike from either side."""
    return q is k and row_ids is col_ids and (mask is None or mask.symmetric)


def _ids(q, k, row_ids, col_ids) -> tuple[Tensor, Tensor]:
    """Positions where no ids are given, of one tensor's rows and columns the same tensor."""
    rows = torch.arange(len(q), device=q.device) if row_ids is None else row_ids
    if col_ids is not None:
        return rows, col_ids
    return rows, rows if q is k and row_ids is None else torch.arange(len(k), device=k.device)


def _lse_torch(q, k, scale, mask, row_ids, col_ids):
    rows, cols = _ids(q, k, row_ids, col_ids)
    if _same(q, k, mask, row_ids, col_ids):
        return _SelfLSE.apply(q, scale, rows, mask)
    return _RowLSE.apply(q, k, scale, rows, cols, mask)


def _lse_triton(q, k, scale, mask, row_ids, col_ids):
    if mask is not None and mask.triton is None:
        raise ValueError(
            f"mask {mask.name!r} has no Triton twin: give PairMask a @triton.jit function as "
            "`triton`, or leave impl='triton' for 'torch'"
        )
    same, key = _same(q, k, mask, row_ids, col_ids), mask.key if mask else ""
    positions = mask is None or row_ids is None and col_ids is None
    ids = [] if positions else list(_ids(q, k, row_ids, col_ids))
    return fused.lse(q, k, scale.float(), ids, key, same)


_twin = {"triton": _lse_triton} if fused else {}
_LSE = declare("pairwise_lse", torch=_lse_torch, reference=pairwise_lse_reference, **_twin)


def check_pairs(
    q: Tensor, k: Tensor, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids of rows and columns, after refusing what is not M rows and N columns of D features.

    Without ids a row's and a column's are their positions; where q is k they are one tensor.
    """
    _check(q, k, row_ids, col_ids)
    return _ids(q, k, row_ids, col_ids)


def _check(q, k, row_ids, col_ids) -> None:
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1] or 0 in (*q.shape, *k.shape):
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q and k must be (M, D) and (N, D), none of them empty, got {got}")
    require_float(q=q, k=k)
    if q.dtype != k.dtype or q.device != k.device:
        got = f"{q.dtype} on {q.device} and {k.dtype} on {k.device}"
        raise ValueError(f"q and k must share dtype and device, got {got}")
    for name, ids, x in (("row_ids", row_ids, q), ("col_ids", col_ids, k)):
        if ids is None:
            continue
        if ids.shape != x.shape[:1] or ids.dtype != torch.int64 or ids.device != x.device:
            got = f"{tuple(ids.shape)} {ids.dtype} on {ids.device}"
            raise ValueError(f"{name} must be ({len(x)},) int64 on {x.device}, got {got}")


def pairwise_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    mask: PairMask | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Row log-sum-exp of scale * q k^T over the pairs that `mask` keeps: (M,) float32, in nats.

    q (M, D), k (N, D): any float dtype, the same for both; products and sums in float32.
    scale: a number, or a 0-d float tensor on q's device, which then gets its gradient.
    mask: None, `exclude_self` or any PairMask, judged on row_ids (M,) and col_ids (N,) int64,
    by default the positions; across ranks pass ids that are unique in the joined batch.
    A row with no pair left is -inf, with gradient zero.  First order only.
    impl: "auto", "triton", "torch" or "reference" (the formula as written, with (M, N) scores).
    auto is triton on CUDA, and torch elsewhere, for float64 and for a mask without Triton twin.
    float64 inputs are summed and returned in float64, by torch and the reference alone.
    Raises ValueError for shapes, dtypes and devices that disagree, an impl that is not there, and
    impl="triton" with float64, with a mask without twin, or off CUDA (unless TRITON_INTERPRET=1).

    >>> x = torch.eye(2)
    >>> pairwise_lse(x, x, 3.0, mask=exclude_self).tolist()
    [0.0, 0.0]
    """
    _check(q, k, row_ids, col_ids)
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point() or scale.device != q.device:
            got = f"{tuple(scale.shape)} {scale.dtype} on {scale.device}"
            raise ValueError(f"scale must be a number or a 0-d float tensor beside q, got {got}")
    else:
        scale = torch.full((), float(scale), dtype=accumulator(q.dtype), device=q.device)
    if impl == "auto" and (q.dtype == torch.float64 or mask is not None and mask.triton is None):
        impl = "torch"
    return _LSE(impl, q.device, q, k, scale, mask, row_ids, col_ids).to(accumulator(q.dtype))
