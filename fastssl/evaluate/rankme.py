"""RankMe: how many dimensions the features really use.

    p_k = sigma_k / sum(sigma) + eps      RankMe = exp(-sum_k p_k log p_k)      1 <= RankMe <= D

sigma: the min(N, D) singular values of the (N, D) features, not centred.  They are the roots of
the eigenvalues of the smaller of the N x N Gram and D x D second-moment matrix, summed in float64
over chunks of rows: exact to 1e-8 of the largest, below the formula's own eps.
Source: Garrido et al. 2022, arXiv:2210.02885, equations 1 and 2.
"""

import torch
from torch import Tensor

from fastssl.evaluate._checks import checked_features

_ROWS = 8192  # rows in float64 at once


def rankme(x: Tensor, eps: float = 1e-7) -> float:
    """The effective rank of features (N, D), any float: D when all directions are used equally.

    1 when every sample is the same (collapse), 0 when all features are zero; at most min(N, D).
    Raises ValueError: fewer than 2 samples, non-finite features, eps <= 0.

    >>> round(rankme(torch.eye(8)), 3)
    8.0
    """
    if eps <= 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    x = checked_features("x", x)
    tall = x if x.shape[0] >= x.shape[1] else x.T
    gram = sum(rows.T @ rows for rows in map(Tensor.double, tall.split(_ROWS)))
    assert isinstance(gram, Tensor)
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if sigma.sum() == 0:
        return 0.0
    p = sigma / sigma.sum() + eps
    return float((-(p * p.log()).sum()).exp())
