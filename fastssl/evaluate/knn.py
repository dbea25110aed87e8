"""Weighted k-nearest-neighbor classification of frozen features.

    s_ij = cos(test_i, train_j)
    vote_i(c) = sum of exp(s_ij / tau) over those of the k nearest j that are of class c

Source: Wu et al. 2018, instance discrimination, arXiv:1805.01978, section 3.4 (tau = 0.07).
M test rows, N train rows, C classes.
"""

from torch import Tensor

from fastssl.evaluate._checks import checked_features, checked_labels, directions, same_width
from fastssl.kernels.pairwise import pairwise_topk

_ROWS = 4096  # test rows voting at once: bounds the (rows, C) tally, whatever M is


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test samples, in [0, 1], whose weighted vote gives their own label.

    train_x (N, D) and test_x (M, D): any float; train_y (N,) and test_y (M,): int64, any values.
    `k` is clamped to N.  A test label that no train sample has counts as a mistake.
    Raises ValueError: k < 1, temperature <= 0, shapes that disagree, non-finite features.

    >>> import torch
    >>> x = torch.eye(2).repeat(3, 1)
    >>> y = torch.tensor([0, 1]).repeat(3)
    >>> knn_accuracy(x, y, x, y, k=3)
    1.0
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    train_x, test_x = checked_features("train_x", train_x), checked_features("test_x", test_x)
    same_width("train_x", train_x, "test_x", test_x)
    train_y = checked_labels("train_y", train_y, train_x)
    test_y = checked_labels("test_y", test_y, test_x)
    classes, train_class = train_y.unique(return_inverse=True)
    keys = directions(train_x)
    right = 0
    for rows, labels in zip(test_x.split(_ROWS), test_y.split(_ROWS), strict=True):
        s_Mk, nearest_Mk = pairwise_topk(directions(rows), keys, min(k, len(keys)))
        # Only the ratios of the weights matter: taking the best similarity off keeps exp finite.
        weights_Mk = ((s_Mk - s_Mk.amax(1, keepdim=True)) / temperature).exp()
        votes_MC = weights_Mk.new_zeros(len(rows), len(classes))
        votes_MC.scatter_add_(1, train_class[nearest_Mk], weights_Mk)
        right += int((classes[votes_MC.argmax(1)] == labels).sum())
    return right / len(test_y)
