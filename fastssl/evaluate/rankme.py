"""How many dimensions the features really use: their spectrum, and RankMe, its effective rank.

    p_k = sigma_k / sum(sigma) + eps      RankMe = exp(-sum_k p_k log p_k)      1 <= RankMe <= D

sigma: the min(N, D) singular values of the (N, D) features, not centered.  They are the roots of
the eigenvalues of the smaller of the N x N Gram and D x D second-moment matrix, summed in float64
over chunks of rows: exact to 1e-8 of the largest, below the formula's own eps.
Source: Garrido et al. 2022, arXiv:2210.02885, equations 1 and 2; the spectrum as a measure of
dimensional collapse: Jing et al. 2021, arXiv:2110.09348.
"""

import torch
from torch import Tensor

from fastssl.evaluate._checks import checked_features

_ROWS = 8192  # rows in float64 at once


def spectrum(x: Tensor, *, centered: bool = True) -> Tensor:
    """The eigenvalues of the covariance of features (N, D), any float: (min(N, D),) float64.

    In descending order, never below 0; the D - N that are left out when N < D are 0, and with
    centered=True so is the smallest when N <= D.  Their sum is the features' total variance.
    centered: the covariance, x minus its mean, divided by N - 1; False: the second moment about 0,
    divided by N.  A value is exact to 1e-15 of the largest one.
    Raises ValueError: fewer than 2 samples, non-finite features.

    >>> spectrum(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])).tolist()
    [6.0, 0.6666666666666666]
    """
    x = checked_features("x", x)
    tall = len(x) >= x.shape[1]
    mean = x.mean(0, dtype=torch.float64) if centered else x.new_zeros(x.shape[1:])
    # A chunk's rows are samples, or features when those are more: then each has a mean of its own.
    means = mean.expand(len(x), -1) if tall else mean[:, None]
    parts = zip((x if tall else x.T).split(_ROWS), means.split(_ROWS), strict=True)
    gram = sum(rows.T @ rows for rows in (part.double() - about for part, about in parts))
    assert isinstance(gram, Tensor)
    values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
    return values / (len(x) - int(centered))


def rankme(x: Tensor, eps: float = 1e-7) -> float:
    """The effective rank of features (N, D), any float: D when all directions are used equally.

    1 when every sample is the same (collapse), 0 when all features are zero; at most min(N, D).
    Raises ValueError: fewer than 2 samples, non-finite features, eps <= 0.

    >>> round(rankme(torch.eye(8)), 3)
    8.0
    """
    if eps <= 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    sigma = spectrum(x, centered=False).sqrt()
    if sigma.sum() == 0:
        return 0.0
    p = sigma / sigma.sum() + eps
    return float((-(p * p.log()).sum()).exp())
