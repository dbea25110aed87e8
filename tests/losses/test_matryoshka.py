import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.losses import (
    BarlowTwinsLoss,
    CLIPLoss,
    DenseInfoNCELoss,
    GroupedNTXentLoss,
    ISogCLRLoss,
    MatryoshkaLoss,
    MoCoLoss,
    NTXentLoss,
    SupConLoss,
    _nested,
)
from tests.losses.views import views
from tests.oracle import DEVICE, grads

IDS = torch.arange(12, device=DEVICE) % 5


class Scaled(nn.Module):
    """A loss with a parameter of its own and a scale by name."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(()))

    def forward(self, image, text, logit_scale):
        assert image.shape == text.shape and logit_scale.ndim == 0
        return logit_scale * (image * text).sum() + self.bias


@pytest.mark.parametrize("weights", [None, (0.5, 0, 2)])
def test_a_weighted_sum_over_prefixes(weights):
    inputs, one = [z.double() for z in views(12, 8)], NTXentLoss(0.2)

    def spelt(a, b):
        parts = zip(weights or (1, 1, 1), (2, 3, 8), strict=True)
        return sum(w * one(a[:, :m], b[:, :m]) for w, m in parts)

    loss = MatryoshkaLoss(one, dims=(2, 3, 8), weights=weights)
    torch.testing.assert_close(grads(loss, inputs), grads(spelt, inputs))


@pytest.mark.parametrize(
    "loss, extra",
    [
        (NTXentLoss(), ()),
        (GroupedNTXentLoss(), (IDS,)),
        (BarlowTwinsLoss(), ()),
    ],
)
def test_any_loss_of_two_embeddings(loss, extra):
    a, b = views(12, 8)
    want = loss(a[:, :4], b[:, :4], *extra) + loss(a, b, *extra)
    torch.testing.assert_close(MatryoshkaLoss(loss, (4, 8))(a, b, *extra), want)


def test_stacked_views_and_positions():
    z = torch.randn(12, 3, 8, device=DEVICE)
    want = SupConLoss()(z[..., :4], IDS) + SupConLoss()(z, IDS)
    torch.testing.assert_close(MatryoshkaLoss(SupConLoss(), (4, 8))(z, labels=IDS), want)
    match = torch.tensor([[2, 0, 1]], device=DEVICE).expand(12, 3)
    dense = DenseInfoNCELoss()
    want = dense(z[..., :4], z[..., :4], match) + dense(z, z, match)
    torch.testing.assert_close(MatryoshkaLoss(dense, (4, 8))(z, z, match), want)


def test_scales_pass_and_parameters_are_shared():
    image, text = views(5, 4)
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    loss = MatryoshkaLoss(Scaled().to(DEVICE), (1, 4))
    loss(image, text, logit_scale=scale).backward()
    want = (image * text)[:, 0].sum() + (image * text).sum()
    torch.testing.assert_close(scale.grad, want)
    assert [p.grad.item() for p in loss.parameters()] == [2.0]


def test_state_is_kept_by_prefix():
    torch.manual_seed(0)
    loss = MatryoshkaLoss([MoCoLoss(2, size=6), MoCoLoss(4, size=6)], (2, 4)).to(DEVICE)
    query, key = views(6, 4)
    alone = [MoCoLoss(2, size=6).to(DEVICE), MoCoLoss(4, size=6).to(DEVICE)]
    for _ in range(2):
        want = alone[0](query[:, :2], key[:, :2]) + alone[1](query, key)
        torch.testing.assert_close(loss(query, key), want)
    assert [one.queue.dim for one in loss.losses] == [2, 4]


@pytest.mark.parametrize(
    "loss", [MoCoLoss(4, size=3), NTXentLoss(0.5, (3, 4)), ISogCLRLoss(12)], ids=repr
)
def test_refuses_one_state_for_all(loss):
    with pytest.raises(ValueError, match="a loss with state must be given once for each of dims"):
        MatryoshkaLoss(loss, (2, 4))


def test_known_value():
    same = torch.ones(50, 8, device=DEVICE)
    value = MatryoshkaLoss(NTXentLoss(), (1, 2, 4, 8))(same, same).item()
    assert value == pytest.approx(4 * math.log(99), rel=1e-6)


@pytest.mark.parametrize("dims", [(), (0, 4), (4, 4), (8, 4), (-1,), (1.5, 4)])
def test_refuses_dims(dims):
    with pytest.raises(ValueError, match="dims must be integers that rise from 1 or more, got"):
        MatryoshkaLoss(NTXentLoss(), dims)


@pytest.mark.parametrize("weights", [(1,), (1, -1), (1, float("nan"))])
def test_refuses_weights(weights):
    with pytest.raises(ValueError, match="weights must be 2 finite numbers >= 0"):
        MatryoshkaLoss(NTXentLoss(), (2, 4), weights)


def test_refuses_losses_that_are_not_as_dims():
    with pytest.raises(ValueError, match="loss must be one, or 2 as dims, got 3"):
        MatryoshkaLoss([NTXentLoss()] * 3, (2, 4))


@pytest.mark.parametrize("shapes", [((4, 3), (4, 3)), ((4, 8), (4, 9)), ((4,), (4,))])
def test_refuses_embeddings(shapes):
    with pytest.raises(ValueError, match=r"want embeddings \(..., D\) of one D >= 4, got"):
        MatryoshkaLoss(NTXentLoss(), (2, 4))(*(torch.ones(s) for s in shapes))


def one_after_another(loss, dims, **options):
    """Losses given for each prefix are taken so, whatever they are."""
    return MatryoshkaLoss([copy.deepcopy(loss) for _ in dims], dims, **options)


@pytest.fixture
def sweeps(monkeypatch):
    """How often the prefixes were taken in one sweep."""
    seen, call = [], _nested.pairwise_lse_nested
    counted = lambda *a, **o: seen.append(1) or call(*a, **o)  # noqa: E731
    monkeypatch.setattr(_nested, "pairwise_lse_nested", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "loss, scale, normalize",
    [(NTXentLoss(-0.1), (), False), (CLIPLoss(), (5.0,), False), (CLIPLoss(), (20.0,), True)],
)
def test_one_sweep_is_one_prefix_after_another(loss, scale, normalize, dtype, sweeps):
    dims, tail = (2, 3, 8), [torch.tensor(s) for s in scale]
    inputs = [z.to(dtype) for z in (*views(33, 9), *tail)]
    at_once = grads(MatryoshkaLoss(loss, dims, normalize=normalize), inputs)
    assert len(sweeps) == (DEVICE == "cpu")
    singly = grads(one_after_another(loss, dims, normalize=normalize), inputs)
    torch.testing.assert_close(at_once, singly, rtol=1e-5, atol=1e-6)


def test_normalized_prefixes_of_a_loss_that_takes_rows_as_they_are():
    a, b = views(9, 8)
    want = sum(CLIPLoss()(*(F.normalize(z[:, :m]) for z in (a, b)), 5.0) for m in (2, 8))
    loss = one_after_another(CLIPLoss(), (2, 8), normalize=True)
    torch.testing.assert_close(loss(a, b, 5.0), want)


def test_one_sweep_takes_names(sweeps):
    a, b = views(9, 8)
    MatryoshkaLoss(NTXentLoss(), (2, 8))(out1=b, out0=a)
    MatryoshkaLoss(CLIPLoss(), (2, 8))(a, b, logit_scale=5.0)
    assert len(sweeps) == 2 * (DEVICE == "cpu")


class Halved(NTXentLoss):
    """A forward of its own."""

    def forward(self, out0, out1):
        return super().forward(out0, out1) / 2


def faint(z):
    """Prefixes whose squares float32 cannot add."""
    return torch.cat([1e-30 * z[:, :4], z[:, 4:]], 1)


SINGLY = {
    "a subclass": (Halved(0.2), lambda a, b: (a, b)),
    "labels": (NTXentLoss(0.2), lambda a, b: (a, torch.arange(9, device=DEVICE) % 2)),
    "16 bits": (NTXentLoss(0.2), lambda a, b: (a.bfloat16(), b.bfloat16())),
    "faint": (NTXentLoss(0.2), lambda a, b: (faint(a), b)),
    "a bias": (CLIPLoss(), lambda a, b: (a, b, 5.0, torch.tensor(1.0, device=DEVICE))),
    "a scale (1,)": (CLIPLoss(), lambda a, b: (a, b, torch.full((1,), 5.0, device=DEVICE))),
}


@pytest.mark.parametrize("case", SINGLY)
def test_what_one_sweep_does_not_take(case, sweeps):
    loss, inputs = SINGLY[case]
    given = inputs(*views(9, 8))
    at_once = MatryoshkaLoss(loss, (2, 8))(*given)
    assert not sweeps and at_once.isfinite()
    torch.testing.assert_close(at_once, one_after_another(loss, (2, 8))(*given))


def test_one_sweep_refuses_as_the_loss_does():
    with pytest.raises(ValueError, match="out0 and out1 must both be"):
        MatryoshkaLoss(NTXentLoss(), (2, 4))(torch.ones(4, 8), torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"labels must be \(4,\) integers"):
        MatryoshkaLoss(NTXentLoss(), (2, 4))(torch.ones(4, 8), torch.ones(4))
    with pytest.raises(ValueError, match="image_features and text_features must both be"):
        MatryoshkaLoss(CLIPLoss(), (2, 4))(torch.ones(4, 8), torch.ones(3, 8), 1.0)
