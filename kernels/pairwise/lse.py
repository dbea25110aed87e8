"""Log-sum-exp of scaled, masked similarities over rows, and over columns, streamed over tiles.

    s_ij = scale_i q_i . k_j + bias_j        M rows, N columns, D features
    lse_i = log sum_{j kept} exp(s_ij)       over a row's columns; with both=True also over a
    lse_j = log sum_{i kept} exp(s_ij)       column's rows        [nats]

Why: eager keeps the (M, N) scores for backward, several times over.  This holds one tile of them
at a time, keeps two floats a row (the maximum and the sum apart: at scale 100 their log-sum-exp
has lost what one float32 rounding of 100 costs), and computes each tile again for backward.
In units of 2 M N D operations, forward and backward of rows and columns: eager 3, and its memory;
torch and the products' schedule 4, each tile once for both sides; the Triton tiles 6, each side by
itself.  When q is k the scores are symmetric: torch and the products visit each unordered pair of
tiles once, 2 units, and the Triton tiles take one side for both, 3, or where many 16-bit rows have
bounded scores 2.5.
Traffic: the tiles stay in cache; q and k are read once per row of tiles.  Compute-bound.
Memory: O((M + N) D).  In place: nothing.  A row with no pair left is -inf, with gradient zero.
Here are the reference and the public function; lse_torch.py streams in torch, and
lse_ops.py picks the Triton kernels.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867, for the running maximum and sum.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, overload

import torch
from torch import Tensor

from ..common.autograd import accumulator
from ..common.checks import check_pair, require_float, require_tensors
from ..common.dispatch import declare
from . import lse_ops
from .lse_torch import Pairs
from .masks import Masks, PairMask, as_masks

Mask = PairMask | Masks | None
Sums = tuple[Tensor, Tensor]


def pairwise_lse_reference(q, k, scale, mask=None, bias=None, both=False):
    """The formula, eager, in the dtype it is given: the tests' oracle.  Holds (M, N) scores."""
    by_row = scale[:, None] if isinstance(scale, Tensor) and scale.ndim else scale
    s_MN = by_row * (q @ k.T)
    if bias is not None:
        s_MN = s_MN + bias
    if mask is not None:
        s_MN = s_MN.masked_fill(~as_masks(mask).keep(*s_MN.shape, q.device), -math.inf)
    return (s_MN.logsumexp(1), s_MN.logsumexp(0)) if both else s_MN.logsumexp(1)


def _reference(q, k, scale, bias, mask, both):
    return pairwise_lse_reference(q, k, scale, mask, bias, both=True)


def _run(q, k, scale, bias, mask: Masks, both: bool, impl: str) -> Sums:
    same = q is k and scale.ndim == 0 and bias is None and mask.symmetric
    return lse_ops.lse(Pairs(q, k, scale, bias, *mask.ids(), mask.key, same), both, impl)


_LSE = declare("pairwise_lse", _run, _reference)


def check_pairs(q: Tensor, k: Tensor, mask: Mask) -> Masks:
    """The mask, after refusing what is not M rows and N columns of D features, and their ids."""
    require_tensors(q=q, k=k)
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1] or 0 in (*q.shape, *k.shape):
        got = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise ValueError(f"q and k must be (M, D) and (N, D), none of them empty, got {got}")
    check_pair(q, k, ("q", "k"))
    masks = as_masks(mask)
    masks.check(len(q), len(k), q.device)
    return masks


def as_number(name: str, value: float | Tensor, q: Tensor, *, rows: bool = False) -> Tensor:
    """A number as a 0-d tensor beside q; a float tensor as it is: 0-d or, with `rows`, (M,).

    Raises ValueError, naming the argument, for anything else.
    """
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return torch.full((), float(value), dtype=accumulator(q.dtype), device=q.device)
    shapes = ((), q.shape[:1]) if rows else ((),)
    if value.shape not in shapes or not value.is_floating_point() or value.device != q.device:
        want = f" or ({len(q)},)" if rows else ""
        got = f"{tuple(value.shape)} {value.dtype} on {value.device}"
        raise ValueError(f"{name} must be a number or a 0-d{want} float tensor by q, got {got}")
    return value


def blockwise(q: Tensor, masks: Masks) -> lse_ops.Blocks:
    """What `auto` picks, for callers that merge blocks of keys themselves; no autograd."""
    return lse_ops.Blocks(_LSE.choose_for("auto", {"q": q}, masks.problem))


@overload
def pairwise_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, mask: Mask = ..., bias: Tensor | None = ...,
    both: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def pairwise_lse(
    q: Tensor, k: Tensor, scale: float | Tensor, *, mask: Mask = ..., bias: Tensor | None = ...,
    both: Literal[True], impl: str = ...,
) -> Sums: ...  # fmt: skip


def pairwise_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    mask: Mask = None,
    bias: Tensor | None = None,
    both: bool = False,
    impl: str = "auto",
) -> Tensor | Sums:
    """Log-sum-exp over j of scale_i q_i . k_j + bias_j, of the pairs `mask` keeps: (M,) float32.

    q (M, D), k (N, D): any float dtype, the same for both; products and sums in float32.
    scale: a number, or a 0-d or (M,) float tensor on q's device, which then gets its gradient.
    mask: None, or a rule of `fastssl.kernels`: on positions, or on ids as in
    same_group(labels); several by `&`.  Across ranks give ids that tell the joined batch's rows
    apart: exclude_self(mine, everyones).
    bias: None or a (N,) float tensor on q's device, with its gradient.
    both: also the log-sum-exp over i, (N,), of the same pass: (rows, columns), in nats.
    impl: "auto", "triton", "torch" or "reference" (the formula as written, with (M, N) scores).
    auto is triton on CUDA, and torch elsewhere, for float64 and for a rule without Triton twin.
    A row or column with no pair left is -inf, with gradient zero.  First order only.  When k is q
    itself, the scale one number, and the mask symmetric, each pair is computed once.
    float64 inputs are summed and returned in float64, by torch and the reference alone.
    Raises ValueError for shapes, dtypes and devices that disagree, an impl that is not there, and
    impl="triton" with float64, with a rule without twin, or off CUDA (unless TRITON_INTERPRET=1).

    >>> from fastssl.kernels import exclude_self
    >>> x = torch.eye(2)
    >>> pairwise_lse(x, x, 3.0, mask=exclude_self).tolist()
    [0.0, 0.0]
    """
    masks = check_pairs(q, k, mask)
    scale = as_number("scale", scale, q, rows=True)
    if bias is not None:
        require_float(bias=bias)
        if bias.shape != k.shape[:1] or bias.device != q.device:
            got = f"{tuple(bias.shape)} {bias.dtype} on {bias.device}"
            raise ValueError(f"bias must be a ({len(k)},) float tensor by k, got {got}")
    acc, problem = accumulator(q.dtype), masks.problem
    rows, cols = _LSE(impl, q, k, scale, bias, masks, both, inputs={"q": q}, problem=problem)
    return (rows.to(acc), cols.to(acc)) if both else rows.to(acc)
