"""The spectrum, RankMe, alignment and uniformity: known values, the papers' formulas, and laws."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.evaluate import alignment, rankme, uniformity

rankme_module = importlib.import_module("fastssl.evaluate.rankme")  # the function hides its name
spectrum = rankme_module.spectrum


def rankme_as_published(x, eps=1e-7):
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.abs().sum() + eps
    return math.exp(-(p * p.log()).sum())


def test_known_ranks():
    assert rankme(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    assert rankme(torch.eye(7).repeat(5, 1)) == pytest.approx(7, rel=1e-5)
    assert rankme(torch.ones(20, 6)) == pytest.approx(1, abs=1e-4)  # collapse
    assert rankme(torch.zeros(20, 6)) == 0.0
    halves = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert rankme(halves) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize(("n", "d"), [(300, 24), (24, 300), (50, 50)])
def test_rank_agrees_with_the_paper(n, d):
    torch.manual_seed(n)
    x = torch.randn(n, d) * torch.logspace(0, -3, d)
    assert rankme(x) == pytest.approx(rankme_as_published(x), rel=1e-6)


def test_rank_does_not_depend_on_chunks_scale_or_rotation(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(100, 9) * torch.logspace(0, -2, 9)
    rotation = torch.linalg.qr(torch.randn(9, 9)).Q
    assert rankme(1e4 * x @ rotation) == pytest.approx(rankme(x), rel=1e-5)
    whole = rankme(x)
    monkeypatch.setattr(rankme_module, "_ROWS", 7)
    assert rankme(x) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(300, 24), (24, 300), (50, 50), (2, 1), (2, 7)])
@pytest.mark.parametrize("rows", [7, 8192])
def test_the_spectrum_is_the_covariances(n, d, rows, monkeypatch):
    monkeypatch.setattr(rankme_module, "_ROWS", rows)
    torch.manual_seed(n)
    x = torch.randn(n, d) * torch.logspace(0, -3, d) + 2.0
    wide = x.double()
    for centered, matrix in ((True, torch.cov(wide.T).view(d, d)), (False, wide.T @ wide / n)):
        want = torch.linalg.eigvalsh(matrix).flip(0)[: min(n, d)]
        got = spectrum(x, centered=centered)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13 * want[0].item())
        assert (got >= 0).all() and (got[:-1] >= got[1:]).all()


def test_known_spectra():
    """Rows on two axes; one sample repeated; and what centering takes away."""
    cross = torch.tensor([[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, -1.0, 1.0]])
    torch.testing.assert_close(spectrum(cross), torch.tensor([18.0, 2.0, 0.0]).double() / 3)
    about_zero = torch.tensor([18.0, 4.0, 2.0]).double() / 4
    torch.testing.assert_close(spectrum(cross, centered=False), about_zero)
    assert spectrum(torch.full((20, 6), 0.1)).sum() < 1e-15
    far = cross.double() + 1e6  # exact in float32
    torch.testing.assert_close(spectrum(far), spectrum(cross))


def test_alignment_is_the_mean_distance_on_the_sphere():
    torch.manual_seed(0)
    a, b = torch.randn(2, 30, 5)
    unit_a, unit_b = F.normalize(a), F.normalize(b)
    for alpha in (1.0, 2.0):
        expected = sum(math.dist(p, q) ** alpha for p, q in zip(unit_a, unit_b, strict=True)) / 30
        assert alignment(a, b, alpha) == pytest.approx(expected, rel=1e-5)
    assert alignment(a, 3 * a) == pytest.approx(0, abs=1e-9)
    assert alignment(a, -a) == pytest.approx(4)
    for scale in (1e-25, 1e25):  # fault 9: their squares leave float32
        assert alignment(scale * a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="non-finite values in 30 of 30"):  # as float32
        alignment(1e300 * a.double(), b)


def test_uniformity_agrees_with_the_paper():
    torch.manual_seed(0)
    x = torch.randn(80, 6)
    expected = F.pdist(F.normalize(x).double()).square().mul(-2).exp().mean().log()
    assert uniformity(x) == pytest.approx(float(expected), rel=1e-5)
    expected = F.pdist(F.normalize(x).double()).square().mul(-0.5).exp().mean().log()
    assert uniformity(x, t=0.5) == pytest.approx(float(expected), rel=1e-5)
    for scale in (1e-25, 1e25):  # fault 9: their squares leave float32
        assert uniformity(scale * x, t=0.5) == pytest.approx(float(expected), rel=1e-5)


def test_known_uniformities():
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)  # all at one point
    assert uniformity(torch.zeros(5, 3)) == pytest.approx(0, abs=1e-5)  # collapsed to nothing
    mixed = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])  # distances 0, and sqrt(2) twice
    assert uniformity(mixed) == pytest.approx(math.log((1 + 2 * math.exp(-4)) / 3))
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite, t=400.0) == pytest.approx(-1600)  # exp alone would be 0


@pytest.mark.parametrize("measure", [rankme, spectrum, uniformity, lambda x: alignment(x, x)])
def test_bad_features_are_named(measure):
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        measure(torch.ones(1, 3))
    with pytest.raises(ValueError, match="non-finite values in 1 of 3 rows"):
        measure(torch.tensor([[1.0, 0.0], [math.nan, 1.0], [0.0, 1.0]]))


def test_bad_parameters_are_named():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        rankme(x, eps=0)
    with pytest.raises(ValueError, match="t must be > 0, got -1"):
        uniformity(x, t=-1)
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        alignment(x, x, alpha=0)
    with pytest.raises(ValueError, match="same samples, got 3 and 2"):
        alignment(x, x[:2])
