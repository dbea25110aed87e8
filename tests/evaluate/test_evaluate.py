"""evaluate_features: which measures appear when, and that they are the single ones."""

import json

import pytest
import torch
from sklearn.datasets import load_digits

from fastssl.evaluate import (
    Evaluation,
    alignment,
    evaluate_features,
    knn_accuracy,
    linear_probe,
    rankme,
    uniformity,
)


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    return x[:300], x[300:400], y[:300], y[300:400]


def test_every_measure_is_the_single_one():
    train_x, test_x, train_y, test_y = digits()
    views = test_x, test_x + torch.randn_like(test_x)
    data = train_x, train_y, test_x, test_y
    assert evaluate_features(train_x, test_x, train_y, test_y, views=views, k=7) == Evaluation(
        rankme=rankme(train_x),
        uniformity=uniformity(train_x),
        knn=knn_accuracy(*data, k=7),
        linear=linear_probe(*data),
        alignment=alignment(*views),
    )
    assert linear_probe(*data) > 0.8 < knn_accuracy(*data, k=7)


def test_without_labels_the_reason_is_given():
    train_x, test_x, *_ = digits()
    result = evaluate_features(train_x, test_x)
    assert (result.knn, result.linear, result.alignment) == (None, None, None)
    assert result.rankme > 1
    assert result.notes == ("no labels: kNN and linear probe were not measured",)
    assert json.loads(json.dumps(result.as_dict()))["notes"] == list(result.notes)


def test_a_single_class_leaves_the_supervised_measures_out():
    train_x, test_x, train_y, test_y = digits()
    result = evaluate_features(train_x, test_x, 0 * train_y, test_y)
    assert (result.knn, result.linear) == (None, None)
    assert "single class" in result.notes[0]


def test_labels_of_one_split_only_are_refused():
    train_x, test_x, train_y, test_y = digits()
    with pytest.raises(ValueError, match="got test_y=None"):
        evaluate_features(train_x, test_x, train_y)
    with pytest.raises(ValueError, match="got train_y=None"):
        evaluate_features(train_x, test_x, None, test_y)


def test_bad_features_are_refused():
    train_x, test_x, *_ = digits()
    with pytest.raises(ValueError, match="test_x has non-finite values in 100 of 100 rows"):
        evaluate_features(train_x, test_x / 0)
    with pytest.raises(ValueError, match="train_x must hold at least 2 samples, got 1"):
        evaluate_features(train_x[:1], test_x)
