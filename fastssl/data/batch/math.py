"""What is done to a batch of views at once: pure functions, on any device.

x (B, C, H, W), or (B, ...) where so said, float32 or bfloat16; computed in float32, returned in
x's dtype.  Random numbers come as arguments; nothing is written in place; no gradients.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
COLORS, MOVES = ("brightness", "contrast", "saturation"), ("displacement",)


@torch.no_grad()
def mixup(x: Tensor, partner: Tensor, alpha: Tensor) -> Tensor:
    """alpha_i x_i + (1 - alpha_i) x_partner(i); x (B, ...), partner (B,) int64, alpha (B,).

    Source: Zhang et al. 2018, mixup, arXiv:1710.09412, equation 1; of unlabeled views, Bandara et
    al. 2023, arXiv:2312.02151, algorithm 1, with one alpha for the batch.
    """
    alpha = _rows(alpha, x)
    full = x.float()
    return (alpha * full + (1 - alpha) * full[partner]).to(x.dtype)


@torch.no_grad()
def batch_noise(x: Tensor, partner: Tensor, scale: float) -> Tensor:
    """x_i + scale (x_j - mean x_j), j = partner(i), the mean over a channel; x (B, C, ...).

    Noise with the spectrum and the edges of the data.  Channels keep their means.
    """
    other = x.float()[partner]
    deviation = other - other.flatten(2).mean(2).view(*x.shape[:2], *[1] * (x.ndim - 2))
    return (x.float() + scale * deviation).to(x.dtype)


def normal(u: Tensor) -> Tensor:
    """Normal numbers (B, 2 n) from numbers u (B, 2 n) uniform in [0, 1), by pairs.

    Source: Box & Muller 1958.  u is a multiple of 2^-24, so that no number passes 5.8.
    """
    first, second = u.chunk(2, 1)
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * torch.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)


@torch.no_grad()
def style(x: Tensor, donor: Tensor, radius: int, strength: float | Tensor = 1.0) -> Tensor:
    """x with the low-frequency amplitudes of x_donor, phases kept; donor (): int64, a row of x.

        F'_i(k) = ((1 - strength) |F_i(k)| + strength |F_donor(k)|) exp(i arg F_i(k))

    for the frequencies |k_y|, |k_x| <= radius of each channel; F'_i(k) = F_i(k) elsewhere.  Values
    should be of pixels as they are, for a negative mean would keep its sign.  They may leave the
    pixels' range: nothing is clamped.
    Source: Scalbert, Vakalopoulou & Couzinie-Devy 2024, Batch Styles Standardization,
    arXiv:2303.06088, section 3; the square is that of Yang & Soatto 2020, FDA, arXiv:2004.05498.
    """
    H, W = x.shape[-2:]
    spectrum = torch.fft.rfft2(x.float())
    amplitude = spectrum.abs()
    wanted = torch.lerp(amplitude, amplitude.index_select(0, donor.view(1)), strength)
    low_y = (torch.fft.fftfreq(H, 1 / H, device=x.device).abs() <= radius)[:, None]
    low_x = torch.arange(W // 2 + 1, device=x.device) <= radius
    changed = torch.where(low_y & low_x, torch.polar(wanted, spectrum.angle()), spectrum)
    return torch.fft.irfft2(changed, s=(H, W)).to(x.dtype)


@torch.no_grad()
def random_fields(n: Tensor, size: tuple[int, int], cutoff: int, decay: float) -> Tensor:
    """Gaussian random fields (B, F, H, W) float32, of mean 0 and variance 1 at every place.

        g(y, x) = sum_k s_k (n_k cos t_k - n'_k sin t_k),  t_k = 2 pi (k_y y / H + k_x x / W)

    over the frequencies k, one of each pair +-k, with 0 < max |k_y|, |k_x| <= cutoff; s_k^2 is
    |k|^-decay over its sum.  n (B, F, 2, K) normal numbers, K = `modes(cutoff)`.
    """
    k = _frequencies(cutoff, n.device)
    spread = k.square().sum(1).pow(-decay / 4)
    spread = spread / spread.square().sum().sqrt()
    waves = []
    for side, axis in zip(size, k.T, strict=True):
        turns = axis[:, None] * torch.arange(side, device=n.device) / side
        waves.append(torch.polar(torch.ones_like(turns), 2 * torch.pi * turns))
    weights = torch.complex(n[:, :, 0], n[:, :, 1]) * spread
    return ((weights[..., None] * waves[0]).mT @ waves[1]).real


def modes(cutoff: int) -> int:
    """How many frequencies, one of each pair, have 0 < max |k_y|, |k_x| <= cutoff.

    >>> modes(1), modes(4)
    (4, 40)
    """
    return ((2 * cutoff + 1) ** 2 - 1) // 2


def _frequencies(cutoff: int, device: torch.device) -> Tensor:
    """(K, 2) float32 of k_y, k_x: of the square's places those after its middle."""
    axis = torch.arange(-cutoff, cutoff + 1, device=device)
    whole = torch.cartesian_prod(axis, axis)
    return whole[len(whole) // 2 + 1 :].float()


@torch.no_grad()
def vary(x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """x with parameters that differ from pixel to pixel; x in [0, 1], clamped to it at the end.

    fields, each applied where it is given, in this order:

        displacement  d (B, 2, H, W): the pixel at p takes what is at p + d(p), down and right in
                      shares of the side, bilinear, reflected at the border
        brightness    f (B, 1, H, W): x -> (1 + f) x
        contrast      f: x -> m + (1 + f) (x - m), m the image's mean luma
        saturation    f: x -> l + (1 + f) (x - l), l the pixel's luma; nothing on one channel

    Raises ValueError for a field of another name.
    Source: Mansfield et al. 2023, Random Field Augmentations, arXiv:2311.03629: transformations
    whose parameters are independent Gaussian random fields.
    """
    if other := fields.keys() - {*COLORS, *MOVES}:
        raise ValueError(f"fields: want of {(*MOVES, *COLORS)}, got {sorted(other)}")
    out = x.float()
    if "displacement" in fields:
        out = _displaced(out, fields["displacement"])
    if "brightness" in fields:
        out = (1 + fields["brightness"]) * out
    for what in ("contrast", "saturation"):
        if what in fields and (what == "contrast" or x.shape[1] == 3):
            luma = _luma(out)
            center = luma.mean((-2, -1), keepdim=True) if what == "contrast" else luma
            out = torch.lerp(center, out, 1 + fields[what])
    return out.clamp(0, 1).to(x.dtype) if fields else x


def _luma(x: Tensor) -> Tensor:
    """(B, 1, H, W): ITU-R 601; of other than three channels their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * torch.tensor(_LUMA, device=x.device)[:, None, None]).sum(1, keepdim=True)


def _displaced(x: Tensor, d: Tensor) -> Tensor:
    axes = [(torch.arange(n, device=x.device) + 0.5) * (2 / n) - 1 for n in x.shape[-2:]]
    y, z = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([z + 2 * d[:, 1], y + 2 * d[:, 0]], -1)
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)


@torch.no_grad()
def low_frequency(x: Tensor, side: int) -> Tensor:
    """x (B, C, S, S) as a `side` x `side` image with its low frequencies alone, values kept.

        x' = real(F^-1(crop(F x))) (side / S)^2,  crop: -side / 2 <= k_y, k_x < side / 2

    Raises ValueError for images that are not square, and an odd side or one larger than S.
    Source: Wang et al. 2023, EfficientTrain, arXiv:2211.09703, section 4.1 (low-frequency
    cropping).
    """
    size = x.shape[-1]
    if x.ndim != 4 or x.shape[-2] != size:
        raise ValueError(f"x: want square images (B, C, S, S), got {tuple(x.shape)}")
    if side % 2 or not 0 < side <= size:
        raise ValueError(f"side={side}: give an even number up to {size}")
    if side == size:
        return x
    half = side // 2
    kept = torch.cat([torch.arange(half), torch.arange(size - half, size)]).to(x.device)
    spectrum = torch.fft.fft2(x.float())[..., kept[:, None], kept]
    return (torch.fft.ifft2(spectrum).real * (side / size) ** 2).to(x.dtype)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """Numbers (B,), to be multiplied with x (B, ...)."""
    return values.to(x.device, torch.float32).view(-1, *[1] * (x.ndim - 1))
