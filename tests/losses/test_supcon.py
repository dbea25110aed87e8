import math

import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss as Rival

from fastssl.losses import NTXentLoss, SupConLoss
from fastssl.losses.supcon import supcon_reference
from tests.covering import pairwise
from tests.losses.views import views
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads


def features(B, V, D):
    torch.manual_seed(B + V)
    return torch.randn(B, V, D, device=DEVICE) + torch.randn(B, 1, D, device=DEVICE)


def some_labels(B, count):
    """Labels of any size; the last image is alone with its own."""
    generator = torch.Generator().manual_seed(B)
    labels = torch.randint(count, (B,), generator=generator) * 10**15 - 7
    labels[-1] = 12
    return labels.to(DEVICE)


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, V, D, count": [(33, 1, 16, 5), (65, 2, 8, 20), (17, 3, 4, 2)],
            "temperature": [0.5, 0.07],
            "reduce": UPSTREAM,
        }
    )
)
def test_khoslas_formula(B, V, D, count, temperature, reduce):
    labels = some_labels(B, count)
    assert_no_worse(
        lambda z: SupConLoss(temperature)(z, labels),
        lambda z: supcon_reference(z, labels, temperature),
        [features(B, V, D)],
        reduce,
    )


@pytest.mark.parametrize("V", [1, 2])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_pytorch_metric_learning(V, temperature):
    labels, rival = some_labels(40, 6), Rival(temperature)
    z = features(40, V, 8).double()
    ours = grads(lambda z: SupConLoss(temperature)(z, labels), [z])
    want = grads(lambda z: rival(z.flatten(0, 1), labels.repeat_interleave(V)), [z])
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("V", [2, 4])
def test_without_labels_every_image_is_its_own(V):
    z = features(30, V, 8).double()
    ours = grads(SupConLoss(0.2), [z])
    torch.testing.assert_close(
        ours, grads(lambda z: supcon_reference(z, torch.arange(30), 0.2), [z])
    )
    spelt = grads(lambda z: SupConLoss(0.2)(z, torch.arange(30, device=DEVICE)), [z])
    torch.testing.assert_close(ours, spelt)


def test_two_views_without_labels_are_simclr():
    z0, z1 = (z.double() for z in views(30, 8))
    both = torch.stack([z0, z1], 1)
    torch.testing.assert_close(SupConLoss(0.2)(both), NTXentLoss(0.2)(z0, z1))


def test_in_16_bits_an_image_alone_has_no_loss():
    """Its log-sum-exp is its positive's score, of the same rounded rows."""
    many = torch.randn(10, 1, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert max(SupConLoss()(views).item() for views in many) < 1e-6


def test_known_values():
    same = torch.ones(20, 3, 4, device=DEVICE)
    labels = some_labels(20, 4)
    assert SupConLoss()(same).item() == pytest.approx(math.log(59), rel=1e-6)
    assert SupConLoss()(same, labels).item() == pytest.approx(math.log(59), rel=1e-6)


@pytest.mark.parametrize("B", [1, 5])
def test_no_positives_at_all(B):
    z, labels = features(B, 1, 4), torch.arange(B, device=DEVICE)
    value, grad = grads(lambda z: SupConLoss()(z, labels), [z])
    assert value == 0 and not grad.any()


def test_labels_are_only_names():
    z, labels = features(30, 2, 4), some_labels(30, 5)
    value = SupConLoss()(z, labels)
    renamed = (labels * -3 + 1).to(torch.int64)
    torch.testing.assert_close(SupConLoss()(z, renamed), value)
    small = labels.unique(return_inverse=True)[1]
    torch.testing.assert_close(SupConLoss()(z, small.to(torch.uint8)), value)
    order = torch.randperm(30, device=DEVICE)
    torch.testing.assert_close(SupConLoss()(z[order], labels[order]), value)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)],
    ids=["float", "short", "column"],
)
def test_refuses_labels(labels):
    with pytest.raises(ValueError, match=r"labels must be \(4,\) integers"):
        SupConLoss()(torch.ones(4, 2, 3), labels)


def test_refuses_one_view_without_labels():
    with pytest.raises(ValueError, match="one view has no positives without labels"):
        SupConLoss()(torch.ones(4, 1, 3))
    with pytest.raises(ValueError, match="one view has no positives without labels"):
        SupConLoss()(torch.ones(4, 3))


@pytest.mark.parametrize("shape", [(4,), (0, 2, 3), (4, 0, 3), (4, 2, 0), (4, 2, 3, 1)])
def test_refuses_shapes(shape):
    with pytest.raises(ValueError, match=r"features must be \(B, V, D\), none of them empty, got"):
        SupConLoss()(torch.ones(shape))
