"""The linear probe against a gradient descent of its own objective, and the laws it must keep."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastssl.evaluate import linear_probe


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    return x[:400], y[:400], x[400:700], y[400:700]


def accuracy_by_torch(train_x, train_y, test_x, test_y, l2):
    """The objective of the docstring, minimized by torch's own L-BFGS in float64."""
    mean, deviation = train_x.mean(0), train_x.std(0, correction=0)
    deviation[deviation == 0] = 1
    x, held_out = ((t.double() - mean) / deviation for t in (train_x, test_x))
    w = torch.zeros(x.shape[1], 10, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(x @ w + b, train_y) + l2 / 2 * w.pow(2).sum()
        loss.backward()
        return loss

    solver.step(objective)
    return float(((held_out @ w + b).argmax(1) == test_y).double().mean())


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_minimizes_its_objective(l2):
    data = digits()
    expected = accuracy_by_torch(*data, l2)
    assert linear_probe(*data, l2=l2) == pytest.approx(expected, abs=1.01 / 300)


def test_the_penalty_does_not_depend_on_the_number_of_samples():
    train_x, train_y, test_x, test_y = digits()
    once = linear_probe(train_x, train_y, test_x, test_y, l2=0.3)
    thrice = linear_probe(train_x.repeat(3, 1), train_y.repeat(3), test_x, test_y, l2=0.3)
    assert once == pytest.approx(thrice, abs=1.01 / 300)


def test_the_units_of_a_feature_do_not_matter():
    train_x, train_y, test_x, test_y = digits()
    units, shift = torch.logspace(-3, 3, 64), torch.linspace(-5, 5, 64)
    plain = linear_probe(train_x, train_y, test_x, test_y)
    other = linear_probe(train_x * units + shift, train_y, test_x * units + shift, test_y)
    assert plain == pytest.approx(other, abs=1.01 / 300)


def test_a_feature_constant_in_the_train_set_is_ignored():
    train_x, train_y, test_x, test_y = digits()
    plain = linear_probe(train_x, train_y, test_x, test_y)
    noise = 100 + 1e-5 * torch.arange(400).remainder(2)[:, None]  # float32 rounding, no signal
    wild = torch.linspace(-1e6, 1e6, 300)[:, None]
    joined = torch.cat([train_x, noise], 1), torch.cat([test_x, wild], 1)
    assert linear_probe(joined[0], train_y, joined[1], test_y) == plain


def test_labels_may_have_any_values():
    x = torch.eye(3).repeat(4, 1)
    y = torch.tensor([-7, 100, 3]).repeat(4)
    assert linear_probe(x, y, x, y) == 1.0


def test_an_unconverged_fit_says_so():
    data = digits()
    with pytest.warns(RuntimeWarning, match="had not converged after 2 iterations"):
        linear_probe(*data, max_iter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(*data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2": 0.0}, "got l2=0.0 and max_iter=1000"),
        ({"max_iter": 0}, "got l2=0.001 and max_iter=0"),
        ({"train_y": torch.ones(2, dtype=torch.int64)}, "at least 2 classes, got only 1"),
        ({"train_x": torch.full((2, 3), math.inf)}, "train_x has non-finite values in 2 of 2 rows"),
        ({"test_x": torch.ones(2, 5)}, "same width, got 3 and 5"),
    ],
)
def test_bad_input_is_named(change, message):
    labels = torch.tensor([0, 1])
    good = {"train_x": torch.rand(2, 3), "train_y": labels}
    good |= {"test_x": torch.rand(2, 3), "test_y": labels}
    with pytest.raises(ValueError, match=message):
        linear_probe(**(good | change))
