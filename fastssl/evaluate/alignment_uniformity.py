"""Alignment and uniformity: the two things a contrastive loss asks of features on the sphere.

    alignment(a, b)  = mean_i ||a_i - b_i||^alpha              two views of the same images: small
    uniformity(x)    = log mean_{i != j} exp(-t ||x_i - x_j||^2)      spread over the sphere: small

Features are L2-normalized first.  Uniformity lies in [-4t, 0] and is 0 when all points coincide;
for points spread evenly on a high-dimensional sphere it nears -2t.
Source: Wang & Isola 2020, arXiv:2005.10242, section 4.1 (alpha = 2, t = 2).
"""

import math

import torch
from torch import Tensor

from fastssl.evaluate._checks import checked_features, directions, same_width
from fastssl.kernels import exclude_self, pairwise_lse


def alignment(a: Tensor, b: Tensor, alpha: float = 2.0) -> float:
    """Mean distance to the power `alpha` between row i of `a` and row i of `b`, both (N, D).

    In [0, 2**alpha]; 0 when both views have the same direction.
    Raises ValueError: shapes that disagree, fewer than 2 samples, non-finite features, alpha <= 0.

    >>> import torch
    >>> alignment(torch.eye(3), torch.eye(3))
    0.0
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    a, b = checked_features("a", a), checked_features("b", b)
    same_width("a", a, "b", b)
    if len(a) != len(b):
        raise ValueError(f"a and b must hold the same samples, got {len(a)} and {len(b)}")
    distance = (directions(a) - directions(b)).double().norm(dim=1)
    return float(distance.pow(alpha).mean())


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential over pairs of different rows of `x` (N, D).

    A row of zeros has no direction: it coincides with its like, orthogonal to all other rows.
    Takes O(N * N * D) operations and O(N) memory beside the features.
    Raises ValueError: fewer than 2 samples, non-finite features, t <= 0.

    >>> import torch
    >>> round(uniformity(torch.eye(3)), 6)  # every squared distance is 2
    -4.0
    """
    if t <= 0:
        raise ValueError(f"t must be > 0, got {t}")
    x = checked_features("x", x)
    zero = (x == 0).all(1, keepdim=True).to(x.dtype)
    x = torch.cat([directions(x), zero], dim=1)
    # On the sphere -t |x_i - x_j|^2 = 2t (x_i . x_j - 1): each row is one streamed log-sum-exp.
    rows = pairwise_lse(x, x, 2 * t, mask=exclude_self).double()
    return float(rows.logsumexp(0)) - 2 * t - math.log(len(x) * (len(x) - 1))
