"""Losses of one process on a CPU by every way they may go: whole, in parts, and as across ranks."""

from functools import partial

import pytest
import torch

from fastssl.kernels.common.chunks import CHUNK_BYTES
from fastssl.kernels.pairwise import lse_torch
from fastssl.losses import (
    BarlowTwinsLoss,
    CLIPLoss,
    MMCRLoss,
    NTXentLoss,
    SigLIPLoss,
    SSLEYLoss,
    VICRegLoss,
    _ahead,
)
from fastssl.losses.barlow_twins import barlow_twins_reference
from fastssl.losses.clip import clip_reference
from fastssl.losses.mmcr import mmcr_reference
from fastssl.losses.ntxent import ntxent_reference
from fastssl.losses.siglip import siglip_reference
from fastssl.losses.ssl_ey import ssl_ey_reference
from fastssl.losses.vicreg import vicreg_reference
from tests.losses.views import unit, views
from tests.oracle import assert_no_worse, grads

NUMBERS = torch.tensor(12.0), torch.tensor(-9.0)
PAIRS = {  # ours, the formula, and what they take beside two views
    "ntxent": (NTXentLoss(0.1), lambda a, b: ntxent_reference(a, b, 0.1), ()),
    "ntxent cold": (NTXentLoss(0.005), lambda a, b: ntxent_reference(a, b, 0.005), ()),
    "clip": (CLIPLoss(), clip_reference, NUMBERS[:1]),
    "clip cold": (CLIPLoss(), clip_reference, (torch.tensor(300.0),)),
    "siglip": (SigLIPLoss(), siglip_reference, NUMBERS),
}
STATISTICS = {
    "vicreg": (VICRegLoss(3.0, 5.0, 2.0), lambda a, b: vicreg_reference(a, b, 3.0, 5.0, 2.0)),
    "barlow": (
        BarlowTwinsLoss(0.02, scale=0.5),
        lambda a, b: 0.5 * barlow_twins_reference(a, b, 0.02),
    ),
    "ssl-ey": (lambda *z: SSLEYLoss()(z), lambda *z: ssl_ey_reference(z)),
    "mmcr": (
        lambda *z: MMCRLoss(0.3)(*(x.unflatten(0, (-1, 3)) for x in z)),
        lambda a, b: mmcr_reference(a.unflatten(0, (-1, 3)), b.unflatten(0, (-1, 3)), 0.3),
    ),
}
MMCR = partial(mmcr_reference, lmda=0.0)
WAYS = ("few", "whole", "tiles", "forgotten", "apart")


def take(way, monkeypatch):
    """few: as so few are by themselves; whole: all scores at once; tiles: of 16 by 16, kept for the
    gradient; forgotten: made again; rows: by their products; apart: as across ranks, with autograd.
    """
    if way == "whole":
        monkeypatch.setattr(_ahead, "_FEW", 0)
    if way == "rows":
        monkeypatch.setattr(_ahead, "has_few_features", lambda x: False)
    if way in ("tiles", "forgotten"):
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 1024)
        monkeypatch.setattr(lse_torch, "KEPT_BYTES", 1 << 20 if way == "tiles" else 2500)
    if way == "apart":
        monkeypatch.setattr(_ahead, "fits", lambda *_, **options: False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PAIRS)
def test_every_way_has_the_formula(name, way, monkeypatch):
    take(way, monkeypatch)
    ours, formula, numbers = PAIRS[name]
    a, b = (unit(z) for z in views(37, 6))
    if "cold" in name:  # scores far apart: some tiles take two exponentials
        a[:9] *= 0.05
    assert_no_worse(ours, formula, (a, b, *numbers))


@pytest.mark.parametrize("way", ("few", "rows", "apart"))
@pytest.mark.parametrize("name", STATISTICS)
def test_every_way_has_the_statistics(name, way, monkeypatch):
    take(way, monkeypatch)
    ours, formula = STATISTICS[name]
    a, b = views(36, 6)
    a[:, 1] *= 0.02  # a variance that VICReg pushes apart
    # SSL-EY's value is the difference of two terms, either larger than it.
    slack = {"mmcr": 4.0, "ssl-ey": 8.0}.get(name, 2.0)
    assert_no_worse(ours, formula, (a, b + 0.5), slack=slack)


