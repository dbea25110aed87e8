import math

import lightly.loss
import pytest
import torch
from lightly.loss.dcl_loss import negative_mises_fisher_weights

from fastssl.losses import DCLLoss, DCLWLoss
from tests.covering import pairwise
from tests.losses.views import views
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads

# lightly wraps its weights in torch.tensor(), which torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


def distance(a, b):
    """Weights that tell the directions apart, and have a gradient."""
    return (a - 0.3 * b)[:, 0].square()


PAIRS = {
    "dcl": (DCLLoss, lightly.loss.DCLLoss, {}),
    "dcl weighted": (DCLLoss, lightly.loss.DCLLoss, {"weight_fn": distance}),
    "dclw": (DCLWLoss, lightly.loss.DCLWLoss, {}),
    "dclw sharp": (DCLWLoss, lightly.loss.DCLWLoss, {"sigma": 0.1}),
}


@pytest.mark.parametrize(
    **pairwise(
        {
            "case": list(PAIRS),
            "B, D": [(2, 3), (65, 16), (300, 32)],
            "temperature": [0.5, 0.03],
            "reduce": UPSTREAM,
        }
    )
)
def test_value_and_gradient_of_lightly(case, B, D, temperature, reduce):
    ours, theirs, options = PAIRS[case]
    rival = theirs(temperature, **options)
    truth = grads(rival, [z.double() for z in views(B, D)], reduce)
    eager = grads(rival, views(B, D), reduce)
    mine = grads(ours(temperature, **options), views(B, D), reduce)
    for a, e, t in zip(mine, eager, truth, strict=True):
        as_accurate_as_eager(a, e, t, slack=4)  # of two images eager's error may be none


def test_known_values():
    same = torch.ones(50, 4, device=DEVICE)
    want = pytest.approx(math.log(98), rel=1e-6)
    assert DCLLoss(0.2)(same, same).item() == want
    assert DCLWLoss(0.2)(same, same).item() == want


def test_weights_are_largest_for_the_worst_match():
    z0, z1 = views(20, 4)
    z1[0] = -z0[0]
    unit = [torch.nn.functional.normalize(z) for z in (z0, z1)]
    weights = DCLWLoss(sigma=0.5).weight_fn(*unit)
    torch.testing.assert_close(weights, negative_mises_fisher_weights(*unit, sigma=0.5))
    assert weights.argmax() == 0 and weights.mean().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("loss", [DCLLoss(), DCLWLoss()])
def test_refuses_one_image(loss):
    with pytest.raises(ValueError, match="joined batch must have at least 2 images, got 1"):
        loss(torch.ones(1, 3), torch.ones(1, 3))


def test_refuses_weights_of_another_shape():
    with pytest.raises(ValueError, match=r"must return weights \(5,\), got \(5, 4\)"):
        DCLLoss(weight_fn=lambda a, b: a)(*views(5, 4))
