"""NTXentLoss of labeled embeddings: pytorch-metric-learning's value and gradient."""

import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss as Rival

from fastssl.kernels.common import chunks
from fastssl.losses import NTXentLoss, SupConLoss
from fastssl.losses._labeled import labeled_ntxent_reference
from fastssl.losses._unit import unit
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, saved_elements


def batch(N, D=8, groups=(1, 2, 7)):
    """Rows, and labels of any size: the first groups of those lengths, the rest of 5 labels."""
    torch.manual_seed(N)
    some = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups)) - 10**15
    labels = torch.cat([some, torch.randint(5, (N - len(some),))])[torch.randperm(N)]
    return torch.randn(N, D, device=DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("temperature", [0.5, 0.05])
@pytest.mark.parametrize("rows", [10**6, 7])
def test_value_and_gradient_of_pytorch_metric_learning(monkeypatch, temperature, rows):
    z, labels = batch(40)
    monkeypatch.setitem(chunks.CHUNK_BYTES, DEVICE, rows * 40 * 8)
    rival, ours = Rival(temperature), NTXentLoss(temperature)
    got, want = (grads(lambda z, f=f: f(z, labels), [z.double()]) for f in (ours, rival))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_the_formula(dtype, reduce):
    z, labels = batch(65, 16)

    def eager(z):
        rows = unit(z).to(z.dtype).to(unit(z).dtype)
        return labeled_ntxent_reference(rows, labels, 0.1)

    assert_no_worse(lambda z: NTXentLoss(0.1)(z, labels), eager, [z.to(dtype)], reduce)


@pytest.mark.parametrize("labels", [torch.arange(6), torch.zeros(6).long()], ids=["own", "one"])
def test_without_a_pair_or_another_label_it_is_zero(labels):
    z = torch.randn(6, 4, device=DEVICE)
    value, grad = grads(lambda z: NTXentLoss()(z, labels.to(DEVICE)), [z])
    assert value == 0 and not grad.any()


def test_a_nan_shows():
    z, labels = batch(20)
    z[3] = torch.nan
    assert NTXentLoss()(z, labels).isnan()


def test_nothing_of_all_pairs_is_kept():
    z, labels = batch(300, 4)
    z.requires_grad_()
    assert saved_elements(lambda: NTXentLoss()(z, labels)) < 30 * z.numel()
    with torch.no_grad():
        torch.testing.assert_close(NTXentLoss()(z, labels), NTXentLoss()(z.detach(), labels))


BAD = [torch.zeros(4), torch.zeros(4, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)]


@pytest.mark.parametrize("loss", [NTXentLoss(), SupConLoss(), NTXentLoss(0.5, (5, 3))], ids=repr)
@pytest.mark.parametrize("labels", BAD, ids=["float", "bool", "short"])
def test_refuses_labels(loss, labels):
    got = f"{tuple(labels.shape)} {labels.dtype}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"labels must be \(4,\) integers on .*, got {got}"):
        loss(torch.ones(4, 3), labels)


def test_refuses_labels_beside_a_bank():
    with pytest.raises(ValueError, match="labels must come without a memory bank, got .*Queue"):
        NTXentLoss(0.5, (5, 3))(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
