"""Operations on batches: each against its formula written anew in numpy, and its laws."""

import math

import numpy as np
import pytest
import torch

from fastssl.data.batch import math as bm

B, C, H, W = 5, 3, 12, 16


def images(b=B, c=C, h=H, w=W, seed=0):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed))


PARTNER, ALPHA = torch.tensor([2, 0, 4, 3, 1]), torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0])


def test_mixup_is_its_formula_and_stays_between():
    x = images()
    got = bm.mixup(x, PARTNER, ALPHA)
    for i in range(B):
        a, other = float(ALPHA[i]), x[PARTNER[i]]
        np.testing.assert_allclose(got[i], a * x[i] + (1 - a) * other, atol=1e-6)
        assert (got[i] >= torch.minimum(x[i], other) - 1e-6).all()
        assert (got[i] <= torch.maximum(x[i], other) + 1e-6).all()
    rows = torch.rand(B, 7)
    np.testing.assert_allclose(bm.mixup(rows, PARTNER, torch.ones(B)), rows)


def test_batch_noise_is_its_formula_and_keeps_means():
    x = images()
    got = bm.batch_noise(x, PARTNER, 0.3)
    for i in range(B):
        other = x[PARTNER[i]].numpy()
        want = x[i].numpy() + 0.3 * (other - other.mean((1, 2), keepdims=True))
        np.testing.assert_allclose(got[i], want, atol=1e-6)
    torch.testing.assert_close(got.mean((2, 3)), x.mean((2, 3)))
    volumes = torch.rand(B, 2, 3, 4, 5)
    torch.testing.assert_close(bm.batch_noise(volumes, PARTNER, 0.0), volumes)


def test_normal_numbers_are_normal_and_uncorrelated():
    u = torch.rand(200, 1000, generator=torch.Generator().manual_seed(0))
    n = bm.normal(u).double()
    z = torch.cat([n.flatten(), torch.tensor([0.0])])
    N = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(N) and abs(z.var() - 1) < 4 * math.sqrt(2 / N)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / N)
    assert abs((n[:, :500] * n[:, 500:]).mean()) < 4 / math.sqrt(N / 2)
    edge = bm.normal(torch.tensor([[0.0, 1 - 2**-24, 0.25, 0.5]]))
    assert edge.isfinite().all() and edge.abs().max() < 5.8


def low(h, w, radius):
    y, x = (np.abs(np.fft.fftfreq(n, 1 / n)) <= radius for n in (h, w))
    return y[:, None] & x


@pytest.mark.parametrize("h, w", [(12, 16), (11, 13)])
@pytest.mark.parametrize("radius", [0, 2, 5])
def test_style_has_the_donors_amplitudes_and_its_own_phases(h, w, radius):
    x = images(h=h, w=w)
    got = bm.style(x, torch.tensor(3), radius).double().numpy()
    before, after = (np.fft.fft2(v) for v in (x.double().numpy(), got))
    inside = low(h, w, radius)
    for i in range(B):
        want = np.where(inside, np.abs(before[3]), np.abs(before[i]))
        np.testing.assert_allclose(np.abs(after[i]), want, atol=1e-4)
        turned = after[i] * np.conj(before[i])
        np.testing.assert_allclose(np.angle(turned), 0, atol=2e-3)
    torch.testing.assert_close(torch.from_numpy(got[3]).float(), x[3])  # the donor's own
    np.testing.assert_allclose(got.mean((2, 3)), np.tile(got[3].mean((1, 2)), (B, 1)), atol=1e-5)


def test_style_in_part():
    x = images()
    whole, half, none = (bm.style(x, torch.tensor(0), 3, s) for s in (1.0, 0.5, 0.0))
    torch.testing.assert_close(none, x)
    amplitude = [torch.fft.fft2(v.double()).abs() for v in (x, half, whole)]
    torch.testing.assert_close(amplitude[1], (amplitude[0] + amplitude[2]) / 2, atol=1e-4, rtol=0)


def test_modes_are_one_of_each_pair():
    for cutoff in (1, 3):
        k = {tuple(row) for row in bm._frequencies(cutoff, torch.device("cpu")).int().tolist()}
        assert len(k) == bm.modes(cutoff)
        both = k | {(-y, -x) for y, x in k}
        assert len(both) == 2 * len(k) == (2 * cutoff + 1) ** 2 - 1


def test_fields_are_their_sum_of_waves():
    cutoff, decay = 2, 3.0
    n = torch.randn(2, 3, 2, bm.modes(cutoff), generator=torch.Generator().manual_seed(0))
    got = bm.random_fields(n, (6, 9), cutoff, decay)
    k = bm._frequencies(cutoff, n.device).double().numpy()
    power = np.linalg.norm(k, axis=1) ** -decay
    y, x = np.mgrid[:6, :9]
    for b in range(2):
        for f in range(3):
            want = 0
            for j, (ky, kx) in enumerate(k):
                t = 2 * np.pi * (ky * y / 6 + kx * x / 9)
                c, s = n[b, f, :, j].double().numpy()
                want = want + np.sqrt(power[j] / power.sum()) * (c * np.cos(t) - s * np.sin(t))
            np.testing.assert_allclose(got[b, f], want, atol=1e-5)


def test_fields_have_mean_0_variance_1_and_the_spectrum():
    cutoff, decay, count = 4, 2.5, 4000
    n = torch.randn(count, 1, 2, bm.modes(cutoff), generator=torch.Generator().manual_seed(1))
    g = bm.random_fields(n, (24, 24), cutoff, decay)[:, 0]
    assert g.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (g.var(0) - 1).abs().max() < 5 * math.sqrt(2 / count)
    power = torch.fft.fft2(g).abs().square().mean(0)
    far = power[0, 4] / power[0, 1]
    assert abs(far / 4**-decay - 1) < 0.15
    assert abs(power[4, 0] / power[0, 4] - 1) < 0.15  # alike in all directions
    assert power[5:20].max() < 1e-4 * power[0, 1] and power[0, 0] < 1e-4 * power[0, 1]


