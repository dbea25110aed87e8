"""Log-sum-exps of scaled similarities of nested prefixes: their first m_p of D features.

    s_pij = scale a_pi a_pj q_i . k_j over the first m_p features     m_1 < ... < m_P <= D
    lse_pi = log sum_{j kept} exp(s_pij)       M rows, N columns; with both=True also lse_pj [nats]
    a: 1, or with normalize 1 / the prefix's length

Why: a loss of P prefixes (Matryoshka) taken one after another multiplies the first features P
times.  A prefix's products are those of the one before it and of the features between; and as one
number a row and a prefix makes it one long, the rows need not be normalized for each.
In units of 2 M N operations a feature, forward and backward of rows and columns: 4 D in Triton,
half of that when q is k.  Torch takes the prefixes one by one: 4 sum m.
Memory: O((M + N) D), and a block of weights.  In place: nothing.  A row with no pair left is -inf.
Here are the reference and the public function; nested_ops.py has the operators, nested_triton.py
the kernels, nested_rows.py what a row is made into.
Source: Kusupati et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import accumulator
from ..common.dispatch import declare
from . import nested_ops
from .lse import Mask, Sums, as_number, check_pairs, pairwise_lse, pairwise_lse_reference
from .masks import Masks
from .nested_rows import Rows, prefix_sums


def pairwise_lse_nested_reference(q, k, scale, dims, normalize=False, mask=None):
    """The formula, prefix by prefix, in the dtype it is given: the tests' oracle."""
    unit = F.normalize if normalize else lambda x: x
    pairs = [(unit(q[:, :m]), unit(k[:, :m])) for m in dims]
    sides = [pairwise_lse_reference(a, b, scale, mask, both=True) for a, b in pairs]
    rows, cols = zip(*sides, strict=True)
    return torch.stack(rows), torch.stack(cols)


def _reference(q, k, scale, dims, normalize, mask, both):
    return pairwise_lse_nested_reference(q, k, scale, dims, normalize, mask)


def _run(q, k, scale, dims, normalize, mask: Masks, both: bool, impl: str) -> Sums:
    if impl == "triton":
        return nested_ops.lse(q, k, scale, dims, normalize, mask, both)
    x = _wide(q, dims, normalize)
    y = x if q is k else _wide(k, dims, normalize)
    sides = []
    for p in range(len(dims)):
        rows = x.prefix(p)
        cols = rows if y is x else y.prefix(p)
        sides.append(
            pairwise_lse(rows, cols, scale, mask=mask, both=True, impl=impl)
            if both
            else (pairwise_lse(rows, cols, scale, mask=mask, impl=impl), scale.new_empty(0))
        )
    rows, cols = zip(*sides, strict=True)
    return torch.stack(rows), torch.stack(cols)


_NESTED = declare("pairwise_lse_nested", _run, _reference)


def _wide(x: Tensor, dims: Sequence[int], normalize: bool) -> Rows:
    """The rows in the dtype of sums, for autograd to follow."""
    return Rows(x.to(accumulator(x.dtype)), dims, normalize)


def nested_matches(q: Tensor, k: Tensor, dims: Sequence[int], normalize: bool = False) -> Tensor:
    """Of rows in one place, q_i and k_i (M, D): the products of their prefixes, (P, M).

    normalize: of prefixes of length one.  In the dtype of sums, by torch and its autograd.

    >>> z = torch.tensor([[3.0, 4.0]])
    >>> nested_matches(z, z, [1, 2]).tolist(), nested_matches(z, z, [1, 2], True).tolist()
    ([[9.0], [25.0]], [[1.0], [1.0]])
    """
    x, y = _wide(q, dims, normalize), _wide(k, dims, normalize)
    products = prefix_sums([(x.x[:, part] * y.x[:, part]).sum(1) for part in x.parts])
    if x.inverse is None or y.inverse is None:
        return products
    return products * x.inverse * y.inverse


def takes_nested(x: Tensor) -> bool:
    """Whether `auto` takes the prefixes of rows like x in one sweep."""
    return _NESTED.choose_for("auto", {"q": x}) == "triton"


def pairwise_lse_nested(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    dims: Sequence[int],
    *,
    normalize: bool = False,
    mask: Mask = None,
    both: bool = False,
    impl: str = "auto",
) -> Sums:
    """Log-sum-exps of each prefix: (P, M) over j, and (P, N) over i; (P, 0) unless `both`.

    q (M, D), k (N, D): any float dtype, the same for both; products and sums in float32.
    scale: a number, or a 0-d float tensor on q's device, which then gets its gradient.
    dims: integers that rise from 1 or more to D at most.  normalize: their rows are made one long;
    a row of zeros stays, with gradient zero.
    mask, impl: as in `pairwise_lse`; impl="torch" takes one prefix after another.
    A row or column with no pair left is -inf, with gradient zero.  First order only.  When k is q
    itself and the mask symmetric, each pair is computed once.
    Raises ValueError for what `pairwise_lse` refuses, and other dims.

    >>> z = torch.eye(4)
    >>> pairwise_lse_nested(z, z, 1.0, [1, 4])[0][:, 3]  # ln 4, and ln(3 + e)
    tensor([1.3863, 1.7437])
    """
    masks = check_pairs(q, k, mask)
    ends = (0, *dims, q.shape[1] + 1)
    if not (dims and all(isinstance(m, int) for m in dims) and list(ends) == sorted({*ends})):
        raise ValueError(f"dims must be integers that rise from 1 to {q.shape[1]}, got {dims}")
    scale, acc = as_number("scale", scale, q), accumulator(q.dtype)
    given = q, k, scale, tuple(dims), normalize, masks, both
    rows, cols = _NESTED(impl, *given, inputs={"q": q}, problem=masks.problem)
    return rows.to(acc), cols.to(acc)
