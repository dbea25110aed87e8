"""How good are frozen features?  Pure functions of features (N, D) and int64 labels (N,).

With labels: kNN and a linear probe on held-out samples.  Without: RankMe and uniformity of the
train features, and alignment when two views of the same images are given.
"""

from dataclasses import asdict, dataclass

from torch import Tensor

from fastssl.evaluate._checks import checked_features, same_width
from fastssl.evaluate.alignment_uniformity import alignment as alignment
from fastssl.evaluate.alignment_uniformity import uniformity as uniformity
from fastssl.evaluate.knn import knn_accuracy as knn_accuracy
from fastssl.evaluate.linear import fit_probe
from fastssl.evaluate.linear import linear_probe as linear_probe
from fastssl.evaluate.rankme import rankme as rankme
from fastssl.evaluate.rankme import spectrum as spectrum


@dataclass(frozen=True)
class Evaluation:
    """The measures of one encoder; None where one was not taken, with the reason in `notes`."""

    rankme: float  # effective rank of the train features, in [0, min(N, D)]
    uniformity: float  # of the train features, in [-8, 0]; lower is more spread out
    knn: float | None = None  # accuracy on the test samples, in [0, 1]
    linear: float | None = None  # accuracy on the test samples, in [0, 1]
    alignment: float | None = None  # of the two views given, in [0, 4]; lower is closer
    notes: tuple[str, ...] = ()  # a sentence for each measure that is missing or doubtful

    def as_dict(self) -> dict[str, float | None | list[str]]:
        """The fields by name, ready for JSON."""
        return {**asdict(self), "notes": list(self.notes)}


def evaluate_features(
    train_x: Tensor,
    test_x: Tensor,
    train_y: Tensor | None = None,
    test_y: Tensor | None = None,
    *,
    views: tuple[Tensor, Tensor] | None = None,
    k: int = 20,
    l2: float = 1e-3,
) -> Evaluation:
    """Every measure that the given features and labels allow.

    train_x (N, D), test_x (M, D): any float; train_y (N,), test_y (M,): int64, both or neither.
    `views`: the features (n, D) of two augmented views of the same n images, for alignment.
    Raises ValueError: labels of one split only, fewer than 2 samples, shapes that disagree,
    non-finite features.  Labels that name fewer than 2 classes leave kNN and linear at None.
    """
    train_x, test_x = checked_features("train_x", train_x), checked_features("test_x", test_x)
    same_width("train_x", train_x, "test_x", test_x)
    knn, linear, notes = None, None, []
    if train_y is None or test_y is None:
        if train_y is not test_y:
            missing = "train_y" if train_y is None else "test_y"
            raise ValueError(f"labels are needed for both splits or neither, got {missing}=None")
        notes.append("no labels: kNN and linear probe were not measured")
    elif len(train_y.unique()) < 2:
        notes.append("train labels name a single class: kNN and linear probe were not measured")
    else:
        knn = knn_accuracy(train_x, train_y, test_x, test_y, k=k)
        probe = fit_probe(train_x, train_y, test_x, test_y, l2=l2, max_iter=1000)
        linear = probe.accuracy
        if not probe.converged:
            notes.append(f"the linear probe stopped unconverged after {probe.iterations} steps")
    return Evaluation(
        rankme=rankme(train_x),
        uniformity=uniformity(train_x),
        knn=knn,
        linear=linear,
        alignment=None if views is None else alignment(*views),
        notes=tuple(notes),
    )