def luma(x):
    return (x * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdims=True)


def test_varied_colors_are_their_formulas():
    x = images()
    g = torch.Generator().manual_seed(4)
    f = {what: 0.3 * torch.randn(B, 1, H, W, generator=g) for what in bm.COLORS}
    fields = {what: field.numpy() for what, field in f.items()}
    want = x.numpy().astype(np.float64) * (1 + fields["brightness"])
    mean = luma(want).mean((2, 3), keepdims=True)
    want = mean + (1 + fields["contrast"]) * (want - mean)
    want = luma(want) + (1 + fields["saturation"]) * (want - luma(want))
    np.testing.assert_allclose(bm.vary(x, f), want.clip(0, 1), atol=1e-5)


def test_constant_fields_are_the_plain_changes():
    x = images(c=1)
    bright = bm.vary(x, {"brightness": torch.full((B, 1, H, W), 0.2)})
    torch.testing.assert_close(bright, (1.2 * x).clamp(0, 1))
    gray = {"saturation": torch.full((B, 1, H, W), 0.7)}
    torch.testing.assert_close(bm.vary(x, gray), x)


def test_displaced_pixels_come_from_their_places():
    x = images()
    down = torch.zeros(B, 2, H, W)
    down[:, 0], down[:, 1] = 2 / H, -3 / W
    got = bm.vary(x, {"displacement": down})
    torch.testing.assert_close(got[:, :, :-2, 3:], x[:, :, 2:, :-3], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[:, :, -1, 3:], x[:, :, -2, :-3], atol=1e-4, rtol=0)  # reflected
    half = torch.zeros(B, 2, H, W)
    half[:, 1] = 0.5 / W
    want = (x[..., :-1] + x[..., 1:]) / 2
    torch.testing.assert_close(
        bm.vary(x, {"displacement": half})[..., :-1], want, atol=1e-5, rtol=0
    )


def test_zero_fields_and_none_are_the_identity():
    x = images()
    assert bm.vary(x, {}) is x
    zero = {what: torch.zeros(B, 1, H, W) for what in bm.COLORS}
    moved = {**zero, "displacement": torch.zeros(B, 2, H, W)}
    torch.testing.assert_close(bm.vary(x, moved), x, atol=1e-5, rtol=0)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"got \['hue'\]"):
        bm.vary(images(), {"hue": torch.zeros(B, 1, H, W)})


def cropped(x, side):
    """EfficientTrain's low-frequency cropping, by a shifted spectrum in float64."""
    S = x.shape[-1]
    F = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    a = S // 2 - side // 2
    F = F[..., a : a + side, a : a + side]
    return np.fft.ifft2(np.fft.ifftshift(F, axes=(-2, -1))).real * (side / S) ** 2


@pytest.mark.parametrize("size, side", [(16, 12), (16, 2), (15, 8), (14, 14)])
def test_low_frequency_is_its_formula(size, side):
    x = images(h=size, w=size)
    got = bm.low_frequency(x, side)
    assert got.shape == (B, C, side, side)
    np.testing.assert_allclose(got, cropped(x.double().numpy(), side), atol=1e-5)


def test_low_frequency_of_a_band_limited_image_is_its_samples():
    """Waves below the cut, and a constant, seen on the coarser grid."""

    def wave(n):
        y, x = np.mgrid[:n, :n] / n
        waves = 0.3 * np.cos(2 * np.pi * (3 * x - 2 * y) + 1) + 0.2 * np.sin(2 * np.pi * 4 * y)
        return torch.from_numpy(0.5 + waves).float()[None, None]

    torch.testing.assert_close(bm.low_frequency(wave(24), 10), wave(10), atol=1e-5, rtol=0)
    flat = torch.full((1, 1, 16, 16), 0.7)
    torch.testing.assert_close(bm.low_frequency(flat, 6), flat[..., :6, :6])


@pytest.mark.parametrize("side", [3, 18, 0])
def test_impossible_sides_are_refused(side):
    with pytest.raises(ValueError, match=f"side={side}: give an even number up to 16"):
        bm.low_frequency(images(h=16, w=16), side)


def test_what_is_not_square_is_refused():
    with pytest.raises(ValueError, match="want square images"):
        bm.low_frequency(images(), 8)


FIELDS = {
    "brightness": 0.1 * torch.ones(B, 1, H, H),
    "displacement": 0.1 * torch.ones(B, 2, H, H),
}
CALLS = {
    "mixup": lambda x: bm.mixup(x, PARTNER, ALPHA),
    "batch_noise": lambda x: bm.batch_noise(x, PARTNER, 0.3),
    "style": lambda x: bm.style(x, torch.tensor(1), 2),
    "vary": lambda x: bm.vary(x, FIELDS),
    "low_frequency": lambda x: bm.low_frequency(x, 8),
}


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_gradients_and_inputs(name):
    """bfloat16 is computed in float32: as near as its own rounding."""
    x = images(w=H)
    half, before = x.bfloat16(), x.clone()
    got = CALLS[name](half)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, CALLS[name](half.float()).bfloat16())
    leaf = x.requires_grad_()
    assert not CALLS[name](leaf).requires_grad
    assert torch.equal(x, before)
    strided = x.detach().transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(CALLS[name](strided), CALLS[name](x.detach()))
