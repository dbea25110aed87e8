"""Sum over all pairs of the sigmoid loss of scaled similarities, streamed over tiles.

    s_ij = scale q_i . k_j + bias                    M rows, N columns, D features
    y_ij = 1 where the rule `positive` keeps (i, j), else -1
    total = sum_ij softplus(-y_ij s_ij)              [nats]
    W_ij = dtotal / ds_ij = -y_ij sigmoid(-y_ij s_ij)
    dq_i = scale sum_j W_ij k_j                      dk_j = scale sum_i W_ij q_i
    dscale = sum_ij W_ij q_i . k_j                   dbias = sum_ij W_ij

Why: eager keeps labels, scores and their sigmoids, each (M, N), for backward.  The result is one
number, so that the gradient is known but for one factor when the loss is: the forward makes it
from the tile of scores it holds, and backward only multiplies.
In units of 2 M N D operations: 1 without gradients, else 3 (the scores and two products), 4 where
the Triton tiles compute the scores once for each side.
Traffic: the tiles stay in cache; q and k are read once per row of tiles.  Compute-bound.
Memory: O((M + N) D): the gradients in float32, kept for backward.  In place: nothing.
Here are the reference and the public functions; sigmoid_torch.py streams in torch, and
sigmoid_triton.py has the Triton kernels.
Source: Zhai et al. 2023, SigLIP, arXiv:2303.15343, section 3.2, without its 1 / |B|.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import accumulator
from ..common.dispatch import declare
from . import sigmoid_ops
from .lse import as_number, check_pairs
from .masks import Masks, PairMask, as_masks, describe
from .sigmoid_ops import Logits, Need, Results


def pairwise_sigmoid_reference(q, k, scale, bias, positive):
    """The formula, eager, in the dtype it is given: the tests' oracle.  Holds (M, N) scores."""
    s_MN = scale * (q @ k.T) + bias
    keep = as_masks(positive).keep(len(q), len(k), q.device)
    return -F.logsigmoid(torch.where(keep, s_MN, -s_MN)).sum()


def _run(q, k, scale, bias, positive: Masks, impl: str) -> Tensor:
    return sigmoid_ops.total(_logits(q, k, scale, bias, positive), impl)


def _logits(q, k, scale, bias, positive: Masks) -> Logits:
    return Logits(q, k, scale, bias, *positive.ids(), positive.key)


_SIGMOID = declare("pairwise_sigmoid", _run, pairwise_sigmoid_reference)


def _check(q, k, scale, bias, positive) -> tuple[Tensor, Tensor, Masks]:
    """The scale and bias as tensors, and the mask, after refusing what does not fit."""
    if not isinstance(positive, PairMask | Masks):
        got = describe(positive)
        raise ValueError(f"positive must be a PairMask, or one given ids, got {got}")
    masks = check_pairs(q, k, positive)
    return as_number("scale", scale, q), as_number("bias", bias, q), masks


def pairwise_sigmoid(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    positive: PairMask | Masks,
    impl: str = "auto",
) -> Tensor:
    """Sum over all pairs of softplus(-y_ij (scale q_i . k_j + bias)): 0-d float32, in nats.

    q (M, D), k (N, D): any float dtype, the same for both; products and sums in float32.
    scale, bias: a number, or a 0-d float tensor on q's device, which then gets its gradient.
    positive: the pairs with y_ij = 1, all others having -1: a rule of `fastssl.kernels`, on
    positions (same_group: i == j) or on ids (same_group(mine, everyones)).
    impl: "auto", "triton", "torch" or "reference" (the formula as written, with (M, N) scores).
    auto is triton on CUDA, and torch elsewhere, for float64 and for a rule without Triton twin.
    The forward makes the gradients, where an input requires one and gradients are enabled.  First
    order only.  float64 inputs are summed and returned in float64, never by triton.
    A non-finite input is not an error: it gives a non-finite sum.
    Raises ValueError for shapes, dtypes and devices that disagree, an impl that is not there, and
    impl="triton" with float64, with a rule without twin, or off CUDA (unless TRITON_INTERPRET=1).

    >>> from fastssl.kernels import same_group
    >>> x = torch.zeros(3, 2)  # nine pairs at ln 2 each
    >>> round(pairwise_sigmoid(x, x, 10.0, 0.0, positive=same_group).item(), 4)
    6.2383
    """
    scale, bias, masks = _check(q, k, scale, bias, positive)
    options = {"inputs": {"q": q}, "problem": masks.problem}
    total = _SIGMOID(impl, q, k, scale, bias, masks, **options)
    return total.to(accumulator(q.dtype))


def pairwise_sigmoid_grads(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    positive: PairMask | Masks,
    need: Need,
) -> Results:
    """`pairwise_sigmoid` with its gradients as tensors, for a loss whose keys come in blocks.

    need: which of q's, k's, scale's and bias's gradients; the others have no elements.  They are
    float32 (float64 for float64), whatever the inputs' dtype.  Nothing here is differentiable.
    Raises what `pairwise_sigmoid` raises.
    """
    scale, bias, masks = _check(q, k, scale, bias, positive)
    impl = _SIGMOID.choose_for("auto", {"q": q}, masks.problem)
    return sigmoid_ops.results(_logits(q, k, scale, bias, masks), need, impl)
