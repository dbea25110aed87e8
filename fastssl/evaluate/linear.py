"""Linear probe: multinomial logistic regression on frozen, standardised features.

    minimize over W, b:   mean_i CE(W x_i + b, y_i) + l2 / 2 * ||W||^2

The penalty is on the *mean* loss, so one `l2` means the same for a small and a large train set.
The bias is free of it.  L-BFGS from zero: no seed, so the same features give the same accuracy.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.evaluate._checks import checked_features, checked_labels, same_width


class ProbeFit(NamedTuple):
    """What a fitted probe says of the features."""

    accuracy: float  # on the test samples, in [0, 1]
    converged: bool  # False: max_iter ran out, the accuracy is a lower estimate
    iterations: int


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    l2: float = 1e-3,
    max_iter: int = 1000,
) -> float:
    """Share of test samples, in [0, 1], that a linear classifier on the features gets right.

    train_x (N, D) and test_x (M, D): any float; train_y (N,) and test_y (M,): int64, any values.
    Both are standardised with the train set's mean and deviation; a constant feature becomes 0.
    Warns (RuntimeWarning) when `max_iter` ends the fit before it has converged.
    Raises ValueError: l2 <= 0, max_iter < 1, fewer than 2 classes in train_y, shapes that
    disagree, non-finite features.

    >>> x = torch.eye(2).repeat(3, 1)
    >>> y = torch.tensor([0, 1]).repeat(3)
    >>> linear_probe(x, y, x, y)
    1.0
    """
    fit = fit_probe(train_x, train_y, test_x, test_y, l2=l2, max_iter=max_iter)
    if not fit.converged:
        warnings.warn(
            f"the linear probe had not converged after {fit.iterations} iterations; "
            "a larger max_iter or l2 would let it",
            RuntimeWarning,
            stacklevel=2,
        )
    return fit.accuracy


def fit_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, l2: float, max_iter: int
) -> ProbeFit:
    """`linear_probe` with its convergence as a value instead of a warning; arguments as there."""
    from sklearn.exceptions import ConvergenceWarning  # two seconds to import, for a probe alone
    from sklearn.linear_model import LogisticRegression

    if l2 <= 0 or max_iter < 1:
        raise ValueError(f"want l2 > 0 and max_iter >= 1, got l2={l2} and max_iter={max_iter}")
    train_x, test_x = checked_features("train_x", train_x), checked_features("test_x", test_x)
    same_width("train_x", train_x, "test_x", test_x)
    train_y = checked_labels("train_y", train_y, train_x)
    test_y = checked_labels("test_y", test_y, test_x)
    if len(train_y.unique()) < 2:
        raise ValueError(f"train_y must hold at least 2 classes, got only {int(train_y[0])}")
    deviation, mean = torch.std_mean(train_x.double(), dim=0, correction=0)
    # A feature constant up to float32 rounding carries nothing; dividing by its noise invents it.
    silent = deviation <= 1e-6 * mean.abs()
    scale = torch.where(silent, 0.0, 1.0 / deviation.masked_fill(silent, 1.0))
    x, held_out = (((x.double() - mean) * scale).cpu().numpy() for x in (train_x, test_x))
    model = LogisticRegression(C=1.0 / (l2 * len(x)), max_iter=max_iter, tol=1e-5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, train_y.cpu().numpy())
    for other in (w for w in seen if not issubclass(w.category, ConvergenceWarning)):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in seen)
    accuracy = float(model.score(held_out, test_y.cpu().numpy()))
    return ProbeFit(accuracy, converged, int(max(model.n_iter_)))