@pytest.mark.parametrize("name", [*PAIRS, *STATISTICS])
def test_a_gradient_may_be_asked_for_again_and_of_one_view(name):
    ours, _, *rest = (PAIRS | STATISTICS)[name]
    a, b = (unit(z).requires_grad_() for z in views(36, 6))
    numbers = rest[0] if rest else ()
    loss = ours(a, b, *numbers)
    first = torch.autograd.grad(3 * loss, (a, b), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (a, b))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    once = torch.autograd.grad(ours(a, b, *numbers), (a, b))
    torch.testing.assert_close([3 * x for x in once], list(first))
    alone = torch.autograd.grad(3 * ours(a.detach(), b, *numbers), b)[0]
    torch.testing.assert_close(alone, first[1])
    with torch.no_grad():
        assert torch.isclose(ours(a, b, *numbers), loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isclose(ours(a, b, *numbers), loss)


@pytest.mark.parametrize("name", [*PAIRS, *STATISTICS])
def test_views_that_do_not_fit_are_refused(name):
    ours, _, *rest = (PAIRS | STATISTICS)[name]
    a, b = views(36, 6)
    one = 3 if name == "mmcr" else 1  # rows of one image
    single = [] if name in PAIRS else [(a[:one], b[:one])]
    flat = a.flatten(), b.flatten()
    for x, y in ((a, b[:33]), (a, b.double()), (a.long(), b.long()), flat, *single):
        with pytest.raises(ValueError, match="must (both )?(be|share|have)"):
            ours(x, y, *(rest[0] if rest else ()))


@pytest.mark.parametrize("name", ["vicreg", "ssl-ey"])
def test_float16_apart_has_the_value(name, monkeypatch):
    take("apart", monkeypatch)
    ours, formula = STATISTICS[name]
    halves = [z.half() for z in views(36, 6)]
    want = formula(*(z.float() for z in halves))
    torch.testing.assert_close(ours(*halves), want, rtol=1e-3, atol=0, check_dtype=False)


@pytest.mark.parametrize("way", ["few", "apart"])
@pytest.mark.parametrize("name", ["vicreg", "ssl-ey", "barlow"])
def test_means_far_from_zero_cost_no_digits(name, way, monkeypatch):
    take(way, monkeypatch)
    near = [(1024 * z).round() / 1024 for z in views(37, 6)]
    far = [z + 4096 for z in near]  # exactly
    ours = STATISTICS[name][0]
    torch.testing.assert_close(grads(ours, far)[1:], grads(ours, near)[1:], rtol=0, atol=1e-6)


def test_unbiased_and_infinite_variances_of_barlow_twins():
    def formula(*z):
        a, b = ((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt() for x in z)
        C = a.T @ b / len(a)
        return (C.diagonal() - 1).square().sum() + 0.02 * (C - C.diagonal().diag()).square().sum()

    a, b = views(36, 6)
    assert_no_worse(BarlowTwinsLoss(0.02, unbiased=True), formula, (a, b))
    a[:, 1] *= 1e25
    assert BarlowTwinsLoss()(a, b).isnan()


def test_directions_of_all_sizes_keep_their_digits():
    a, b = views(48, 48)  # a square of centroids has some that are nearly nothing
    ours, formula = ((lambda *z, f=f: f(*(x[:, None] for x in z))) for f in (MMCRLoss(0.0), MMCR))
    assert_no_worse(ours, formula, (a, b))


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("name", ["ntxent", "clip", "siglip"])
def test_one_pair_and_what_is_not_finite(name, way, monkeypatch):
    take(way, monkeypatch)
    ours, _, numbers = PAIRS[name]
    a, b = (unit(z) for z in views(40, 6))
    assert all(x.isfinite().all() for x in grads(ours, [a[:1], b[:1], *numbers]))
    a[1] = 0
    assert all(x.isfinite().all() for x in grads(ours, [a, b, *numbers]))
    a[3, 2] = torch.nan
    assert ours(a, b, *numbers).isnan()
    assert ours(a, b, *(0 * number for number in numbers)).isnan()
