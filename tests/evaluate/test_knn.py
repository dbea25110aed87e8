"""kNN against a plain Python vote, scikit-learn's own, and the laws it must keep."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastssl.evaluate import knn, knn_accuracy


def clusters(n, classes, dim, spread, seed=0):
    """Labeled points around `classes` random directions; train and test halves."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=g)
    y = torch.randint(classes, (2 * n,), generator=g)
    x = centers[y] + spread * torch.randn(2 * n, dim, generator=g)
    return x[:n], y[:n], x[n:], y[n:]


def accuracy_by_hand(train_x, train_y, test_x, test_y, k, temperature):
    """Section 3.4 of the paper, one test sample and one neighbor at a time."""
    right = 0
    for x, y in zip(test_x.tolist(), test_y.tolist(), strict=True):
        similar = []
        for other, label in zip(train_x.tolist(), train_y.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(x, other, strict=True))
            similar.append((dot / math.hypot(*x) / math.hypot(*other), label))
        votes = {}
        for s, label in sorted(similar, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(s / temperature)
        right += max(votes, key=lambda label: votes[label]) == y
    return right / len(test_y)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_a_vote_by_hand(k, temperature):
    data = clusters(61, 4, 5, spread=1.5)
    expected = accuracy_by_hand(*data, k, temperature)
    assert 0.3 < expected < 0.95  # hard enough that a wrong weight shows
    assert knn_accuracy(*data, k=k, temperature=temperature) == expected


def test_agrees_with_scikit_learn():
    train_x, train_y, test_x, test_y = clusters(150, 5, 8, spread=2.0, seed=1)
    model = KNeighborsClassifier(
        15, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = model.fit(train_x.numpy(), train_y.numpy()).score(test_x.numpy(), test_y.numpy())
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=15) == pytest.approx(expected)


def test_weights_decide_against_the_majority():
    train_x = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, 1.0]])  # one close, two far
    train_y = torch.tensor([7, -3, -3])
    test_x, test_y = torch.tensor([[1.0, 0.0], [2.0, 0.1]]), torch.tensor([7, 7])
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=3, temperature=0.07) == 1.0
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=3, temperature=100.0) == 0.0


def test_k_beyond_the_train_set_is_clamped():
    data = clusters(9, 2, 3, spread=1.0)
    assert knn_accuracy(*data, k=1000) == knn_accuracy(*data, k=9)


def test_chunks_change_nothing(monkeypatch):
    data = clusters(50, 4, 5, spread=1.5)
    whole = knn_accuracy(*data, k=5)
    monkeypatch.setattr(knn, "_ROWS", 7)
    assert knn_accuracy(*data, k=5) == whole


def test_scale_of_features_and_small_temperatures_change_nothing():
    train_x, train_y, test_x, test_y = clusters(60, 4, 5, spread=1.5)
    nearest = knn_accuracy(train_x, train_y, test_x, test_y, k=1)
    scaled = (1e4 * train_x, train_y, 1e-3 * test_x, test_y)
    assert knn_accuracy(*scaled, k=5, temperature=1e-6) == nearest
    for train, test in ((1e-20, 1e25), (1e30, 1e-38)):  # fault 9: their squares leave float32
        assert knn_accuracy(train * train_x, train_y, test * test_x, test_y, k=1) == nearest


def test_a_label_the_train_set_lacks_is_a_mistake():
    x = torch.eye(3)
    accuracy = knn_accuracy(x[:2], torch.tensor([0, 1]), x[[0, 1]], torch.tensor([0, 5]), k=1)
    assert accuracy == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"test_x": torch.ones(2, 5)}, "same width, got 3 and 5"),
        ({"test_x": torch.full((2, 3), math.nan)}, "test_x has non-finite values in 2 of 2 rows"),
        ({"train_y": torch.zeros(4, dtype=torch.int64)}, "train_y must be an int64 tensor of 2"),
        ({"test_y": torch.zeros(2)}, "test_y must be an int64 tensor of 2"),
        ({"train_x": torch.ones(1, 3)}, "train_x must hold at least 2 samples, got 1"),
        ({"train_x": torch.ones(2, 3).long()}, "train_x must be a float tensor"),
    ],
)
def test_bad_input_is_named(change, message):
    labels = torch.tensor([0, 1])
    good = {"train_x": torch.rand(2, 3), "train_y": labels}
    good |= {"test_x": torch.rand(2, 3), "test_y": labels}
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**(good | change))
