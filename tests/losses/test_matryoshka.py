import copy
import math
from functools import partial

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
    _nested_pairs,
)
from fastssl.losses.clip import clip_reference
from fastssl.losses.ntxent import ntxent_reference
from tests.losses.views import views
from tests.oracle import DEVICE, assert_no_worse, grads

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
    seen, call = [], _nested.ahead
    monkeypatch.setattr(_nested, "ahead", lambda *a: seen.append(1) or call(*a))
    return seen


FORMULAS = {
    "ntxent": lambda a, b: ntxent_reference(a, b, -0.1),
    "clip": clip_reference,
    "unit clip": lambda a, b, s: clip_reference(F.normalize(a), F.normalize(b), s),
}
SWEPT = {
    "ntxent": (NTXentLoss(-0.1), ()),
    "clip": (CLIPLoss(), (torch.tensor(0.8, device=DEVICE),)),
    "unit clip": (CLIPLoss(), (torch.tensor(9.0, device=DEVICE),)),
}


@pytest.mark.parametrize("side", [17, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SWEPT)
def test_one_sweep_is_one_prefix_after_another(name, dtype, side, sweeps, monkeypatch):
    monkeypatch.setattr(_nested, "square_tile", lambda x, tiles: side)
    (loss, scale), dims, weights = SWEPT[name], (2, 3, 8), (0.5, 0, 2)
    inputs = [z.to(dtype) for z in (*views(33, 9), *scale)]

    def spelt(*given):
        cut = zip(weights, dims, strict=True)
        return sum(w * FORMULAS[name](*(z[:, :m] for z in given[:2]), *given[2:]) for w, m in cut)

    ours = MatryoshkaLoss(loss, dims, weights, normalize=name == "unit clip")
    if dtype == torch.float32:
        assert_no_worse(ours, spelt, inputs)
    else:
        torch.testing.assert_close(
            grads(ours, inputs), grads(spelt, inputs), rtol=1e-12, atol=1e-15
        )
    assert bool(sweeps) == (DEVICE == "cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), spelt(*inputs))


@pytest.fixture(params=["triton", "torch"])
def by_pairs(request, monkeypatch):
    """As on a GPU, by this implementation: how often the prefixes' pairs were taken at once."""
    seen, call = [], partial(_nested_pairs.pairwise_lse_nested, impl=request.param)
    look = lambda *a, **options: seen.append(1) or call(*a, **options)  # noqa: E731
    monkeypatch.setattr(_nested_pairs, "takes_nested", lambda x: True)
    monkeypatch.setattr(_nested_pairs, "pairwise_lse_nested", look)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SWEPT)
def test_all_pairs_at_once_are_one_prefix_after_another(name, dtype, by_pairs):
    (loss, scale), dims, weights = SWEPT[name], (2, 3, 8), (0.5, 0, 2)
    inputs = [*(z.to(dtype) for z in views(33, 9)), *scale]

    def spelt(*given):
        cut = zip(weights, dims, strict=True)
        return sum(w * FORMULAS[name](*(z[:, :m] for z in given[:2]), *given[2:]) for w, m in cut)

    ours = MatryoshkaLoss(loss, dims, weights, normalize=name == "unit clip")
    assert_no_worse(ours, spelt, inputs)
    assert by_pairs == [1]


def test_all_pairs_at_once_compile_whole(by_pairs):
    image, text = views(9, 8)
    loss = MatryoshkaLoss(CLIPLoss(), (2, 8), normalize=True)
    torch.compiler.reset()
    call = lambda image, text: loss(image, text, 5.0)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(grads(compiled, [image, text]), grads(call, [image, text]))


@pytest.mark.parametrize("name", SWEPT)
def test_a_second_backward_makes_the_gradient_again(name):
    loss, scale = SWEPT[name]
    a, b = views(9, 8)
    a.requires_grad_()
    value = MatryoshkaLoss(loss, (2, 8), normalize=name == "unit clip")(a, b, *scale)
    first, second = (torch.autograd.grad(value, a, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)


def test_normalized_prefixes_of_a_loss_that_takes_rows_as_they_are():
    a, b = views(9, 8)
    want = sum(CLIPLoss()(*(F.normalize(z[:, :m]) for z in (a, b)), 5.0) for m in (2, 8))
    loss = one_after_another(CLIPLoss(), (2, 8), normalize=True)
    torch.testing.assert_close(loss(a, b, 5.0), want)


def test_one_sweep_takes_names(sweeps):
    a, b = views(9, 8)
    MatryoshkaLoss(NTXentLoss(), (2, 8))(out1=b, out0=a)
    MatryoshkaLoss(CLIPLoss(), (2, 8))(a, b, logit_scale=1.0)
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
    "cold": (NTXentLoss(0.01), lambda a, b: (a, b)),
    "large scores": (CLIPLoss(), lambda a, b: (a, b, 90.0)),
    "scale 0": (CLIPLoss(), lambda a, b: (a, b, 0.0)),
    "a bias": (CLIPLoss(), lambda a, b: (a, b, 1.0, torch.tensor(1.0, device=DEVICE))),
    "a scale (1,)": (CLIPLoss(), lambda a, b: (a, b, torch.full((1,), 1.0, device=DEVICE))),
}


@pytest.mark.parametrize("case", SINGLY)
def test_what_one_sweep_does_not_take(case, sweeps):
    loss, inputs = SINGLY[case]
    given = inputs(*views(9, 8))
    at_once = MatryoshkaLoss(loss, (2, 8))(*given)
    assert not sweeps and at_once.isfinite()
    torch.testing.assert_close(at_once, one_after_another(loss, (2, 8))(*given))


@pytest.mark.parametrize("case", ["a subclass", "labels", "a bias", "a scale (1,)"])
def test_what_is_not_one_of_pairs(case, by_pairs):
    loss, inputs = SINGLY[case]
    given = inputs(*views(9, 8))
    at_once = MatryoshkaLoss(loss, (2, 8))(*given)
    assert not by_pairs
    torch.testing.assert_close(at_once, one_after_another(loss, (2, 8))(*given))


@pytest.mark.parametrize("loss, tail", [(NTXentLoss(0.2), ()), (CLIPLoss(), (1.0,))])
def test_one_sweep_holds_no_more_than_it_may(loss, tail, sweeps, monkeypatch):
    monkeypatch.setattr(_nested, "KEPT_BYTES", 600)
    MatryoshkaLoss(loss, (2, 8))(*views(9, 8), *tail)
    assert not sweeps


@pytest.mark.parametrize("loss, tail", [(NTXentLoss(0.2), ()), (CLIPLoss(), (1.0,))])
def test_a_pair_alone_has_nothing_to_lose(loss, tail, sweeps):
    value, *slopes = grads(lambda *z: MatryoshkaLoss(loss, (2, 8))(*z, *tail), views(1, 8))
    assert value == 0 and not any(slope.any() for slope in slopes)
    assert bool(sweeps) == (DEVICE == "cpu")


def test_one_sweep_leaves_faint_prefixes_to_the_loss(sweeps):
    a, b = views(9, 8)
    value = MatryoshkaLoss(CLIPLoss(), (2, 8), normalize=True)(a, faint(b), 5.0)
    assert value.isfinite() and not sweeps


def test_one_sweep_looks_at_its_prefixes_alone(sweeps):
    a, b = views(9, 8)
    a[:, 5:], scale = torch.inf, torch.tensor(1.0, device=DEVICE)
    for loss, tail in ((NTXentLoss(0.2), []), (CLIPLoss(), [scale])):
        found = grads(MatryoshkaLoss(loss, (2, 5)), [a, b, *tail])
        assert all(x.isfinite().all() for x in found)
    assert len(sweeps) == 2 * (DEVICE == "cpu")


def test_a_temperature_that_learns_has_its_gradient():
    loss = NTXentLoss(0.2)
    loss.temperature = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    MatryoshkaLoss(loss, (2, 8))(*views(9, 8)).backward()
    assert loss.temperature.grad.abs() > 0


@pytest.mark.parametrize("loss, tail", [(NTXentLoss(0.2), ()), (CLIPLoss(), (1.0,))])
def test_one_sweep_leaves_nan_to_the_loss(loss, tail, sweeps):
    a, b = views(9, 8)
    a[3, 5] = torch.nan
    assert MatryoshkaLoss(loss, (2, 8))(a, b, *tail).isnan() and not sweeps


def test_one_sweep_refuses_as_the_loss_does():
    with pytest.raises(ValueError, match="out0 and out1 must both be"):
        MatryoshkaLoss(NTXentLoss(), (2, 4))(torch.ones(4, 8), torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"labels must be \(4,\) integers"):
        MatryoshkaLoss(NTXentLoss(), (2, 4))(torch.ones(4, 8), torch.ones(4))
    with pytest.raises(ValueError, match="image_features and text_features must both be"):
        MatryoshkaLoss(CLIPLoss(), (2, 4))(torch.ones(4, 8), torch.ones(3, 8), 1.0)
